from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tvm  # noqa: F401  # whole, before a test of the worker loads the runtime alone
import tvm_ffi

from rank_group import Artifacts
from shared_cache import as_cache
from tpserve.compile.artifact import kernel_library
from tpserve.compile.cache import CachePolicy


@pytest.fixture(scope="session")
def kernels(artifacts: Artifacts) -> Callable[[str], Any]:
    """The built kernels, by the last part of their global name."""
    with as_cache(artifacts.home):
        module = tvm_ffi.load_module(str(kernel_library("llvm", CachePolicy.ON)))
    return lambda name: module[name]


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Compiles into the cache that all tests of this session share, so that kernels are built once."""
    return Artifacts(tmp_path_factory.getbasetemp() / "artifacts")
