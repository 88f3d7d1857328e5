"""A layer's MLP in one kernel: against float64 and the two products that it is of more tokens."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np
import pytest

from gpu.begun_norm import MOST_FOLDED, BegunFp8
from gpu.device import BF16, FP8, DeviceArray, poisoned, random_bf16, random_fp8, relative_error
from gpu.gemm_operands import Kernels, pack, padded, uniform

pytestmark = pytest.mark.gpu

EPS = 1e-3
"""Large enough to be seen."""
MOST_JOINED = 8


class Layer:
    """o, whose product begins the norm that the MLP takes, and the MLP."""

    def __init__(self, kernels: Kernels, hidden: int, activations: int) -> None:
        self._kernels, self.hidden, self.activations = kernels, hidden, activations
        self.o, self.gate_up = random_fp8((hidden, 1024), 2), random_fp8((2 * activations, hidden), 5)
        self.down = random_fp8((hidden, activations), 6)
        self.packed = {name: pack(kernels, getattr(self, name)) for name in ("o", "gate_up", "down")}
        self.scales = {
            "o": uniform(hidden, 9, 0.02),
            "gate_up": uniform(2 * activations, 7, hidden**-0.5),
            "down": uniform(hidden, 8, 0.5 * activations**-0.5),
        }
        self.norm = uniform(hidden, 4)

    def begin(self, num_m: int, seed: int = 1) -> BegunFp8:
        """Return what o gives of random tokens."""
        begun = BegunFp8(num_m, self.hidden)
        x, scale = random_fp8((num_m, 1024), seed), uniform(num_m, seed + 1, 0.02)
        residual = random_bf16((num_m, self.hidden), 2.0, seed + 2)
        self._kernels("gemm_fp8_add_rms_norm")(
            x, scale, self.packed["o"], self.scales["o"], residual, self.norm, EPS, *begun.outputs
        )
        return begun

    def between(self, num_m: int) -> list[DeviceArray]:
        """What stands between two products: gate and up, activations, and their scales."""
        size = self.activations
        shapes = ((num_m, 2 * size), BF16), ((num_m, size), FP8), ((size // 256, 8, padded(num_m)), np.float32)
        return [poisoned(*shape) for shape in shapes]

    def joined(self, x: BegunFp8, num_m: int) -> BegunFp8:
        begun = BegunFp8(num_m, self.hidden)
        weights = [part[name] for name in ("gate_up", "down") for part in (self.packed, self.scales)]
        between = self.between(num_m)
        self._kernels("mlp_fp8_add_rms_norm")(
            x.out, x.norms, *weights, x.stream, self.norm, EPS, *between, *begun.outputs
        )
        return begun

    def products(self, x: BegunFp8, num_m: int) -> BegunFp8:
        begun, between = BegunFp8(num_m, self.hidden), self.between(num_m)
        self._kernels("gemm_fp8_normed_silu_mul")(
            x.out, x.norms, self.packed["gate_up"], self.scales["gate_up"], *between
        )
        self._kernels("gemm_fp8_after_silu_add_rms_norm")(
            *between[1:], self.packed["down"], self.scales["down"], x.stream, self.norm, EPS, *begun.outputs
        )
        return begun

    def expected(self, x: BegunFp8, num_m: int) -> Any:
        """(M, K) float64: the residual stream."""
        stream = x.stream.float64()
        factor = 1.0 if num_m > MOST_FOLDED else 1 / cupy.sqrt((stream**2).mean(1, keepdims=True) + EPS)
        both = (x.weighted * factor) @ self.gate_up.float64().T * self.scales["gate_up"].float64()
        both = both.reshape(num_m, -1, 2, 8)  # eight of gate, eight of up
        gate, up = both[:, :, 0], both[:, :, 1]
        activations = (gate / (1 + cupy.exp(-gate)) * up).reshape(num_m, -1)
        return stream + activations @ self.down.float64().T * self.scales["down"].float64()


@pytest.mark.parametrize(
    ("hidden", "activations"), [(2048, 8192), (2048, 6144), (2048, 2048), (3072, 8192), (4096, 4096), (4096, 8448)]
)
def test_an_mlp_is_its_two_products(kernels: Kernels, hidden: int, activations: int) -> None:
    layer = Layer(kernels, hidden, activations)
    for num_m in (1, 2, 3, 7, 8, 9, 16, 17, 64):
        x = layer.begin(num_m, num_m)
        joined, twin = layer.joined(x, num_m), layer.products(x, num_m)
        joined.assert_guarded()
        assert relative_error(joined.stream.float64(), layer.expected(x, num_m)) < 0.025, num_m
        assert relative_error(joined.stream.float64(), twin.stream.float64()) < 5e-4, num_m
        assert relative_error(joined.weighted, twin.weighted) < 2e-3, num_m
        if num_m > MOST_JOINED:
            assert joined.same_bits(twin), num_m
            continue
        squares = joined.stream.float64().reshape(num_m, -1, 64)
        wanted = (squares**2).sum(2).T
        wanted[0] += EPS * hidden
        assert relative_error(joined.squares, wanted) < 1e-5, num_m


def test_the_same_bits_again_and_again(kernels: Kernels) -> None:
    """Of other tokens in between, whose sums pass through the same places, and in graphs that start early."""
    layer = Layer(kernels, 2048, 8192)
    inputs = {num_m: layer.begin(num_m, num_m) for num_m in (1, 2, 5, 8)}
    first = {num_m: layer.joined(x, num_m) for num_m, x in inputs.items()}
    for turn in range(200):
        num_m = list(inputs)[turn % len(inputs)]
        assert layer.joined(inputs[num_m], num_m).same_bits(first[num_m]), turn


def test_a_layer_behind_a_layer(kernels: Kernels) -> None:
    """Each kernel starts before the one before has ended: a chain gives what the same calls give one by one."""
    layer = Layer(kernels, 2048, 8192)
    for num_m in (1, 8):
        x = y = layer.begin(num_m)
        chain = []
        for _ in range(20):
            x = layer.joined(x, num_m)
            chain.append(x)
        again = []
        for _ in range(20):
            y = layer.joined(y, num_m)
            cupy.cuda.get_current_stream().synchronize()
            again.append(y)
        assert all(a.same_bits(b) for a, b in zip(chain, again, strict=True)), num_m


def test_what_is_no_number_stays_so(kernels: Kernels) -> None:
    """NaN in one token ends in NaN in that one alone, and nobody waits forever for a sum that looks like none."""
    layer = Layer(kernels, 2048, 8192)
    x = layer.begin(3)
    clean = layer.joined(x, 3).stream.bits.copy()
    x.out.bits[1, 100] = 0x7F
    found = layer.joined(x, 3)
    assert bool(cupy.isnan(found.stream.float64()[1]).all())
    assert bool((found.stream.bits[::2] == clean[::2]).all())


def test_sizes_that_the_kernel_is_not_for(kernels: Kernels) -> None:
    layer = Layer(kernels, 1024, 2048)
    with pytest.raises(ValueError, match="hidden size 1024: expected 2048 to 4096"):
        layer.joined(layer.begin(1), 1)
