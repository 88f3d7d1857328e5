from __future__ import annotations

from pathlib import Path

import pytest

from tpserve.compile import native


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The kernel library of collectives in shared memory, built once."""
    path: Path = tmp_path_factory.mktemp("shm") / "shm.so"
    native.build_library([path for path in native.CPU_KERNEL_SOURCES if path.name == "shm.cc"], path)
    return str(path)
