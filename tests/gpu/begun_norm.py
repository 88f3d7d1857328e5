"""What kernels give that begin a norm of e4m3 (gemm_norm.cuh)."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from gpu.device import BF16, FP8, poisoned
from gpu.gemm_operands import padded, rows_of

MOST_FOLDED = 16
"""Of more tokens the norm is whole, and its scales are of rows."""


class BegunFp8:
    """A residual stream with its norm begun, with a guard row behind the last token.

    `outputs`: scratch and stream (M, H) bf16, codes (M, H) e4m3, and norms (2, H / 64, M rounded up to 8) float32.
    """

    def __init__(self, num_m: int, size: int) -> None:
        self._num_m = num_m
        self.scratch = poisoned((num_m, size), BF16)
        self._stream, self._out = poisoned((num_m + 1, size), BF16), poisoned((num_m + 1, size), FP8)
        self.norms = poisoned((2, size // 64, padded(num_m)), np.float32)
        self.stream, self.out = rows_of(self._stream, num_m), rows_of(self._out, num_m)
        self.outputs = (self.scratch, self.stream, self.out, self.norms)

    def assert_guarded(self) -> None:
        assert bool((self._stream.bits[self._num_m] == 0xFFFF).all())
        assert bool((self._out.bits[self._num_m] == 0xFF).all())

    @property
    def weighted(self) -> Any:
        """(M, K) float64: of up to 16 tokens the stream times the norm's weight, of more the whole norm."""
        if self._num_m > MOST_FOLDED:
            return self.out.float64() * self.norms.float64().reshape(-1)[: self._num_m, None]
        return self.out.float64() * cupy.repeat(self.norms.float64()[0, :, : self._num_m].T, 64, axis=1)

    @property
    def squares(self) -> Any:
        return self.norms.float64()[1, :, : self._num_m]

    def same_bits(self, other: BegunFp8) -> bool:
        norms, others = (begun.norms.bits.view(cupy.uint32)[:, :, : self._num_m] for begun in (self, other))
        pairs = (self.stream.bits, other.stream.bits), (self.out.bits, other.out.bits), (norms, others)
        return all(bool((a == b).all()) for a, b in pairs)
