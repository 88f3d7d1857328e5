"""The operators a model graph is made of, with one implementation per kernel set.

`TunedOperators` calls named externs of `compile/kernels/<target>` (destination-passing, resolved by global name when
the library is loaded); `PortableOperators` builds everything from TVM. Collectives are externs in both.
Shapes: T tokens of the step, R sampled rows, S slots, P pages of a page table, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import tvm
from tvm import relax
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.core import wrap_nested

from tpserve.compile.kernels import portable, portable_gemm
from tpserve.proto.packing import CHANNELS, INTERLEAVE

_GROUP_SIZE = 128
"""Elements of an e4m3 row that have a scale of their own."""
_STAGE_SIZE = 256
"""Elements that a GEMM takes at once: two groups."""
_SILU_GROUPS = 8
"""Scales of so many elements that SiLU may give: groups of 32 where tokens are few."""


@dataclass(frozen=True, slots=True)
class BatchInputs:
    """The ragged batch of one step, as the graph's inputs."""

    positions: Tensor
    """(T,) int32: position of each token in its sequence."""
    token_slots: Tensor
    """(T,) int32: slot of each token."""
    page_table: Tensor
    """(S, P) int32: page ids of each slot."""
    rope: Tensor
    """(max_model_len, head_dim) float32: cosines, then sines."""
    plan: Tensor
    """(words,) int32: how attention of this step is cut into pieces of work, made once a step; empty on a CPU."""
    workspace: Tensor
    """(floats,) float32 for partial sums of attention; empty on a CPU."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Per-rank sizes of one attention layer."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    window: int
    """Positions attended to; 0 is all."""

    @property
    def scale(self) -> float:
        """Scores are multiplied by it."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True, slots=True)
class GemmInput:
    """Rows that a GEMM takes."""

    values: Tensor
    """(T, K), of the activations' type, or e4m3."""
    scale: Tensor | None = None
    """For e4m3, float32: a value is its stored value times a scale."""
    scales: Literal["row", "grouped", "silu"] = "row"
    """(T,), one for each row; grouped, see `_grouped`: of 128 elements, or those that `gemm_silu_mul` gives. Portable
    kernels have (T, places) of any kind."""


@dataclass(frozen=True, slots=True)
class GemmWeight:
    """Output channels of a GEMM, packed for the target."""

    values: Tensor
    scale: Tensor | None = None
    """(rows,) float32 for e4m3, by output channel."""


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm."""

    weight: Tensor
    """(H,) float32."""
    eps: float


@dataclass(frozen=True, slots=True)
class PagedKV:
    """KV pages of one layer."""

    pages: Tensor
    """(num_pages, num_kv_heads, 2, head_dim * page_size), of the activations' type, or e4m3; written in place."""
    scale: Tensor | None = None
    """(2,) float32 for e4m3: a key is its stored value times the first, a value times the second."""


class Operators(Protocol):
    """What a graph may call.

    Activations are float32, or what a kernel set was made with. Where weights are e4m3, whatever makes the input of a
    GEMM quantises it in the same pass: norms with one scale a row, attention and SiLU with one for each 128 elements or
    fewer, which needs no maximum of the row.
    """

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        """(T,) int32, (V, H) -> (T, H)."""

    def gemm(
        self, x: GemmInput, weight: GemmWeight, bias: Tensor | None, rows: int, dtype: str | None = None
    ) -> Tensor:
        """(T, K), packed weight of `rows` output rows, (rows,) -> (T, rows), in `dtype` if not that of activations."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> GemmInput:
        """(T, H), (H,) -> (T, H)."""

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
        """Return (sum over ranks of the GEMM + residual, its norm); residual is (T, H), H the GEMM's output rows.

        On several GPUs the first of the two may be whole only in some rows, which the next call takes as they are.
        """

    def gate_up_interleave(self, intermediate_size: int) -> int:
        """Return the `ParamSpec.interleave` of the weight that `gemm_silu_mul` takes, for that many columns of gate."""

    def gemm_silu_mul(self, x: GemmInput, weight: GemmWeight, bias: Tensor | None, rows: int) -> GemmInput:
        """(T, K), packed weight of `rows` = 2F output rows of gate and up, (rows,) -> SiLU(gate) * up, (T, F)."""

    def attention(
        self,
        qkv: Tensor,
        qk_norm: tuple[Tensor, Tensor, float] | None,
        batch: BatchInputs,
        kv: PagedKV,
        shape: AttentionShape,
    ) -> GemmInput:
        """Rotate q and k, write k and v to the pages, and attend; (T, (Hq + 2 Hkv) D) -> (T, Hq * D).

        `qk_norm` has the weights, (D,) float32 each, and the epsilon of a norm of each head of q and k before that.
        """

    def append(
        self,
        qkv: Tensor,
        qk_norm: tuple[Tensor, Tensor, float] | None,
        batch: BatchInputs,
        kv: PagedKV,
        shape: AttentionShape,
    ) -> Tensor:
        """Do as `attention`, but attend to nothing: return the rotated queries, (T, Hq, D). On CPUs alone."""

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """(T, H), (R,) int32 -> (R, H)."""


def all_reduce(x: Tensor, tp_size: int) -> Tensor:
    """Sum over ranks, in rank order."""
    return x if tp_size == 1 else op.extern("tpserve.all_reduce", [x], Tensor.placeholder(x.shape, x.dtype))


def all_gather(x: Tensor, tp_size: int) -> Tensor:
    """(R, C) on each rank -> (R, tp_size * C), rank 0's columns first."""
    rows, columns = x.shape
    return op.extern("tpserve.all_gather", [x], Tensor.placeholder((rows, tp_size * columns), x.dtype))


