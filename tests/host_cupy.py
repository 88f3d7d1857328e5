"""What the worker takes from CuPy, in the host's memory: its modules for devices then run where there is none."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest


class HostMemory:
    """Copies from and to an array, which end before they return."""

    def __init__(self, address: int) -> None:
        self._address = address

    def copy_from_host_async(self, source: int, size: int, stream: Any) -> None:
        ctypes.memmove(self._address, source, size)

    def copy_to_host_async(self, target: int, size: int, stream: Any) -> None:
        ctypes.memmove(target, self._address, size)


class HostArray(np.ndarray[Any, Any]):
    """An array of the host that is written to, and copied, as one of a device."""

    @property
    def data(self) -> Any:
        return HostMemory(self.ctypes.data)

    def set(self, values: Any, stream: Any = None) -> None:
        self[...] = values


def host_cupy() -> ModuleType:
    module: Any = ModuleType("cupy")

    def aligned(shape: Any, dtype: Any) -> Any:
        from tpserve.worker.arrays import aligned_zeros

        return aligned_zeros(shape if isinstance(shape, tuple) else (shape,), dtype).view(HostArray)

    def full(shape: Any, value: Any, dtype: Any) -> Any:
        out = aligned(shape, dtype)
        out[...] = value
        return out

    def asarray(values: Any) -> Any:
        out = aligned(values.shape, values.dtype)
        out[...] = values
        return out

    module.zeros, module.empty, module.full, module.asarray = aligned, aligned, full, asarray
    module.arange = lambda count, dtype: asarray(np.arange(count, dtype=dtype))
    for dtype in (np.uint8, np.uint16, np.int32, np.uint32, np.int64, np.float32):
        setattr(module, dtype.__name__, dtype)
    module.cuda = SimpleNamespace(alloc_pinned_memory=bytearray)
    return module  # type: ignore[no-any-return]  # a module of no known attributes


@contextmanager
def as_cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the worker's modules for devices be imported anew, with this for CuPy."""
    for name in [name for name in sys.modules if name.startswith("tpserve.worker.device_")]:
        monkeypatch.delattr(sys.modules["tpserve.worker"], name.rpartition(".")[2], raising=False)
        monkeypatch.delitem(sys.modules, name)
    before = set(sys.modules)
    monkeypatch.setitem(sys.modules, "cupy", host_cupy())
    yield
    for name in set(sys.modules) - before:  # who wants them next may have another CuPy
        package, _, module = name.rpartition(".")
        if module.startswith("device_"):
            del sys.modules[name]
            delattr(sys.modules[package], module)
