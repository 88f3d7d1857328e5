"""Caches of tests: each session's own, but for CPU kernels and converted models, which a checkout makes once.

Run as a program it builds the kernels: sessions that start at one time would each do it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SHARED = Path(__file__).resolve().parents[1] / ".cache/tests"
_KINDS = ("kernels", "model")
"""Each by the hash of what it is made of and by what, as in every cache."""


def new_home(home: Path) -> Path:
    """Make a cache that has the checkout's kernels and converted models, and nothing else."""
    home.mkdir(parents=True, exist_ok=True)
    for kind in _KINDS:
        (_SHARED / kind).mkdir(parents=True, exist_ok=True)
        if not (home / kind).exists():
            (home / kind).symlink_to(_SHARED / kind)
    return home


@contextmanager
def as_cache(home: Path) -> Iterator[None]:
    """Let `home` be the cache of this process for a while."""
    before = os.environ.get("TPSERVE_HOME")
    os.environ["TPSERVE_HOME"] = str(home)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TPSERVE_HOME"]
        else:
            os.environ["TPSERVE_HOME"] = before


def _build_kernels() -> None:
    from tpserve.compile.artifact import kernel_library
    from tpserve.compile.cache import CachePolicy

    with tempfile.TemporaryDirectory() as folder, as_cache(new_home(Path(folder))):
        kernel_library("llvm", CachePolicy.ON)


if __name__ == "__main__":
    _build_kernels()
