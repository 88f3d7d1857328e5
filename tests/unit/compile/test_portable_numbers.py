"""e4m3 and bfloat16 in portable kernels: codes of numbers and back, and rows quantised, to the bit."""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np
import pytest
from tvm import te
from tvm.relax.frontend.nn import Tensor, op

from portable_twins import Twin, fresh_rng
from tpserve.compile.kernels import portable_gemm
from tpserve.compile.kernels.portable_gemm import Scales
from tpserve.compile.kernels.portable_numbers import narrowed, widened
from tpserve.compile.portable_operators import PortableOperators
from tpserve.worker.arrays import Array

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def elementwise(function: object) -> Twin:
    """Compile a function of (value, type) from float32 to e4m3, or back."""
    source, target = ("float8_e4m3fn", "float32") if function is widened else ("float32", "float8_e4m3fn")

    def build(x: Tensor) -> tuple[Tensor, ...]:
        def compute(x: te.Tensor) -> te.Tensor:
            return te.compute(x.shape, lambda i: function(x[i], "float8_e4m3fn"), name=f"to_{target}")  # type: ignore[operator]

        return (op.tensor_expr_op(compute, "elementwise", [x]),)

    return Twin(build, (("n",), source), upper_bound=1 << 20)


def test_all_codes_are_widened_exactly() -> None:
    codes = np.arange(256, dtype=np.uint8).view(E4M3)
    (found,) = elementwise(widened)(codes)
    np.testing.assert_array_equal(found, codes.astype(np.float32))
    assert np.isnan(found).sum() == 2
    np.testing.assert_array_equal(np.signbit(found)[:127], False)
    np.testing.assert_array_equal(np.signbit(found)[128:255], True)


def test_floats_are_rounded_to_even_and_clipped() -> None:
    finite = np.unique(np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32))
    finite = finite[np.isfinite(finite)]
    ties = (finite[1:] + finite[:-1]) / 2
    near = [np.nextafter(ties, np.float32(sign)) for sign in (np.inf, -np.inf)]
    beyond = np.array([448.1, 460, 464, 465, 1e4, 3e38, np.inf], np.float32)
    tiny = np.array([1e-45, 1e-40, 2.0**-10, 2.0**-11, 0.0], np.float32)
    any_bits = fresh_rng().integers(0, 1 << 32, 1 << 18, dtype=np.uint32).view(np.float32)
    common = fresh_rng().standard_normal(1 << 16, dtype=np.float32) * 50
    values = np.concatenate([finite, ties, *near, beyond, -beyond, tiny, -tiny, any_bits, common, [np.float32(np.nan)]])
    (found,) = elementwise(narrowed)(values.astype(np.float32))
    with np.errstate(invalid="ignore"):
        expected = np.clip(values, -448, 448).astype(E4M3)
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(found.view(np.uint8)[numbers], expected.view(np.uint8)[numbers])
    assert np.isnan(found[~numbers].astype(np.float32)).all()
    assert np.isnan(values[-1])


def test_bfloat16_is_rounded_within_a_function_too() -> None:
    """The cast back is fused with the rounding: casts alone would cancel each other."""
    rng = fresh_rng()
    values = rng.integers(0, 1 << 32, (64, 1024), dtype=np.uint32).view(np.float32)
    operators = PortableOperators("bfloat16")

    def build(x: Tensor) -> tuple[Tensor, ...]:
        stored = operators._stored(x)
        return stored, op.multiply(stored.astype("float32"), stored.astype("float32"))

    with np.errstate(all="ignore"):
        expected = values.astype(ml_dtypes.bfloat16)
        wide = expected.astype(np.float32)
        found, squares = Twin(build, (("T", 1024), "float32"))(values)
        numbers = ~np.isnan(values)
        np.testing.assert_array_equal(found.view(np.uint16)[numbers], expected.view(np.uint16)[numbers])
        np.testing.assert_array_equal(squares, wide * wide)


@cache
def quantizer(columns: int, scales: Scales) -> Twin:
    operators = PortableOperators("bfloat16", quantize=True)

    def build(x: Tensor) -> tuple[Tensor, ...]:
        out = operators._quantized(x, scales)
        assert out.scale is not None
        return out.values, out.scale

    return Twin(build, (("T", columns), "float32"))


def quantized(x: Array, scales: Scales) -> tuple[Array, Array]:
    """Return the codes and scale of each element, by the rule of `kernels/cuda/grouped_scales.cuh`."""
    tokens, columns = x.shape
    group = columns
    if scales == "grouped" and tokens <= 128:
        group = 128
    elif scales == "silu" and tokens <= 128:
        group = 32 if tokens <= 16 else 128
    elif scales == "grouped":
        x = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    groups = x.reshape(tokens, columns // group, group)
    largest = np.fmax(np.fmax.reduce(np.abs(groups), axis=-1, keepdims=True), np.float32(1e-12))
    with np.errstate(invalid="ignore"):
        codes = np.clip(groups * (np.float32(448) / largest), -448, 448).astype(E4M3)
    by_element = np.broadcast_to(largest / np.float32(448), groups.shape)
    return codes.reshape(x.shape), by_element.reshape(x.shape)


@pytest.mark.parametrize("scales", ["row", "grouped", "silu"])
@pytest.mark.parametrize("columns", [256, 1792, 4096])
@pytest.mark.parametrize("tokens", [0, 1, 3, 32, 33, 128, 129, 300])
def test_rows_are_quantised_to_the_bit(columns: int, tokens: int, scales: Scales) -> None:
    rng = fresh_rng()
    x = rng.standard_normal((tokens, columns), dtype=np.float32)
    x *= np.exp(rng.uniform(-5, 5, (tokens, columns // 32))).astype(np.float32).repeat(32, axis=1)
    if tokens:
        x[-1] = 0.0
    codes, found_scales = quantizer(columns, scales)(x)
    expected, by_element = quantized(x, scales)
    np.testing.assert_array_equal(codes.view(np.uint8), expected.view(np.uint8))
    size = portable_gemm.scale_size(columns, scales)
    np.testing.assert_array_equal(found_scales.repeat(size, axis=1), by_element)


@pytest.mark.parametrize("scales", ["row", "grouped", "silu"])
def test_a_nan_stays_and_spoils_no_other_element(scales: Scales) -> None:
    x = fresh_rng().standard_normal((3, 256), dtype=np.float32)
    x[1, 77] = np.nan
    codes, _ = quantizer(256, scales)(x)
    expected, _ = quantized(x, scales)
    np.testing.assert_array_equal(codes.astype(np.float32), expected.astype(np.float32))
    assert np.argwhere(np.isnan(codes.astype(np.float32))).tolist() == [[1, 77]]
