"""Tests on real devices: skipped where there are fewer than the marker asks for."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tvm_ffi

LIBRARY_VARIABLE = "TPSERVE_CUDA_KERNELS"
"""Path of a built library to test, instead of building one."""


def _count_devices() -> int:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


NUM_DEVICES = _count_devices()
collect_ignore_glob = [] if NUM_DEVICES else ["test_*.py"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("gpu"):
        wanted = marker.kwargs.get("count", 1)
        if wanted > NUM_DEVICES:
            pytest.skip(f"needs {wanted} CUDA devices, this machine has {NUM_DEVICES}")


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The CUDA kernels, by the last part of their global name."""
    from tpserve.compile import native_cuda

    given = os.environ.get(LIBRARY_VARIABLE)
    path = Path(given) if given else tmp_path_factory.mktemp("kernels") / "kernels_sm90a.so"
    if not given:
        native_cuda.build_cuda_library(native_cuda.CUDA_KERNEL_SOURCES, path)
    module = tvm_ffi.load_module(str(path))
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
