"""Folders built once and kept: converted models and compiled libraries, named by the hash of what went in."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from errno import EDQUOT, EEXIST, ENOSPC, ENOTEMPTY
from pathlib import Path

from tpserve.compile.errors import CacheError

logger = logging.getLogger(__name__)


_FULL_BYTES = 64 << 10
"""With less room left, what failed to be written failed for that."""


class CachePolicy(Enum):
    """What may be read from and written to the cache."""

    ON = "ON"
    """Use what is there, keep what is built."""
    OFF = "OFF"
    """Build every time, keep nothing (a temporary folder that the caller removes); kernels that are there are used."""
    REDO = "REDO"
    """Build again and replace what is there."""
    READONLY = "READONLY"
    """Use what is there, build nothing."""


def cache_root() -> Path:
    """Return TPSERVE_HOME, or the user's cache folder."""
    home = os.environ.get("TPSERVE_HOME")
    if home:
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tpserve"


@contextmanager
def told_if_full(folder: Path) -> Iterator[None]:
    """Say in one line if what fails inside fails because a disk is full.

    Libraries and compilers tell it in many ways: by an errno, in words, or as any other failure to write.

    Raises
    ------
    CacheError
        Naming the folder and the remedy.
    """
    try:
        yield
    except Exception as error:
        by_number = isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT)
        if by_number or os.strerror(ENOSPC) in str(error) or shutil.disk_usage(folder).free < _FULL_BYTES:
            raise CacheError(
                f"no space left on the disk of {folder}, or of {tempfile.gettempdir()}: free some, or set TPSERVE_HOME "
                "and TMPDIR to folders with more room"
            ) from error
        raise


def kept_folder(kind: str, key: str, policy: CachePolicy) -> Path | None:
    """Return the folder `kind`/`key` if the policy takes it from the cache; None if it is to be built.

    Raises
    ------
    CacheError
        If the policy is READONLY and the folder is missing.
    """
    folder = cache_root() / kind / key
    if policy in (CachePolicy.OFF, CachePolicy.REDO):
        return None
    if folder.is_dir():
        logger.info("Using cached %s: %s", kind, folder)
        return folder
    if policy is CachePolicy.READONLY:
        raise CacheError(f"{folder} is not in the cache and the cache policy is READONLY: use ON, or build it first")
    return None


def cached_folder(kind: str, key: str, policy: CachePolicy, build: Callable[[Path], None]) -> Path:
    """Return the folder `kind`/`key`, building it if the policy asks for it.

    A folder appears whole or not at all: it is built beside its place and renamed, so that a killed or concurrent
    build never leaves a half one.

    Parameters
    ----------
    build : callable
        Fills the empty folder it is given.

    Raises
    ------
    CacheError
        If the policy is READONLY and the folder is missing.
    """
    kept = kept_folder(kind, key, policy)
    if kept is not None:
        return kept
    parent = cache_root() / kind
    folder = parent / key
    if policy is CachePolicy.OFF:
        fresh = Path(tempfile.mkdtemp(prefix=f"tpserve-{kind}-"))
        try:
            with told_if_full(fresh):
                build(fresh)
        except BaseException:
            shutil.rmtree(fresh)
            raise
        return fresh
    parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{key[:16]}-", dir=parent))
    old = fresh.with_name(f"{fresh.name}-old")
    try:
        with told_if_full(fresh):
            build(fresh)
        if policy is CachePolicy.REDO:
            # Moved aside first: removing takes many steps, and nobody must find the folder between them.
            with suppress(FileNotFoundError):
                folder.rename(old)
        _put(fresh, folder)
    finally:
        for left in (fresh, old):
            if left.is_dir():
                shutil.rmtree(left)
    return folder


def _put(fresh: Path, folder: Path) -> None:
    """Give a folder its name, unless another process has put the same one there first."""
    while True:
        try:
            fresh.rename(folder)
            return
        except OSError as error:
            if error.errno not in (EEXIST, ENOTEMPTY):
                raise
            if folder.is_dir():
                return
            # One that builds it again has just moved it aside.
