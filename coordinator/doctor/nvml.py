"""NVIDIA's management library by ctypes: what it says of GPUs, without a context on any of them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

_P2P_READ, _P2P_WRITE = 0, 1
_P2P_OK = 0


class NvmlError(RuntimeError):
    """The library is there, but fails; the message is its own."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU."""

    index: int
    name: str
    capability: tuple[int, int]
    """Compute capability."""
    total_bytes: int
    used_bytes: int
    """By anybody, and by the driver."""


@dataclass(frozen=True, slots=True)
class Gpus:
    """All of a host's."""

    driver: str
    """Its version."""
    cuda: tuple[int, int]
    """Newest CUDA that the driver runs."""
    gpus: tuple[Gpu, ...]
    unreachable: tuple[tuple[int, int], ...]
    """Pairs that cannot read and write each other's memory."""


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


def read_gpus(library: str = "libnvidia-ml.so.1") -> Gpus | None:
    """Return what the driver says; None where there is none.

    Raises
    ------
    NvmlError
        If it is installed but does not work.
    """
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        return None
    _call(nvml, "nvmlInit_v2")
    try:
        count, version = ctypes.c_uint(), ctypes.c_int()
        _call(nvml, "nvmlDeviceGetCount_v2", ctypes.byref(count))
        _call(nvml, "nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(version))
        handles = [ctypes.c_void_p() for _ in range(count.value)]
        for index, handle in enumerate(handles):
            _call(nvml, "nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(handle))
        return Gpus(
            driver=_text(nvml, "nvmlSystemGetDriverVersion"),
            cuda=(version.value // 1000, version.value % 1000 // 10),
            gpus=tuple(_read_gpu(nvml, index, handle) for index, handle in enumerate(handles)),
            unreachable=tuple(
                (a, b)
                for a in range(len(handles))
                for b in range(a + 1, len(handles))
                if not _reach(nvml, handles[a], handles[b])
            ),
        )
    finally:
        nvml.nvmlShutdown()


def _read_gpu(nvml: Any, index: int, handle: ctypes.c_void_p) -> Gpu:
    major, minor, memory = ctypes.c_int(), ctypes.c_int(), _Memory()
    _call(nvml, "nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
    _call(nvml, "nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
    name = _text(nvml, "nvmlDeviceGetName", handle)
    return Gpu(index, name, (major.value, minor.value), memory.total, memory.used)


def _reach(nvml: Any, a: ctypes.c_void_p, b: ctypes.c_void_p) -> bool:
    for kind in (_P2P_READ, _P2P_WRITE):
        status = ctypes.c_int(-1)
        _call(nvml, "nvmlDeviceGetP2PStatus", a, b, kind, ctypes.byref(status))
        if status.value != _P2P_OK:
            return False
    return True


def _text(nvml: Any, function: str, *arguments: Any) -> str:
    buffer = ctypes.create_string_buffer(96)
    _call(nvml, function, *arguments, buffer, len(buffer))
    return buffer.value.decode(errors="replace")


def _call(nvml: Any, function: str, *arguments: Any) -> None:
    code = getattr(nvml, function)(*arguments)
    if code != 0:
        nvml.nvmlErrorString.restype = ctypes.c_char_p
        words = (nvml.nvmlErrorString(code) or b"").decode(errors="replace")
        raise NvmlError(f"{function}: {words or code}")
