"""Tests on real devices: skipped where there are fewer than the marker asks for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tvm_ffi

from gpu.sanitize import SANITIZED_VARIABLE
from gpu_devices import NUM_DEVICES

LIBRARY_VARIABLE = "TPSERVE_CUDA_KERNELS"
"""Path of a built library to test, instead of building one."""
SANITIZED = os.environ.get(SANITIZED_VARIABLE)
"""Under compute-sanitizer: each how-manieth test runs."""


collect_ignore_glob = [] if NUM_DEVICES else ["test_*.py"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("gpu"):
        wanted = marker.kwargs.get("count", 1)
        if wanted > NUM_DEVICES:
            pytest.skip(f"needs {wanted} CUDA devices, this machine has {NUM_DEVICES}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if SANITIZED is not None:
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % int(SANITIZED)])
        items[:] = items[:: int(SANITIZED)]


@pytest.fixture(scope="session")
def kernel_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of CUDA kernels."""
    if given := os.environ.get(LIBRARY_VARIABLE):
        return Path(given)
    from tpserve.compile import native_cuda

    path = tmp_path_factory.mktemp("kernels") / "kernels_sm90a.so"
    native_cuda.build_cuda_library(native_cuda.CUDA_KERNEL_SOURCES, path)
    return path


@pytest.fixture(scope="session")
def kernels(kernel_library: Path) -> Callable[[str], Any]:
    """The CUDA kernels, by the last part of their global name."""
    if SANITIZED is not None:
        import cupy

        cupy.cuda.set_allocator(None)
    module = tvm_ffi.load_module(str(kernel_library))
    module["init_device"](0)
    return lambda name: module[name]


@pytest.fixture(autouse=True)
def stream() -> Iterator[Any]:
    """A stream that CuPy and the kernels share for a test."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", 0), stream.ptr):
        yield stream
        stream.synchronize()
