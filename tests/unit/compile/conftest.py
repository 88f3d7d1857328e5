from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tvm_ffi

from tpserve.compile import native


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The built kernels, by the last part of their global name."""
    path: Path = tmp_path_factory.mktemp("kernels") / "kernels.so"
    native.build_library(native.CPU_KERNEL_SOURCES, path)
    module = tvm_ffi.load_module(str(path))
    return lambda name: module[name]