class TunedOperators:
    """Externs of a target's kernel library.

    Parameters
    ----------
    target
        `cpu` or `cuda`: the part of the externs' names.
    dtype
        Of activations.
    quantize
        Whether GEMMs take e4m3 rows.
    """

    def __init__(self, target: str, dtype: str, *, quantize: bool = False) -> None:
        self._target = target
        self._prefix = f"tpserve.{target}."
        self._dtype = dtype
        self._quantize = quantize

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        """See Operators."""
        return self._extern("embed", [ids, table], (ids.shape[0], table.shape[1]))

    def gemm(
        self, x: GemmInput, weight: GemmWeight, bias: Tensor | None, rows: int, dtype: str | None = None
    ) -> Tensor:
        """See Operators."""
        name, args = _gemm_call(x, weight, bias)
        return self._extern(name, args, (x.values.shape[0], rows), dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> GemmInput:
        """See Operators."""
        return self._gemm_input("rms_norm", [x, weight, eps], x.shape)

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
        shape, addends = residual.shape, [residual, norm.weight, norm.eps]
        sums = (shape, self._dtype)
        args: list[Tensor | int | float | str]
        if self._target == "cuda" and tp_size > 1:
            # One call, since the collective writes its outputs while the GEMM still reads its inputs: memory planning
            # gives the outputs of one call no memory of its inputs.
            gemm, operands = _gemm_call(x, weight, bias)
            name, scratch = "tpserve.gemm_all_reduce_add_rms_norm", [sums]
            args = [gemm, *operands, *addends]
        else:
            name, scratch = f"{self._prefix}add_rms_norm", []
            args = [all_reduce(self.gemm(x, weight, bias, int(shape[1])), tp_size), *addends]
        if self._quantize and quantize:
            *_, total, values, scale = self._call(f"{name}_fp8", args, [*scratch, sums, *_quantized(shape)])
            return total, GemmInput(values, scale)
        *_, total, normed = self._call(name, args, [*scratch, sums, sums])
        return total, GemmInput(normed)

    def gate_up_interleave(self, intermediate_size: int) -> int:
        """See Operators; 0 where the GEMM's tiles or groups of scales do not fit, so that a kernel must follow it."""
        multiple = _STAGE_SIZE if self._quantize else CHANNELS // 2
        return INTERLEAVE if self._target == "cuda" and intermediate_size % multiple == 0 else 0

    def gemm_silu_mul(self, x: GemmInput, weight: GemmWeight, bias: Tensor | None, rows: int) -> GemmInput:
        """See Operators."""
        tokens, columns = x.values.shape[0], rows // 2
        if not self.gate_up_interleave(columns):
            return self._gemm_input("silu_mul", [self.gemm(x, weight, bias, rows)], (tokens, columns))
        name, args = _gemm_call(x, weight, bias, "_silu_mul")
        scratch = ((tokens, rows), self._dtype)
        if self._quantize:
            outputs = [scratch, *_grouped(tokens, columns, _SILU_GROUPS)]
            _, values, scales = self._call(f"{self._prefix}{name}", args, outputs)
            return GemmInput(values, scales, "silu")
        _, values = self._call(f"{self._prefix}{name}", args, [scratch, ((tokens, columns), self._dtype)])
        return GemmInput(values)

    def attention(
        self,
        qkv: Tensor,
        qk_norm: tuple[Tensor, Tensor, float] | None,
        batch: BatchInputs,
        kv: PagedKV,
        shape: AttentionShape,
    ) -> GemmInput:
        """See Operators."""
        norm = list(qk_norm or ())
        prefix = "qk_norm_" if norm else ""
        tokens, columns = qkv.shape[0], shape.num_q_heads * shape.head_dim
        where = [batch.positions, batch.token_slots, batch.page_table]
        if self._target == "cpu":
            q = self.append(qkv, qk_norm, batch, kv, shape)
            args = [q, kv.pages, *where, shape.scale, shape.window]
            return GemmInput(self._extern("attention", args, (tokens, columns)))
        name = f"{self._prefix}{prefix}attention"
        args = [qkv, *norm, kv.pages]
        if kv.scale is not None:
            name, args = f"{name}_fp8", [qkv, *norm, kv.scale, kv.pages]
        args += [*where, batch.rope, batch.plan, shape.scale, shape.window, batch.workspace]
        rotated = ((tokens, columns), self._dtype)  # queries between two kernels
        if self._quantize and shape.head_dim == _GROUP_SIZE and columns % _STAGE_SIZE == 0:
            _, values, scales = self._call(f"{name}_grouped", args, [rotated, *_grouped(tokens, columns)])
            return GemmInput(values, scales, "grouped")
        _, x = self._call(name, args, [rotated, ((tokens, columns), self._dtype)])
        if not self._quantize:
            return GemmInput(x)
        return GemmInput(*self._call(f"{self._prefix}quantize_fp8", [x], _quantized(x.shape)))

    def append(
        self,
        qkv: Tensor,
        qk_norm: tuple[Tensor, Tensor, float] | None,
        batch: BatchInputs,
        kv: PagedKV,
        shape: AttentionShape,
    ) -> Tensor:
        """See Operators."""
        assert self._target == "cpu", "on a GPU, attention itself writes to the pages"
        norm = list(qk_norm or ())
        args = [qkv, *norm, batch.positions, batch.token_slots, batch.page_table, batch.rope, kv.pages]
        heads = (qkv.shape[0], shape.num_q_heads, shape.head_dim)
        return self._extern(f"{'qk_norm_' if norm else ''}rope_append", args, heads)

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """See Operators."""
        return self._extern("take_rows", [x, rows], (rows.shape[0], x.shape[1]))

    def _extern(
        self, name: str, args: Sequence[Tensor | int | float], shape: tuple[object, ...], dtype: str | None = None
    ) -> Tensor:
        return op.extern(self._prefix + name, args, Tensor.placeholder(shape, dtype or self._dtype))

    def _gemm_input(self, name: str, args: list[Tensor | int | float], shape: tuple[object, ...]) -> GemmInput:
        if not self._quantize:
            return GemmInput(self._extern(name, args, shape))
        return GemmInput(*self._call(f"{self._prefix}{name}_fp8", args, _quantized(shape)))

    def _call(
        self, name: str, args: Sequence[Tensor | int | float | str], outputs: list[tuple[tuple[object, ...], str]]
    ) -> tuple[Tensor, ...]:
        """Call a function of several outputs, which `op.extern` cannot."""
        exprs = [_expr(arg) for arg in args]
        types = [Tensor.placeholder(shape, dtype)._expr.ty for shape, dtype in outputs]
        return tuple(wrap_nested(relax.call_dps_packed(name, exprs, out_ty=types), name.rpartition(".")[2]))


def _expr(arg: Tensor | int | float | str) -> Any:
    """Return what a call in the graph takes for an argument."""
    if isinstance(arg, Tensor):
        return arg._expr
    return tvm.ir.StringImm(arg) if isinstance(arg, str) else relax.prim_value(arg)


def _gemm_call(x: GemmInput, weight: GemmWeight, bias: Tensor | None, ending: str = "") -> tuple[str, list[Any]]:
    """Return the name of a GEMM's function, by its operands and what it ends in, and its inputs."""
    name, args = "gemm", [x.values, weight.values]
    if x.scale is not None and weight.scale is not None:
        kind = {"row": "", "grouped": "_grouped", "silu": "_after_silu"}[x.scales]
        name, args = f"gemm_fp8{kind}", [x.values, x.scale, weight.values, weight.scale]
    return (f"{name}{ending}", args) if bias is None else (f"{name}{ending}_bias", [*args, bias])


def _quantized(shape: tuple[object, ...]) -> list[tuple[tuple[object, ...], str]]:
    """Return the outputs of whatever quantises rows: e4m3 values and a scale each."""
    return [(tuple(shape), "float8_e4m3fn"), ((shape[0],), "float32")]


def _grouped(tokens: Any, columns: int, groups: int = 2) -> list[tuple[tuple[object, ...], str]]:
    """Return the outputs of whatever quantises groups; see `kernels/cuda/grouped_scales.cuh`.

    `groups`: of `_STAGE_SIZE` elements, that the tensor of scales has room for.
    """
    padded = (tokens + 7) // 8 * 8
    return [((tokens, columns), "float8_e4m3fn"), ((columns // _STAGE_SIZE, groups, padded), "float32")]


class PortableOperators:
    """TVM for everything: the twin that tuned kernels are compared with, and the start of any new target.

    With bfloat16 activations or e4m3 rows it computes what the kernels of a GPU do, rounding where they do. The twin of
    sampling is `worker.reference_sampler`.

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
        return self._quantized(out, "silu" if rows // 2 % _STAGE_SIZE == 0 else "row")

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
        if shape.head_dim == _GROUP_SIZE and columns % _STAGE_SIZE == 0:
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
