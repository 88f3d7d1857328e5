"""Caches of tests: each session's own, but for CPU kernels, which a checkout builds once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1] / ".cache/tests/kernels"
"""By the hash of their sources, flags and compiler, as in every cache."""


def new_home(home: Path) -> Path:
    """Make a cache that has the checkout's kernels and nothing else."""
    home.mkdir(parents=True, exist_ok=True)
    KERNELS.mkdir(parents=True, exist_ok=True)
    if not (home / "kernels").exists():
        (home / "kernels").symlink_to(KERNELS)
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
