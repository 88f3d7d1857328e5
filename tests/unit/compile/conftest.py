from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tvm  # noqa: F401  # whole, before a test of the worker loads the runtime alone
import tvm_ffi

from rank_group import Artifacts
from tpserve.compile import native


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The built kernels, by the last part of their global name."""
    path: Path = tmp_path_factory.mktemp("kernels") / "kernels.so"
    native.build_library(native.CPU_KERNEL_SOURCES, path)
    module = tvm_ffi.load_module(str(path))
    return lambda name: module[name]


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Compiles into the cache that all tests of this session share, so that kernels are built once."""
    return Artifacts(tmp_path_factory.getbasetemp() / "artifacts")
