"""gate_up's product that ends in SiLU(gate) * up, and the next, which takes it: against float64 and plain twins."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np
import pytest

from gpu.device import BF16, FP8, DeviceArray, poisoned, random_bf16, random_fp8, relative_error
from gpu.gemm_operands import Kernels, pack, padded, rows_of, uniform
from tpserve.proto import packing

pytestmark = pytest.mark.gpu

ALL_M = [1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 96, 97, 128, 129, 200]
MANY_M = [256, 300, 384, 513]
FUSED_FP8 = 16


def interleaved(rows: Any) -> Any:
    """Gate then up, along the first dimension, in the order of the weight."""
    size = packing.INTERLEAVE
    gate, up = cupy.split(rows, 2)
    turns = [part.reshape(-1, size, *rows.shape[1:]) for part in (gate, up)]
    return cupy.stack(turns, 1).reshape(rows.shape)


def packed_gate_up(kernels: Kernels, weight: DeviceArray) -> DeviceArray:
    return pack(kernels, DeviceArray(interleaved(weight.bits), weight.dtype))


def float32(values: Any) -> DeviceArray:
    return DeviceArray(values.astype(cupy.float32), np.float32)


def activated(gate_up: Any) -> Any:
    """(M, 2F) float64, gate then up -> (M, F)."""
    gate, up = cupy.split(gate_up, 2, axis=1)
    return gate / (1 + cupy.exp(-gate)) * up


def by_element(scales: Any, num_m: int) -> Any:
    """(K / 256, 8, padded) -> (M, K): see grouped_scales.cuh."""
    num_k, flat = scales.shape[0] * 256, scales.reshape(-1)
    if num_m > 128:
        return cupy.broadcast_to(flat[:num_m, None], (num_m, num_k))
    size = 32 if num_m <= FUSED_FP8 else 128
    given = flat[: num_k // size * padded(num_m)].reshape(num_k // size, -1)[:, :num_m].T
    return cupy.repeat(given, size, axis=1)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("size", "num_k"), [(32, 64), (64, 256), (96, 576), (1536, 576), (3584, 4096), (7168, 8192), (14336, 4096)]
)
def test_bf16(kernels: Kernels, size: int, num_k: int, bias: bool) -> None:
    x, weight = random_bf16((max(MANY_M), num_k), 1.0, 1), random_bf16((2 * size, num_k), num_k**-0.5, 2)
    packed, added = packed_gate_up(kernels, weight), uniform(2 * size, 3)
    ordered = float32(interleaved(added.bits))
    product = x.float64() @ weight.float64().T + (added.float64() if bias else 0.0)
    expected = activated(product)
    inputs = (packed, ordered) if bias else (packed,)
    suffix = "_bias" if bias else ""
    for num_m in (*ALL_M, *MANY_M):
        part = rows_of(x, num_m)
        plain, twin = poisoned((num_m, 2 * size), BF16), poisoned((num_m, size), BF16)
        kernels(f"gemm{suffix}")(part, *inputs, plain)
        kernels("silu_mul_interleaved")(plain, twin)
        for _ in range(2):
            out = poisoned((num_m + 1, size), BF16)
            kernels(f"gemm_silu_mul{suffix}")(part, *inputs, rows_of(out, num_m))
            assert bool((out.bits[num_m] == 0xFFFF).all())
            assert bool((out.bits[:num_m] == twin.bits).all()), (num_m, size, num_k)
            error = relative_error(out.float64()[:num_m], expected[:num_m])
            assert error < 8e-3, (num_m, size, num_k, error)


class Layer:
    """e4m3 gate_up and down, whose activations are about 1."""

    def __init__(self, kernels: Kernels, size: int, num_k: int, num_n: int) -> None:
        self.x, self.gate_up = random_fp8((max(ALL_M), num_k), 1), random_fp8((2 * size, num_k), 2)
        self.packed = packed_gate_up(kernels, self.gate_up)
        self.tokens = uniform(max(ALL_M), 3)
        spread = float(self.x.float64().std()) * float(self.gate_up.float64().std()) * num_k**0.5
        self.channels = uniform(2 * size, 4, 2.0 / spread)
        self.bias = uniform(2 * size, 5)
        self.down = random_fp8((num_n, size), 6)
        self.packed_down, self.down_channels = pack(kernels, self.down), uniform(num_n, 7)

    def activations(self, *, bias: bool) -> Any:
        product = self.x.float64() @ self.gate_up.float64().T
        product *= self.tokens.float64()[:, None] * self.channels.float64()
        return activated(product + (self.bias.float64() if bias else 0.0))


def run_gate_up(
    kernels: Kernels, layer: Layer, num_m: int, *, bias: bool
) -> tuple[DeviceArray, DeviceArray, DeviceArray]:
    """Return the values, (M + 1, F) with a guard behind, their scales and the scratch."""
    size = layer.down.shape[1]
    out, scales = poisoned((num_m + 1, size), FP8), poisoned((size // 256, 8, padded(num_m)), np.float32)
    scratch = poisoned((num_m, 2 * size), BF16)
    inputs = [rows_of(layer.x, num_m), rows_of(layer.tokens, num_m), layer.packed]
    inputs.append(float32(interleaved(layer.channels.bits)))
    if bias:
        inputs.append(float32(interleaved(layer.bias.bits)))
    name = "gemm_fp8_silu_mul_bias" if bias else "gemm_fp8_silu_mul"
    kernels(name)(*inputs, scratch, rows_of(out, num_m), scales)
    return out, scales, scratch


def run_twin(kernels: Kernels, layer: Layer, num_m: int, *, bias: bool) -> tuple[DeviceArray, DeviceArray]:
    size = layer.down.shape[1]
    plain, out = poisoned((num_m, 2 * size), BF16), poisoned((num_m, size), FP8)
    scales = poisoned((size // 256, 8, padded(num_m)), np.float32)
    inputs = [rows_of(layer.x, num_m), rows_of(layer.tokens, num_m), layer.packed]
    inputs.append(float32(interleaved(layer.channels.bits)))
    if bias:
        inputs.append(float32(interleaved(layer.bias.bits)))
    kernels("gemm_fp8_bias" if bias else "gemm_fp8")(*inputs, plain)
    kernels("silu_mul_grouped")(plain, out, scales)
    return out, scales


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("size", "num_k"), [(256, 256), (512, 1280), (3584, 4096), (7168, 8192), (14336, 4096)])
def test_e4m3(kernels: Kernels, size: int, num_k: int, bias: bool) -> None:
    num_n = 1024
    layer = Layer(kernels, size, num_k, num_n)
    expected = layer.activations(bias=bias)
    after = expected @ layer.down.float64().T * layer.down_channels.float64()
    for num_m in ALL_M:
        twin, twin_scales = run_twin(kernels, layer, num_m, bias=bias)
        for _ in range(2):
            out, scales, scratch = run_gate_up(kernels, layer, num_m, bias=bias)
            assert bool((out.bits[num_m] == 0xFF).all())
            assert bool((out.bits[:num_m] == twin.bits).all()), (num_m, size, num_k)
            assert bool((scales.bits == twin_scales.bits).all()), (num_m, size, num_k)
            untouched = bool((scratch.bits == 0xFFFF).all())
            assert untouched == (num_m <= FUSED_FP8)
            found = out.float64()[:num_m] * by_element(scales.float64(), num_m)
            error = relative_error(found, expected[:num_m])
            assert error < 4e-2, (num_m, size, num_k, error)
            if num_m <= 128:  # the largest of each group is the largest code
                codes = abs(out.float64()[:num_m]).reshape(num_m, -1, 32 if num_m <= FUSED_FP8 else 128)
                assert bool((codes.max(2) == 448).all())
        result = poisoned((num_m, num_n), BF16)
        kernels("gemm_fp8_after_silu")(rows_of(out, num_m), scales, layer.packed_down, layer.down_channels, result)
        error = relative_error(result.float64(), after[:num_m])
        assert error < 4.5e-2, (num_m, size, num_k, error)


@pytest.mark.parametrize(("size", "num_k"), [(3584, 4096), (7168, 8192), (14336, 4096)])
def test_groups_of_32_are_no_worse_than_groups_of_128(kernels: Kernels, size: int, num_k: int) -> None:
    num_m, num_n = 32, 4096
    layer = Layer(kernels, size, num_k, num_n)
    expected = layer.activations(bias=False)[:num_m] @ layer.down.float64().T * layer.down_channels.float64()
    out, scales, _ = run_gate_up(kernels, layer, num_m, bias=False)
    fine, coarse = poisoned((num_m, num_n), np.float32), poisoned((num_m, num_n), np.float32)
    kernels("gemm_fp8_after_silu")(rows_of(out, num_m), scales, layer.packed_down, layer.down_channels, fine)
    activations = DeviceArray(
        (layer.activations(bias=False)[:num_m].astype(cupy.float32).view(cupy.uint32) >> 16).astype(cupy.uint16), BF16
    )
    values, groups = poisoned((num_m, size), FP8), poisoned((size // 256, 2, padded(num_m)), np.float32)
    kernels("quantize_fp8_grouped")(activations, values, groups)
    kernels("gemm_fp8_grouped")(values, groups, layer.packed_down, layer.down_channels, coarse)
    errors = [relative_error(found.float64(), expected) for found in (fine, coarse)]
    assert errors[0] < 1.05 * errors[1] < 5e-2, errors


@pytest.mark.parametrize("num_m", [1, 8, 13, 16])
def test_zeros_huge_values_and_nan(kernels: Kernels, num_m: int) -> None:
    size, num_k = 512, 512
    layer = Layer(kernels, size, num_k, 64)
    layer.channels.bits[:32] = 0.0  # gates of the first group
    layer.channels.bits[size + 40] *= 1e30  # an up of the second
    layer.channels.bits[70] = cupy.nan  # a gate of the third
    out, scales, _ = run_gate_up(kernels, layer, num_m, bias=False)
    twin, twin_scales = run_twin(kernels, layer, num_m, bias=False)
    assert bool((out.bits[:num_m] == twin.bits).all())
    assert bool((scales.bits == twin_scales.bits).all())
    values, groups = out.float64()[:num_m], scales.float64().reshape(size // 32, -1)[:, :num_m]
    assert not bool(values[:, :32].any())
    assert relative_error(groups[0], np.full(num_m, 1e-12 / 448)) < 1e-6
    assert bool((abs(values[:, 40]) == 448).all())
    assert bool((groups[1] > 1e20).all())
    assert np.argwhere(cupy.isnan(values).get()).tolist() == [[m, 70] for m in range(num_m)]
    assert bool(cupy.isfinite(groups).all())


@pytest.mark.parametrize(
    ("num_n", "num_k"), [(64, 256), (200, 768), (1000, 1280), (4096, 3584), (8192, 7168), (4096, 14336)]
)
def test_products_with_the_scales_of_silu(kernels: Kernels, num_n: int, num_k: int) -> None:
    """Scales that differ by two orders of magnitude from group to group and from token to token."""
    x, weight = random_fp8((max(ALL_M), num_k), 1), random_fp8((num_n, num_k), 2)
    packed, channels, bias = pack(kernels, weight), uniform(num_n, 3), uniform(num_n, 4)
    for num_m in ALL_M:
        rng = cupy.random.RandomState(num_m)
        given = (10.0 ** rng.uniform(-1, 1, (num_k // 256, 8, padded(num_m)))).astype(cupy.float32)
        part = rows_of(x, num_m)
        exact = (
            (part.float64() * by_element(given.astype(cupy.float64), num_m)) @ weight.float64().T * channels.float64()
        )
        groups = num_k // (32 if num_m <= FUSED_FP8 else 128)
        flat = given.reshape(-1)
        if num_m > 128:
            flat[num_m:] = cupy.nan  # what nothing may read
        else:
            flat[: groups * padded(num_m)].reshape(groups, -1)[:, num_m:] = cupy.nan  # of tokens that are not there
            flat[groups * padded(num_m) :] = cupy.nan
        scales = DeviceArray(given, np.float32)
        for repeat in range(2):
            out = poisoned((num_m + 1, num_n), BF16)
            kernels("gemm_fp8_after_silu")(part, scales, packed, channels, rows_of(out, num_m))
            error = relative_error(out.float64()[:num_m], exact)
            assert error < 4e-3, (num_m, num_n, num_k, repeat, error)
            assert bool((out.bits[num_m] == 0xFFFF).all())
        wide = poisoned((num_m, num_n), np.float32)
        kernels("gemm_fp8_after_silu_bias")(part, scales, packed, channels, bias, wide)
        assert relative_error(wide.float64(), exact + bias.float64()) < (5e-4 if num_m <= 128 else 4e-3)


def test_rows_do_not_depend_on_their_neighbours(kernels: Kernels) -> None:
    layer = Layer(kernels, 3584, 4096, 4096)
    whole = {}
    for num_m in (32, 17, 25, 31):
        out, scales, _ = run_gate_up(kernels, layer, num_m, bias=False)
        result = poisoned((num_m, 4096), BF16)
        kernels("gemm_fp8_after_silu")(rows_of(out, num_m), scales, layer.packed_down, layer.down_channels, result)
        whole[num_m] = result.bits
        assert bool((result.bits == whole[32][:num_m]).all())


@pytest.mark.parametrize("num_m", [1, 8, 16, 32, 40])
def test_captured_layers_follow_each_other(kernels: Kernels, stream: Any, num_m: int) -> None:
    """A chain of layers in a graph, each overlapping the next, gives the eager chain's bits, replay after replay."""
    size, hidden = 3584, 1024
    layer = Layer(kernels, size, hidden, hidden)
    gate_up = float32(interleaved(layer.channels.bits))
    norm = uniform(hidden, 8)
    buffers = [
        {
            "scratch": poisoned((num_m, 2 * size), BF16),
            "act": poisoned((num_m, size), FP8),
            "scales": poisoned((size // 256, 8, padded(num_m)), np.float32),
            "out": poisoned((num_m, hidden), BF16),
            "x": poisoned((num_m, hidden), FP8),
            "tokens": poisoned((num_m,), np.float32),
        }
        for _ in range(8)
    ]

    def chain() -> None:
        x, tokens = rows_of(layer.x, num_m), rows_of(layer.tokens, num_m)
        for b in buffers:
            kernels("gemm_fp8_silu_mul")(x, tokens, layer.packed, gate_up, b["scratch"], b["act"], b["scales"])
            kernels("gemm_fp8_after_silu")(b["act"], b["scales"], layer.packed_down, layer.down_channels, b["out"])
            kernels("rms_norm_fp8")(b["out"], norm, 1e-5, b["x"], b["tokens"])
            x, tokens = b["x"], b["tokens"]

    chain()
    eager = buffers[-1]["out"].bits.copy()
    assert bool(cupy.isfinite(buffers[-1]["out"].float64()).all())
    stream.begin_capture()
    chain()
    graph = stream.end_capture()
    for _ in range(20):
        for b in buffers:
            b["out"].bits.fill(0xFFFF)
            b["act"].bits.fill(0xFF)
        graph.launch(stream)
        assert bool((buffers[-1]["out"].bits == eager).all())


def test_wrong_arguments_are_named(kernels: Kernels) -> None:
    x, weight = random_bf16((2, 64)), packed_gate_up(kernels, random_bf16((96, 64)))
    with pytest.raises(ValueError, match="F is 48, expected a multiple of 32"):
        kernels("gemm_silu_mul")(x, weight, poisoned((2, 48), BF16))
    weight = packed_gate_up(kernels, random_bf16((64, 64)))
    with pytest.raises(ValueError, match=r"out has shape \(3, 32\), expected \(2, 32\)"):
        kernels("gemm_silu_mul")(x, weight, poisoned((3, 32), BF16))
    layer = Layer(kernels, 256, 256, 64)
    scales = poisoned((1, 2, 8), np.float32)
    with pytest.raises(ValueError, match=r"scales has shape \(1, 2, 8\), expected \(1, 8, 8\)"):
        kernels("gemm_fp8_after_silu")(
            DeviceArray(random_fp8((2, 256)).bits, FP8),
            scales,
            layer.packed_down,
            layer.down_channels,
            poisoned((2, 64), BF16),
        )
