"""A norm in e4m3 that one product begins and the next ends: against float64 and the kernels that it replaces."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np
import pytest

from gpu.begun_norm import MOST_FOLDED, BegunFp8
from gpu.device import BF16, FP8, DeviceArray, poisoned, random_bf16, random_fp8, relative_error
from gpu.gemm_operands import Kernels, pack, padded, rows_of, uniform

pytestmark = pytest.mark.gpu

ALL_M = [1, 2, 7, 8, 9, 15, 16, 17, 64, 129]
EPS = 1e-3
"""Large enough to be seen."""
GROUPS = {"": 0, "grouped": 128, "after_silu": 32}
"""Elements that share a scale of up to 16 tokens, by what the functions' names say."""


class Tokens:
    """(M, K) e4m3 with scales as a kind of product wants them, and its float64 values."""

    def __init__(self, kind: str, num_m: int, num_k: int, seed: int) -> None:
        self.values = random_fp8((num_m, num_k), seed)
        if kind == "":
            self.scale = uniform(num_m, seed + 1, 0.02)
            each: Any = self.scale.float64()[:, None]
        else:
            size = GROUPS[kind] if num_m <= MOST_FOLDED else 128
            given = cupy.full((num_k // 256, 256 // GROUPS[kind], padded(num_m)), cupy.nan, cupy.float32)
            if num_m > 128:
                scales = cupy.random.RandomState(seed + 1).uniform(0.01, 0.03, num_m).astype(cupy.float32)
                given.reshape(-1)[:num_m] = scales
                each = scales.astype(cupy.float64)[:, None]
            else:
                places = num_k // size * padded(num_m)
                scales = cupy.random.RandomState(seed + 1).uniform(0.01, 0.03, places).astype(cupy.float32)
                given.reshape(-1)[:places] = scales
                by_group = scales.reshape(num_k // size, -1)[:, :num_m].T
                each = cupy.repeat(by_group, size, axis=1).astype(cupy.float64)
            self.scale = DeviceArray(given, np.float32)
        self.float64 = self.values.float64() * each


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize(("size", "num_k"), [(256, 256), (2048, 8192), (4096, 4096), (4096, 14336)])
def test_both_ends(kernels: Kernels, size: int, num_k: int, kind: str, bias: bool) -> None:
    num_n, name = 192, f"_{kind}" if kind else ""
    weight, after = random_fp8((size, num_k), 2), random_fp8((num_n, size), 5)
    channels, after_channels = uniform(size, 6, num_k**-0.5), uniform(num_n, 7, 0.5 * size**-0.5)
    norm, added, added_after = uniform(size, 4), uniform(size, 8), uniform(num_n, 9)
    packed, packed_after = pack(kernels, weight), pack(kernels, after)
    suffix, inputs = ("_bias", [packed, channels, added]) if bias else ("", [packed, channels])
    inputs_after = [packed_after, after_channels, added_after] if bias else [packed_after, after_channels]
    for num_m in ALL_M:
        x, residual = Tokens(kind, num_m, num_k, 10 + num_m), random_bf16((num_m, size), 2.0, 3)
        begun, out = BegunFp8(num_m, size), poisoned((num_m + 1, num_n), np.float32)
        function = kernels(f"gemm_fp8{name}_add_rms_norm{suffix}")
        function(x.values, x.scale, *inputs, residual, norm, EPS, *begun.outputs)
        begun.assert_guarded()
        product = x.float64 @ weight.float64().T * channels.float64() + (added.float64() if bias else 0.0)
        assert relative_error(begun.stream.float64(), residual.float64() + product) < 8e-3, num_m
        stream = begun.stream.float64()
        factor = 1 / cupy.sqrt((stream**2).mean(1, keepdims=True) + EPS)
        expected = stream * norm.float64() * (factor if num_m > MOST_FOLDED else 1.0)
        assert relative_error(begun.weighted, expected) < 0.04, num_m
        kernels(f"gemm_fp8_normed{suffix}")(begun.out, begun.norms, *inputs_after, rows_of(out, num_m))
        assert bool((out.bits[num_m] == 0xFFFFFFFF).all())
        taken = begun.weighted * (1.0 if num_m > MOST_FOLDED else factor)
        wanted = taken @ after.float64().T * after_channels.float64() + (added_after.float64() if bias else 0.0)
        assert relative_error(out.float64()[:num_m], wanted) < 4e-3, num_m


@pytest.mark.parametrize("size", [256, 8192])
def test_the_activations_of_a_begun_norm(kernels: Kernels, size: int) -> None:
    """SiLU's end of the same product, by the plain product and the kernel that follows it: the same bits."""
    hidden = 2048
    weight, gate_up = random_fp8((hidden, 2048), 2), random_fp8((2 * size, hidden), 5)
    channels, wide_channels, norm = uniform(hidden, 6, 0.02), uniform(2 * size, 7, 0.02), uniform(hidden, 4)
    packed, packed_wide = pack(kernels, weight), pack(kernels, gate_up)
    for num_m in ALL_M:
        x, residual, begun = (
            Tokens("", num_m, 2048, num_m),
            random_bf16((num_m, hidden), 2.0, 3),
            BegunFp8(num_m, hidden),
        )
        kernels("gemm_fp8_add_rms_norm")(x.values, x.scale, packed, channels, residual, norm, EPS, *begun.outputs)
        plain = poisoned((num_m, 2 * size), BF16)
        kernels("gemm_fp8_normed")(begun.out, begun.norms, packed_wide, wide_channels, plain)
        both = []
        for fused in (True, False):
            out, scales = poisoned((num_m, size), FP8), poisoned((size // 256, 8, padded(num_m)), np.float32)
            if fused:
                scratch = poisoned((num_m, 2 * size), BF16)
                inputs = (begun.out, begun.norms, packed_wide, wide_channels, scratch)
                kernels("gemm_fp8_normed_silu_mul")(*inputs, out, scales)
            else:
                kernels("silu_mul_grouped")(plain, out, scales)
            both.append((out, scales))
        (out, scales), (twin, twin_scales) = both
        assert bool((out.bits == twin.bits).all()), num_m
        places = scales.float64().reshape(-1), twin_scales.float64().reshape(-1)
        kept = cupy.isfinite(places[1])
        assert bool((places[0][kept] == places[1][kept]).all()), num_m
