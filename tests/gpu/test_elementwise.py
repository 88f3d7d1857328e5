"""Norms, activation, row copies and quantisation against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy
import numpy as np
import pytest

from gpu.device import BF16, FP8, DeviceArray, poisoned, random_bf16, relative_error, to_device

Kernels = Callable[[str], Any]

pytestmark = pytest.mark.gpu

ROWS = [1, 3, 64, 200]
HIDDEN = [576, 4096, 8192]


def vector(size: int, seed: int = 9) -> DeviceArray:
    return DeviceArray(cupy.random.RandomState(seed).uniform(0.5, 1.5, size).astype(cupy.float32), np.float32)


def dequantised(values: DeviceArray, scale: DeviceArray) -> Any:
    return values.float64() * scale.float64()[:, None]


def norm(x: Any, weight: DeviceArray, eps: float) -> Any:
    return x / cupy.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight.float64()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_norms(kernels: Kernels, rows: int, hidden: int) -> None:
    x, residual = random_bf16((rows, hidden), 3.0, rows), random_bf16((rows, hidden), 1.0, rows + 1)
    weight, eps = vector(hidden), 1e-5
    out = poisoned((rows, hidden), BF16)
    kernels("rms_norm")(x, weight, eps, out)
    assert relative_error(out.float64(), norm(x.float64(), weight, eps)) < 3e-3
    total, normed = poisoned((rows, hidden), BF16), poisoned((rows, hidden), BF16)
    kernels("add_rms_norm")(x, residual, weight, eps, total, normed)
    assert relative_error(total.float64(), x.float64() + residual.float64()) < 3e-3
    expected = norm(total.float64(), weight, eps)
    assert relative_error(normed.float64(), expected) < 3e-3

    again, quantised, scale = (
        poisoned((rows, hidden), BF16),
        poisoned((rows, hidden), FP8),
        poisoned((rows,), np.float32),
    )
    kernels("add_rms_norm_fp8")(x, residual, weight, eps, again, quantised, scale)
    assert bool((again.bits == total.bits).all())
    assert relative_error(scale.float64() * 448, abs(expected).max(-1)) < 1e-5
    assert relative_error(dequantised(quantised, scale), expected) < 4e-2
    kernels("rms_norm_fp8")(x, weight, eps, quantised, scale)
    assert relative_error(dequantised(quantised, scale), norm(x.float64(), weight, eps)) < 4e-2


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [192, 1792, 3584, 14336, 28672])
def test_activation_and_quantisation(kernels: Kernels, rows: int, size: int) -> None:
    gate_up = random_bf16((rows, 2 * size), 2.0, size)
    gate, up = cupy.split(gate_up.float64(), 2, axis=1)
    expected = gate / (1 + cupy.exp(-gate)) * up
    out = poisoned((rows, size), BF16)
    kernels("silu_mul")(gate_up, out)
    assert relative_error(out.float64(), expected) < 3e-3
    turned = poisoned((rows, size), BF16)
    kernels("silu_mul_interleaved")(interleaved(gate_up), turned)
    assert bool((turned.bits == out.bits).all())
    quantised, scale = poisoned((rows, size), FP8), poisoned((rows,), np.float32)
    kernels("silu_mul_fp8")(gate_up, quantised, scale)
    assert relative_error(dequantised(quantised, scale), expected) < 4e-2
    kernels("quantize_fp8")(out, quantised, scale)
    assert relative_error(dequantised(quantised, scale), out.float64()) < 4e-2


def padded(num_tokens: int) -> int:
    return -(-num_tokens // 8) * 8


def interleaved(gate_up: DeviceArray) -> DeviceArray:
    """(T, 2F) of gate then up -> eight of gate, eight of up, and so on."""
    turns = gate_up.bits.reshape(gate_up.shape[0], 2, -1, 8).swapaxes(1, 2)
    return DeviceArray(turns.reshape(gate_up.shape), gate_up.dtype)


def by_element(scales: DeviceArray, num_tokens: int, group: int) -> Any:
    """Grouped scales, one for each element of the rows; see grouped_scales.cuh. There may be room behind them."""
    num_k, flat = scales.shape[0] * 256, scales.float64().reshape(-1)
    if num_tokens > 128:
        return cupy.broadcast_to(flat[:num_tokens, None], (num_tokens, num_k))
    given = flat[: num_k // group * padded(num_tokens)].reshape(num_k // group, -1)
    return cupy.repeat(given[:, :num_tokens].T, group, axis=1)


@pytest.mark.parametrize("rows", [1, 3, 8, 32, 33, 64, 128, 129, 300])
@pytest.mark.parametrize("size", [256, 1792, 3584, 7168, 14336, 28672])
def test_grouped_quantisation(kernels: Kernels, rows: int, size: int) -> None:
    gate_up = random_bf16((rows, 2 * size), 2.0, size)
    gate, up = cupy.split(gate_up.float64(), 2, axis=1)
    activated = gate / (1 + cupy.exp(-gate)) * up
    x = random_bf16((rows, size), 2.0, size + 1)
    for name, source, expected, groups, group in (
        ("silu_mul_grouped", interleaved(gate_up), activated, 8, 32 if rows <= 16 else 128),
        ("quantize_fp8_grouped", x, x.float64(), 2, 128),
    ):
        values, scales = poisoned((rows, size), FP8), poisoned((size // 256, groups, padded(rows)), np.float32)
        kernels(name)(source, values, scales)
        assert relative_error(values.float64() * by_element(scales, rows, group), expected) < 4e-2
        # Each group's largest magnitude is the largest code.
        largest = abs(values.float64()).reshape(rows, -1, group if rows <= 128 else size).max(-1)
        assert bool((largest == 448).all())


def test_copied_rows(kernels: Kernels) -> None:
    table = random_bf16((1000, 4096), 1.0, 3)
    ids = to_device(np.array([5, 999, -1, 0, 1000, 5], np.int32))
    for name, arguments in (("embed", (ids, table)), ("take_rows", (table, ids))):
        out = poisoned((6, 4096), BF16)
        kernels(name)(*arguments, out)
        expected = table.bits[cupy.asarray([5, 999, 0, 0, 0, 5])]
        expected[cupy.asarray([2, 4])] = 0  # rows of padding
        assert bool((out.bits == expected).all())


def test_wrong_arguments_are_named(kernels: Kernels) -> None:
    x, weight = random_bf16((2, 64)), vector(64)
    with pytest.raises(ValueError, match=r"out has shape \(2, 72\), expected \(2, 64\)"):
        kernels("rms_norm")(x, weight, 1e-5, poisoned((2, 72), BF16))
    with pytest.raises(TypeError, match="out has dtype code 2 with 32 bits, expected bfloat16"):
        kernels("rms_norm")(x, weight, 1e-5, poisoned((2, 64), np.float32))
