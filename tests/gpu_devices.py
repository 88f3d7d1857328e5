"""How many CUDA devices this machine has, by the driver itself."""

from __future__ import annotations

import ctypes


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
