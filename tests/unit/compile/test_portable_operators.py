"""Portable GEMMs, norms and activation against float64, with bfloat16 activations and with e4m3 rows and weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from tvm.relax.frontend.nn import Tensor

from portable_twins import (
    BF16,
    BF16_ERROR,
    E4M3,
    Spec,
    Twin,
    by_element,
    check_quantized,
    fresh_rng,
    panels,
    random_bf16,
    relative_error,
)
from tpserve.compile.kernels import portable_gemm
from tpserve.compile.kernels.portable_gemm import Scales
from tpserve.compile.operators import GemmInput, GemmWeight, Norm
from tpserve.compile.portable_operators import PortableOperators
from tpserve.worker.arrays import Array

F32_ERROR = 2e-6
"""Of a sum of one product, relative."""
EPS = 1e-5

PLAIN, QUANTIZED = PortableOperators("bfloat16"), PortableOperators("bfloat16", quantize=True)


def random_e4m3(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Every finite code is as likely as any other up to 240, as weights and activations never are."""
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    return np.where((codes & 0x7F) > 0x77, codes & 0xBF, codes).view(E4M3)


@cache
def gemm(rows: int, columns: int, scales: Scales | None, bias: bool, dtype: str) -> Twin:
    """Compile x, its scales, the weight, its scales, the bias -> (T, rows) of `dtype`, without what there is not."""
    stored = "float8_e4m3fn" if scales else "bfloat16"
    inputs: list[Spec] = [(("T", columns), stored), ((rows // 16, columns, 16), stored)]
    if scales:
        inputs.insert(1, (("T", columns // portable_gemm.scale_size(columns, scales)), "float32"))
        inputs.append(((rows,), "float32"))
    if bias:
        inputs.append(((rows,), "float32"))

    def build(*given: Tensor) -> tuple[Tensor, ...]:
        rest, added = (given[:-1], given[-1]) if bias else (given, None)
        if scales:
            x, weight = GemmInput(rest[0], rest[1], scales), GemmWeight(rest[2], rest[3])
            return (QUANTIZED.gemm(x, weight, added, rows, dtype),)
        return (PLAIN.gemm(GemmInput(rest[0]), GemmWeight(rest[1]), added, rows, dtype),)

    return Twin(build, *inputs)


def check_gemm(tokens: int, rows: int, columns: int, scales: Scales | None, bias: bool, dtype: str) -> None:
    rng = fresh_rng()
    added = rng.standard_normal(rows, dtype=np.float32)
    if scales is None:
        x, weight = random_bf16(rng, (tokens, columns)), random_bf16(rng, (rows, columns), columns**-0.5)
        given = [x, panels(weight)]
        exact = x.astype(np.float64) @ weight.astype(np.float64).T
    else:
        x, weight = random_e4m3(rng, (tokens, columns)), random_e4m3(rng, (rows, columns))
        num_scales = columns // portable_gemm.scale_size(columns, scales)
        row_scales = np.exp(rng.uniform(-3, 3, (tokens, num_scales))).astype(np.float32)
        channels = rng.uniform(0.5, 1.5, rows).astype(np.float32)
        given = [x, row_scales, panels(weight), channels]
        exact = (x.astype(np.float64) * by_element(row_scales, columns)) @ weight.astype(np.float64).T * channels
    if bias:
        given.append(added)
        exact = exact + added
    (out,) = gemm(rows, columns, scales, bias, dtype)(*given)
    assert out.shape == (tokens, rows)
    assert out.dtype == np.dtype(dtype)
    if tokens:
        # Sums are float32 in one order: their error grows with the root of their length.
        assert relative_error(out, exact) < (BF16_ERROR if dtype == "bfloat16" else F32_ERROR * columns**0.5)


KINDS: list[Any] = [pytest.param(kind, id=kind or "bf16") for kind in (None, "row", "grouped", "silu")]


@pytest.mark.parametrize("scales", KINDS)
@pytest.mark.parametrize("tokens", [0, 1, 3, 33, 129])
def test_products(tokens: int, scales: Scales | None) -> None:
    check_gemm(tokens, 80, 768, scales, bias=False, dtype="bfloat16")
    check_gemm(tokens, 80, 768, scales, bias=True, dtype="float32")


def llama_columns() -> list[int]:
    """K of every product of Llama-3 8B and 70B on one rank of 1, 2, 4 and 8."""
    sizes = {4096, 8192}
    for heads, ffn in ((32, 14336), (64, 28672)):
        sizes |= {columns // tp for columns in (heads * 128, ffn) for tp in (1, 2, 4, 8)}
    return sorted(sizes)


@pytest.mark.parametrize("scales", KINDS)
@pytest.mark.parametrize("columns", llama_columns())
def test_sums_as_long_as_llamas(columns: int, scales: Scales | None) -> None:
    """Of few channels, each of which is a sum of its own; GPU tests have all of them."""
    check_gemm(2, 48, columns, scales, bias=False, dtype="bfloat16")


@pytest.mark.parametrize("scales", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(768, 4096), (4096, 512), (3584, 4096), (4096, 1792)])
def test_whole_products_of_8b_on_8_ranks(rows: int, columns: int, scales: Scales | None) -> None:
    check_gemm(1, rows, columns, scales, bias=False, dtype="bfloat16")


def normed(x: Array, weight: Array) -> Array:
    x = x.astype(np.float64)
    out: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight
    return out


@pytest.mark.parametrize("tokens", [0, 1, 7, 200])
@pytest.mark.parametrize("hidden", [576, 4096, 8192])
def test_norms(tokens: int, hidden: int) -> None:
    rng = fresh_rng()
    x, weight = random_bf16(rng, (tokens, hidden), 3.0), rng.uniform(0.5, 1.5, hidden).astype(np.float32)

    def build(operators: PortableOperators) -> Callable[..., tuple[Tensor, ...]]:
        def norm(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            out = operators.rms_norm(x, weight, EPS)
            return (out.values,) if out.scale is None else (out.values, out.scale)

        return norm

    inputs: list[Spec] = [(("T", hidden), "bfloat16"), ((hidden,), "float32")]
    (plain,) = Twin(build(PLAIN), *inputs)(x, weight)
    codes, scales = Twin(build(QUANTIZED), *inputs)(x, weight)
    assert plain.dtype == BF16
    assert scales.shape == (tokens, 1)
    if tokens:
        expected = normed(x, weight)
        assert relative_error(plain, expected) < BF16_ERROR
        check_quantized(codes, scales, expected, hidden)


@pytest.mark.parametrize("quantize", [False, True], ids=["bf16", "fp8"])
def test_the_norm_sees_the_residual_stream_as_it_is_stored(quantize: bool) -> None:
    """The product is bfloat16 before it is added, and the sum before it is normalised, as between a GPU's kernels."""
    tokens, hidden, columns = 5, 256, 512
    rng = fresh_rng()
    x, weight = random_bf16(rng, (tokens, columns)), random_bf16(rng, (hidden, columns), columns**-0.5)
    residual, scale = random_bf16(rng, (tokens, hidden), 30.0), rng.uniform(0.5, 1.5, hidden).astype(np.float32)
    operators = QUANTIZED if quantize else PLAIN

    def build(x: Tensor, weight: Tensor, residual: Tensor, norm: Tensor) -> tuple[Tensor, ...]:
        given, packed = GemmInput(x), GemmWeight(weight)
        total, out = operators.gemm_sum_add_rms_norm(given, packed, None, residual, Norm(norm, EPS), tp_size=1)
        _, last = operators.gemm_sum_add_rms_norm(
            given, packed, None, residual, Norm(norm, EPS), tp_size=1, quantize=False
        )
        assert last.scale is None
        return (total, last.values) if out.scale is None else (total, last.values, out.values, out.scale)

    shapes: list[Spec] = [(("T", columns), "bfloat16"), ((hidden // 16, columns, 16), "bfloat16")]
    shapes += [(("T", hidden), "bfloat16"), ((hidden,), "float32")]
    total, last, *quantized = Twin(build, *shapes)(x, panels(weight), residual, scale)
    (product,) = gemm(hidden, columns, None, False, "bfloat16")(x, panels(weight))
    np.testing.assert_array_equal(total, (product.astype(np.float32) + residual.astype(np.float32)).astype(BF16))
    assert relative_error(last, normed(total, scale)) < BF16_ERROR
    exact_sum = x.astype(np.float64) @ weight.astype(np.float64).T + residual.astype(np.float64)
    assert relative_error(normed(total, scale), normed(exact_sum, scale)) > 1e-4, "unrounded sums would not be seen"
    assert len(quantized) == (2 if quantize else 0)
    if quantized:
        codes, scales = quantized
        check_quantized(codes, scales, normed(total, scale), hidden)


@pytest.mark.parametrize("tokens", [0, 1, 32, 33, 128, 129])
@pytest.mark.parametrize("size", [192, 1792])
def test_silu(tokens: int, size: int) -> None:
    """Of gate and up as their product stores them; in groups where the size is a multiple of 256."""
    columns = 64
    rng = fresh_rng()
    x, weight = random_bf16(rng, (tokens, columns)), random_bf16(rng, (2 * size, columns), 2 * columns**-0.5)

    def build(operators: PortableOperators) -> Callable[..., tuple[Tensor, ...]]:
        def silu_mul(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            out = operators.gemm_silu_mul(GemmInput(x), GemmWeight(weight), None, 2 * size)
            return (out.values,) if out.scale is None else (out.values, out.scale)

        return silu_mul

    shapes: list[Spec] = [(("T", columns), "bfloat16"), ((2 * size // 16, columns, 16), "bfloat16")]
    (plain,) = Twin(build(PLAIN), *shapes)(x, panels(weight))
    codes, scales = Twin(build(QUANTIZED), *shapes)(x, panels(weight))
    (gate_up,) = gemm(2 * size, columns, None, False, "bfloat16")(x, panels(weight))
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    expected = gate / (1 + np.exp(-gate)) * up
    assert plain.shape == codes.shape == (tokens, size)
    assert scales.shape == (tokens, 1 if size % 256 else size // 32)
    if tokens:
        assert relative_error(plain, expected) < BF16_ERROR
        group = size if size % 256 or tokens > 128 else 32 if tokens <= 16 else 128
        check_quantized(codes, scales, expected, group)


def test_embeddings_and_rows() -> None:
    rng = fresh_rng()
    table = random_bf16(rng, (100, 64))
    ids, rows = np.array([5, 99, 0, 5], np.int32), np.array([3, 1], np.int32)

    def build(ids: Tensor, table: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        embedded = PLAIN.embed(ids, table)
        return embedded, PLAIN.take_rows(embedded, rows)

    embedded, taken = Twin(build, (("T",), "int32"), ((100, 64), "bfloat16"), (("R",), "int32"))(ids, table, rows)
    np.testing.assert_array_equal(embedded.view(np.uint16), table[ids].view(np.uint16))
    np.testing.assert_array_equal(taken.view(np.uint16), table[ids[rows]].view(np.uint16))
