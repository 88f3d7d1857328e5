"""Arrays on the device with types that CuPy does not have, passed to kernels without a copy."""

from __future__ import annotations

import ctypes
from typing import Any

import cupy
import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)

_CODES = {BF16: (4, 16), FP8: (10, 8)}  # DLPack: kDLBfloat, kDLFloat8_e4m3fn
_KINDS = {"i": 0, "u": 1, "f": 2}


class _Managed(ctypes.Structure):
    """A DLManagedTensor."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class DeviceArray:
    """A contiguous array on the current device; must outlive every call that takes it.

    Parameters
    ----------
    bits
        A CuPy array of the same item size, or of the type itself.
    dtype
        What the bits mean.
    """

    def __init__(self, bits: Any, dtype: Any) -> None:
        self.bits = cupy.ascontiguousarray(bits)
        self.dtype = np.dtype(dtype)
        self.shape = self.bits.shape
        code, width = _CODES.get(self.dtype, (_KINDS.get(self.dtype.kind, 0), self.dtype.itemsize * 8))
        self._shape = (ctypes.c_int64 * len(self.shape))(*self.shape)
        self._managed = _Managed(
            data=self.bits.data.ptr,
            device_type=2,
            device_id=self.bits.device.id,
            ndim=len(self.shape),
            code=code,
            bits=width,
            lanes=1,
            shape=self._shape,
        )

    def __dlpack__(self, **_: Any) -> Any:
        return _new_capsule(ctypes.addressof(self._managed), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, int(self.bits.device.id)

    def host(self) -> Array:
        """Copy to the host."""
        values: Array = self.bits.get()
        return values.view(self.dtype)

    def float64(self) -> Any:
        """Widen on the device."""
        if self.dtype == BF16:
            return (self.bits.astype(cupy.uint32) << 16).view(cupy.float32).astype(cupy.float64)
        if self.dtype == FP8:
            table = cupy.asarray(np.arange(256, dtype=np.uint8).view(FP8).astype(np.float64))
            return table[self.bits]
        return self.bits.view(self.dtype).astype(cupy.float64)


def to_device(array: Array) -> DeviceArray:
    """Copy a host array of any type."""
    array = np.ascontiguousarray(array)
    bits = {2: np.uint16, 1: np.uint8}[array.itemsize] if array.dtype in (BF16, FP8) else array.dtype
    return DeviceArray(cupy.asarray(array.view(bits)), array.dtype)


def poisoned(shape: tuple[int, ...], dtype: Any) -> DeviceArray:
    """Return NaNs (integers: -1)."""
    dtype = np.dtype(dtype)
    unsigned = {1: cupy.uint8, 2: cupy.uint16, 4: cupy.uint32, 8: cupy.uint64}[dtype.itemsize]
    return DeviceArray(cupy.full(shape, np.iinfo(np.dtype(unsigned)).max, unsigned), dtype)


def random_bf16(shape: tuple[int, ...], scale: float = 1.0, seed: int = 0) -> DeviceArray:
    """Normal values, made on the device."""
    values = cupy.random.RandomState(seed).standard_normal(shape, dtype=cupy.float32) * scale
    return DeviceArray((values.view(cupy.uint32) >> 16).astype(cupy.uint16), BF16)


def random_fp8(shape: tuple[int, ...], seed: int = 0) -> DeviceArray:
    """Finite values of all magnitudes up to 240, made on the device."""
    bits = cupy.random.RandomState(seed).randint(0, 256, shape, dtype=cupy.uint8)
    return DeviceArray(cupy.where((bits & 0x7F) > 0x77, bits & 0xBF, bits), FP8)


def relative_error(actual: Any, expected: Any) -> float:
    """||actual - expected|| / ||expected||; NaN anywhere gives NaN."""
    actual, expected = cupy.asarray(actual, cupy.float64), cupy.asarray(expected, cupy.float64)
    return float(cupy.linalg.norm(actual - expected) / cupy.linalg.norm(expected))
