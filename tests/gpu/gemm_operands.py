"""What tests of GEMMs make their operands with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy
import numpy as np

from gpu.device import DeviceArray, poisoned
from tpserve.proto import packing

Kernels = Callable[[str], Any]


def padded(num_tokens: int) -> int:
    """Places of so many tokens that stand side by side."""
    return -(-num_tokens // 8) * 8


def pack(kernels: Kernels, weight: DeviceArray) -> DeviceArray:
    """(N, K) as the GEMMs read it."""
    packed = poisoned(packing.packed_shape(weight.shape[0], weight.shape[1], weight.dtype.itemsize), weight.dtype)
    kernels("pack_weight")(weight, packed)
    return packed


def uniform(size: int, seed: int, scale: float = 1.0) -> DeviceArray:
    """(size,) float32 in [0.5, 1.5) times `scale`."""
    values = cupy.random.RandomState(seed).uniform(0.5, 1.5, size) * scale
    return DeviceArray(values.astype(cupy.float32), np.float32)


def rows_of(array: DeviceArray, count: int) -> DeviceArray:
    """The first rows, in place."""
    return DeviceArray(array.bits[:count], array.dtype)
