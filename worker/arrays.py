"""Host arrays as the compiled library sees them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import tvm_ffi

Array = npt.NDArray[Any]

_ALIGNMENT = 64
"""Bytes; TVM's generated code assumes it for every tensor."""


def aligned_empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Return an uninitialised array whose data TVM may load with aligned vectors."""
    return _aligned(np.empty, shape, np.dtype(dtype))


def aligned_zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Return a zeroed array whose data TVM may load with aligned vectors; what is never touched costs no memory."""
    return _aligned(np.zeros, shape, np.dtype(dtype))


def _aligned(allocate: Callable[..., Array], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    size = math.prod(shape) * dtype.itemsize
    raw = allocate(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


_BITS: dict[Any, Any] = {np.dtype(ml_dtypes.bfloat16): np.uint16, np.dtype(ml_dtypes.float8_e4m3fn): np.uint8}
"""As what numpy exports types that DLPack has and numpy's export has not."""


def as_tensor(array: Array) -> Any:
    """Return a TVM tensor over the same memory; writes through either are seen by both."""
    bits = _BITS.get(array.dtype)
    if bits is None:
        return tvm_ffi.from_dlpack(array)
    return tvm_ffi.from_dlpack(array.view(bits))._create_view(array.shape, dtype=array.dtype.name)


def as_array(tensor: Any) -> Array:
    """Return a TVM tensor's memory on the host as an array, of any type that `as_tensor` takes."""
    name = str(tensor.dtype)
    for dtype, bits in _BITS.items():
        if dtype.name == name:
            view = tensor._create_view(tensor.shape, dtype=np.dtype(bits).name)
            return np.from_dlpack(view).view(dtype)
    return np.from_dlpack(tensor)
