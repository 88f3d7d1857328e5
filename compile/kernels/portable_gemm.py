"""Portable TVM kernels of products: the GEMM over packed panels, and the quantisation of its rows to e4m3.

The plain twins of `kernels/cuda/gemm.cu` and of whatever quantises there. Shapes: T tokens, K columns, N output rows.
"""

# mypy: ignore-errors
# TVMScript is parsed, not run: its annotations are buffers and values that no type checker knows.

from __future__ import annotations

from functools import cache
from typing import Literal

import tvm
from tvm import te
from tvm.script import tirx as T

from tpserve.compile.kernels.portable_numbers import (
    E4M3,
    E4M3_MAX,
    SMALLEST_LARGEST,
    narrowed,
    rounded_to_bfloat16,
    widened,
)
from tpserve.compile.operators import GROUP_SIZE

SILU_GROUP_SIZE = 32
"""The same of SiLU(gate) * up of few tokens."""
MAX_GROUPED_TOKENS = 128
MAX_SILU_GROUPED_TOKENS = 16
"""Of more tokens groups are larger: whole rows, or of SiLU `GROUP_SIZE`. As `kernels/cuda/grouped_scales.cuh` has it,
since the sums differ by what shares a scale."""

Scales = Literal["row", "grouped", "silu"]
"""Of a row: one; one for each 128 elements; one for each 32 elements of few tokens, else 128."""


def scale_size(columns: int, scales: Scales) -> int:
    """Return the elements that have one place in the tensor of scales; the same scale stands in several."""
    return {"row": columns, "grouped": GROUP_SIZE, "silu": SILU_GROUP_SIZE}[scales]


@cache
def quantize(columns: int, scales: Scales) -> tvm.tirx.PrimFunc:
    """(T, K) float32 -> (T, K) e4m3, (T, K / scale_size) float32: a value is its stored value times its scale.

    Grouped rows of more than `MAX_GROUPED_TOKENS` tokens are rounded to bfloat16 first: attention gives them so.
    """
    size = scale_size(columns, scales)
    num_scales = columns // size

    @T.prim_func(private=True, s_tir=True)
    def quantize_rows(var_x: T.handle, var_values: T.handle, var_scales: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        num_tokens = T.int64()
        x = T.match_buffer(var_x, (num_tokens, columns), "float32")
        values = T.match_buffer(var_values, (num_tokens, columns), E4M3)
        row_scales = T.match_buffer(var_scales, (num_tokens, num_scales), "float32")
        for t in T.serial(num_tokens):
            with T.sblock("token"):
                value = T.sblock_alloc_buffer((1,), "float32")
                largest = T.sblock_alloc_buffer((1,), "float32")
                for g in T.serial(columns // _group_size(columns, scales, num_tokens)):
                    largest[0] = T.float32(SMALLEST_LARGEST)
                    for k in T.serial(_group_size(columns, scales, num_tokens)):
                        value[0] = _given(x[t, g * _group_size(columns, scales, num_tokens) + k], scales, num_tokens)
                        value[0] = T.fabs(value[0])
                        largest[0] = T.Select(value[0] > largest[0], value[0], largest[0])  # skips NaN
                    for k in T.serial(_group_size(columns, scales, num_tokens)):
                        value[0] = _given(x[t, g * _group_size(columns, scales, num_tokens) + k], scales, num_tokens)
                        value[0] = value[0] * (T.float32(E4M3_MAX) / largest[0])
                        values[t, g * _group_size(columns, scales, num_tokens) + k] = narrowed(value[0], E4M3)
                    for k in T.serial(_group_size(columns, scales, num_tokens) // size):
                        row_scales[t, g * (_group_size(columns, scales, num_tokens) // size) + k] = largest[
                            0
                        ] / T.float32(E4M3_MAX)

    return quantize_rows


def _group_size(columns: int, scales: Scales, num_tokens):
    """Return how many elements share a scale, as an expression of the number of tokens."""
    if scales == "row":
        return T.int64(columns)
    grouped = T.if_then_else(num_tokens <= MAX_GROUPED_TOKENS, T.int64(GROUP_SIZE), T.int64(columns))
    if scales == "grouped":
        return grouped
    return T.if_then_else(num_tokens <= MAX_SILU_GROUPED_TOKENS, T.int64(SILU_GROUP_SIZE), grouped)


def _given(value, scales: Scales, num_tokens):
    if scales != "grouped":
        return value
    return T.if_then_else(num_tokens <= MAX_GROUPED_TOKENS, value, rounded_to_bfloat16(value))


def narrow(x: te.Tensor, dtype: str) -> te.Tensor:
    """(T, N) float32 -> (T, N), rounded."""
    return te.compute(x.shape, lambda m, n: narrowed(x[m, n], dtype), name="narrowed")


def gemm(x: te.Tensor, weight: te.Tensor) -> te.Tensor:
    """(T, K), (N / 16, K, 16), float32 or bfloat16 -> (T, N) float32."""
    return _products(x.shape[0], lambda m, k: widened(x[m, k], x.dtype), weight)


def gemm_fp8(x: te.Tensor, scales: te.Tensor, weight: te.Tensor, channels: te.Tensor) -> te.Tensor:
    """(T, K) e4m3, its scales, (N / 16, K, 16) e4m3, (N,) -> (T, N) float32; see `quantize`."""
    size = x.shape[1] // scales.shape[1]
    rows = te.compute(x.shape, lambda m, k: widened(x[m, k], x.dtype) * scales[m, k // size], name="rows")
    total = _products(x.shape[0], lambda m, k: rows[m, k], weight)
    return te.compute(total.shape, lambda m, n: total[m, n] * channels[n], name="scaled")


def _products(num_tokens, row, weight: te.Tensor) -> te.Tensor:
    panels, columns, lanes = weight.shape
    k = te.reduce_axis((0, columns), "k")
    return te.compute(
        (num_tokens, panels * lanes),
        lambda m, n: te.sum(row(m, k) * widened(weight[n // lanes, k, n % lanes], weight.dtype), axis=k),
        name="gemm",
    )
