"""Operators built from TVM alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from tvm.relax.frontend.nn import Tensor, op

from tpserve.compile.kernels import portable, portable_gemm
from tpserve.compile.operators import (
    STAGE_SIZE,
    AttentionShape,
    BatchInputs,
    GemmInput,
    GemmWeight,
    Norm,
    PagedKV,
    all_reduce,
)


class PortableOperators:
    """TVM for everything: the twin that tuned kernels are compared with, and the start of any new target.

    With bfloat16 activations or e4m3 rows it computes what the kernels of a GPU do, rounding where they do, but for
    norms of few tokens on one GPU (`kernels/cuda/gemm_norm.cuh`). The twin of sampling is `worker.reference_sampler`.

    Parameters
    ----------
    dtype
        Of activations: float32 or bfloat16. Arithmetic and sums over ranks are float32.
    quantize
        Whether GEMMs take e4m3 rows; see `portable_gemm.quantize` for their scales.
    """

    def __init__(self, dtype: str = "float32", *, quantize: bool = False) -> None:
        self._dtype = dtype
        self._quantize = quantize

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        """See Operators."""
        return self._stored(op.take(table, ids, axis=0).astype("float32"))

    def gemm(
        self, x: GemmInput, weight: GemmWeight, bias: Tensor | None, rows: int, dtype: str | None = None
    ) -> Tensor:
        """See Operators."""
        if x.scale is None or weight.scale is None:
            out = op.tensor_expr_op(portable_gemm.gemm, "gemm_panel16", [x.values, weight.values])
        else:
            args = [x.values, x.scale, weight.values, weight.scale]
            out = op.tensor_expr_op(portable_gemm.gemm_fp8, "gemm_fp8_panel16", args)
        return self._stored(out if bias is None else op.add(out, bias), dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> GemmInput:
        """See Operators."""
        return self._normed(x, weight, eps, quantize=self._quantize)

    def gemm_sum_add_rms_norm(
        self,
        x: GemmInput,
        weight: GemmWeight,
        bias: Tensor | None,
        residual: Tensor,
        norm: Norm,
        *,
        tp_size: int,
        quantize: bool = True,
    ) -> tuple[Tensor, GemmInput]:
        """See Operators."""
        part = self.gemm(x, weight, bias, int(residual.shape[1])).astype("float32")
        total = self._stored(op.add(all_reduce(part, tp_size), residual.astype("float32")))
        return total, self._normed(total, norm.weight, norm.eps, quantize=self._quantize and quantize)

    def gate_up_interleave(self, intermediate_size: int) -> int:
        """See Operators."""
        return 0

    def gemm_silu_mul(self, x: GemmInput, weight: GemmWeight, bias: Tensor | None, rows: int) -> GemmInput:
        """See Operators."""
        gate, up = op.split(self.gemm(x, weight, bias, rows).astype("float32"), 2, axis=-1)
        out = op.multiply(op.silu(gate), up)
        if not self._quantize:
            return GemmInput(self._stored(out))
        return self._quantized(out, "silu" if rows // 2 % STAGE_SIZE == 0 else "row")

    def joined_mlp(
        self,
        x: GemmInput,
        gate_up: GemmWeight,
        down: GemmWeight,
        intermediate_size: int,
        residual: Tensor,
        norm: Norm,
        *,
        tp_size: int,
        quantize: bool,
    ) -> None:
        """See Operators; two products are its plain twin."""

    def joined_attention(
        self,
        x: GemmInput,
        qkv: GemmWeight,
        batch: BatchInputs,
        kv: PagedKV,
        shape: AttentionShape,
    ) -> None:
        """See Operators; a product and attention are its plain twin."""

    def attention(
        self,
        qkv: Tensor,
        qk_norm: tuple[Tensor, Tensor, float] | None,
        batch: BatchInputs,
        kv: PagedKV,
        shape: AttentionShape,
    ) -> GemmInput:
        """See Operators."""
        q = self.append(qkv, qk_norm, batch, kv, shape)
        heads = (shape.num_q_heads, shape.num_kv_heads, shape.head_dim, shape.page_size)
        columns = shape.num_q_heads * shape.head_dim
        out = op.tensor_ir_op(
            portable.attention(*heads, shape.scale, shape.window, self._dtype, str(kv.pages.dtype)),
            "attention",
            [q, _kv_scale(kv), kv.pages, batch.positions, batch.token_slots, batch.page_table],
            Tensor.placeholder((qkv.shape[0], columns), "float32"),
        )
        if not self._quantize:
            return GemmInput(self._stored(out))
        if shape.has_groups:
            return self._quantized(out, "grouped")
        return self._quantized(self._stored(out).astype("float32"), "row")

    def append(
        self,
        qkv: Tensor,
        qk_norm: tuple[Tensor, Tensor, float] | None,
        batch: BatchInputs,
        kv: PagedKV,
        shape: AttentionShape,
    ) -> Tensor:
        """See Operators."""
        qkv = qkv.astype("float32")
        if qk_norm is not None:
            qkv = self._norm_heads(qkv, qk_norm, shape)
        heads = (shape.num_q_heads, shape.num_kv_heads, shape.head_dim, shape.page_size)
        q: Tensor = op.tensor_ir_op(
            portable.rope_append(*heads, self._dtype, str(kv.pages.dtype)),
            "rope_append",
            [qkv, batch.positions, batch.token_slots, batch.page_table, batch.rope, _kv_scale(kv), kv.pages],
            Tensor.placeholder((qkv.shape[0], shape.num_q_heads, shape.head_dim), self._dtype),
        )
        return q

    def _norm_heads(self, qkv: Tensor, qk_norm: tuple[Tensor, Tensor, float], shape: AttentionShape) -> Tensor:
        q_weight, k_weight, eps = qk_norm
        tokens = qkv.shape[0]
        q_dim, kv_dim = shape.num_q_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        q, k, v = op.split(qkv, [q_dim, q_dim + kv_dim], axis=-1)
        q = op.rms_norm(op.reshape(q, (tokens, shape.num_q_heads, shape.head_dim)), q_weight, axes=-1, epsilon=eps)
        k = op.rms_norm(op.reshape(k, (tokens, shape.num_kv_heads, shape.head_dim)), k_weight, axes=-1, epsilon=eps)
        return op.concat([op.reshape(q, (tokens, q_dim)), op.reshape(k, (tokens, kv_dim)), v], dim=-1)

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """See Operators."""
        return op.take(x, rows, axis=0)

    def takes_rows_within(self, tp_size: int) -> bool:
        """See Operators."""
        return not self._quantize

    def concat(self, parts: Sequence[Tensor]) -> Tensor:
        """See Operators."""
        return op.concat(list(parts), dim=-1)

    def whole_rows(self, x: Tensor, tp_size: int) -> Tensor:
        """See Operators."""
        return x

    def _normed(self, x: Tensor, weight: Tensor, eps: float, *, quantize: bool) -> GemmInput:
        out = op.rms_norm(x.astype("float32"), weight, axes=-1, epsilon=eps)
        return self._quantized(out, "row") if quantize else GemmInput(self._stored(out))

    def _stored(self, x: Tensor, dtype: str | None = None) -> Tensor:
        """Round (T, N) float32 to the type of activations, or to `dtype`."""
        dtype = dtype or self._dtype
        return x if dtype == "float32" else op.tensor_expr_op(portable_gemm.narrow, "narrow", [x, dtype])

    def _quantized(self, x: Tensor, scales: Literal["row", "grouped", "silu"]) -> GemmInput:
        """(T, K) float32 -> e4m3."""
        tokens, columns = x.shape[0], int(x.shape[1])
        values, scale = op.tensor_ir_op(
            portable_gemm.quantize(columns, scales),
            f"quantize_{scales}",
            [x],
            [
                Tensor.placeholder((tokens, columns), "float8_e4m3fn"),
                Tensor.placeholder((tokens, columns // portable_gemm.scale_size(columns, scales)), "float32"),
            ],
        )
        return GemmInput(values, scale, scales)


def _kv_scale(kv: PagedKV) -> Tensor:
    """Return what stored keys and values are multiplied by: ones where pages have no scales."""
    return Tensor.from_const(np.ones(2, np.float32)) if kv.scale is None else kv.scale
