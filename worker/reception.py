"""Folders that the coordinator's node sends: the model and the library, for a rank whose node has neither.

Kept in the node's cache by the hash of their content, so a node gets each once. What is there was whole and verified
before it got its name.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tpserve.proto.rank import FileFacts, fingerprint_of
from tpserve.worker.arrays import Array
from tpserve.worker.errors import ReceptionError

logger = logging.getLogger(__name__)

_MARGIN_BYTES = 64 << 20
"""Left free on the disk of the cache."""


def has_files(folder: Path, files: Sequence[FileFacts]) -> bool:
    """Tell whether a folder of this node holds these very files, as far as can be seen without reading all of them."""
    try:
        return all(
            (folder / file.name).stat().st_size == file.num_bytes
            and fingerprint_of(folder / file.name) == file.fingerprint
            for file in files
        )
    except OSError:
        return False


class Reception:
    """Takes one folder, file after file, chunk after chunk.

    Parameters
    ----------
    key
        Hash of the folder's content.
    num_bytes
        Of all files.

    Raises
    ------
    ReceptionError
        If the disk has no room for it.
    """

    def __init__(self, key: str, num_bytes: int) -> None:
        self._target = _received(key)
        root = self._target.parent
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        free = shutil.disk_usage(root).free
        if free < num_bytes + _MARGIN_BYTES:
            raise ReceptionError(
                f"{root} has {free >> 20} MiB free, {(num_bytes + _MARGIN_BYTES) >> 20} MiB are needed: free some, or "
                "set TPSERVE_HOME for this node's Ray to a folder with more room"
            )
        self._partial = root / f".{key}.{os.getpid()}"
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir()
        self._file: BinaryIO | None = None
        self._name = ""
        self._digest = hashlib.sha256()
        self._digests: dict[str, str] = {}

    def take(self, name: str, chunk: Array) -> None:
        """Append to a file; the next name ends the one before."""
        if Path(name).name != name or name == "..":
            raise ReceptionError(f"{name!r} is no plain file name")
        try:
            if name != self._name:
                self._end_file()
                self._name, self._digest = name, hashlib.sha256()
                self._file = (self._partial / name).open("wb")
            assert self._file is not None
            self._file.write(chunk.data)
            self._digest.update(chunk.data)
        except OSError as error:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise ReceptionError(f"{self._partial / name} cannot be written: {error.strerror}") from None

    def finish(self, digests: Mapping[str, str]) -> Path:
        """Compare every file with its sha256 and return the folder.

        Raises
        ------
        ReceptionError
            If a file differs or has not come.
        """
        self._end_file()
        if self._digests != digests:
            wrong = sorted(name for name in {*digests, *self._digests} if self._digests.get(name) != digests.get(name))
            shutil.rmtree(self._partial, ignore_errors=True)
            raise ReceptionError(f"{', '.join(wrong)} did not arrive as sent: start the server again")
        try:
            self._partial.rename(self._target)
        except OSError:
            if not self._target.is_dir():
                raise
            shutil.rmtree(self._partial)  # another replica's rank was faster
        return self._target

    def _end_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._digests[self._name] = self._digest.hexdigest()


def find_received(key: str) -> Path | None:
    """Return the folder that this node was sent before, if it was."""
    folder = _received(key)
    return folder if folder.is_dir() else None


def _received(key: str) -> Path:
    home = os.environ.get("TPSERVE_HOME")
    root = Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tpserve"
    return root / "received" / key


def _remove_abandoned(root: Path) -> None:
    """Remove what ranks left that ended while they received."""
    for partial in root.glob(".*"):
        pid: Any = partial.name.rpartition(".")[2]
        if pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(partial, ignore_errors=True)
