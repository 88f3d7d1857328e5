"""Operators as named externs of a target's kernel library.

Destination-passing, resolved by global name when the library is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import relax
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.core import wrap_nested

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
from tpserve.proto.packing import CHANNELS, INTERLEAVE

_SILU_GROUPS = 8
"""Scales of so many elements that SiLU may give: groups of 32 where tokens are few."""
_TILE = 64
"""Channels whose squares a GEMM adds up."""
_MLP_SIZES = (2048, 4096), (96 * 64, 132 * 64)
"""Hidden and intermediate sizes that the kernel of a whole MLP is for."""
_JOINED_HEADS, _JOINED_HIDDEN = (4, 11, 64), 2048
"""Query heads of a KV head, most KV heads, their size, and most hidden, of the kernel of qkv and attention."""


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
        elif self._target == "cuda" and quantize and not (self._quantize and int(shape[1]) % STAGE_SIZE):
            return self._gemm_norm(x, weight, bias, residual, norm)
        else:
            name, scratch = f"{self._prefix}add_rms_norm", []
            args = [all_reduce(self.gemm(x, weight, bias, int(shape[1])), tp_size), *addends]
        if self._quantize and quantize:
            *_, total, values, scale = self._call(f"{name}_fp8", args, [*scratch, sums, *_quantized(shape)])
            return total, GemmInput(values, scale)
        *_, total, normed = self._call(name, args, [*scratch, sums, sums])
        return total, GemmInput(normed)

    def _gemm_norm(
        self, x: GemmInput, weight: GemmWeight, bias: Tensor | None, residual: Tensor, norm: Norm
    ) -> tuple[Tensor, GemmInput]:
        """Let the GEMM begin the norm, and those that take its rows end it; see `kernels/cuda/gemm_norm.cuh`."""
        name, args = _gemm_call(x, weight, bias, "_add_rms_norm")
        outputs = self._begun_norm(*residual.shape)
        _, total, normed, norms = self._call(f"{self._prefix}{name}", [*args, residual, norm.weight, norm.eps], outputs)
        return total, GemmInput(normed, norms, "norm")

    def _begun_norm(self, tokens: Any, columns: Any) -> list[tuple[tuple[object, ...], str]]:
        """Return the outputs of what begins a norm: scratch, the stream, its product with the weight, and squares."""
        squares: tuple[object, ...] = ((int(columns) + _TILE - 1) // _TILE, _padded(tokens))
        rows = ((tokens, columns), self._dtype)
        if not self._quantize:
            return [rows, rows, rows, (squares, "float32")]
        return [rows, rows, ((tokens, columns), "float8_e4m3fn"), ((2, *squares), "float32")]  # scales of tiles besides

    def gate_up_interleave(self, intermediate_size: int) -> int:
        """See Operators; 0 where the GEMM's tiles or groups of scales do not fit, so that a kernel must follow it."""
        multiple = STAGE_SIZE if self._quantize else CHANNELS // 2
        return INTERLEAVE if self._target == "cuda" and intermediate_size % multiple == 0 else 0

    def gemm_silu_mul(self, x: GemmInput, weight: GemmWeight, bias: Tensor | None, rows: int) -> GemmInput:
        """See Operators."""
        tokens, columns = x.values.shape[0], rows // 2
        if not self.gate_up_interleave(columns):
            return self._gemm_input("silu_mul", [self.gemm(x, weight, bias, rows)], (tokens, columns))
        name, args = _gemm_call(x, weight, bias, "_silu_mul")
        if not self._quantize:
            return GemmInput(self._extern(name, args, (tokens, columns)))
        outputs = [((tokens, rows), self._dtype), *_grouped(tokens, columns, _SILU_GROUPS)]
        _, values, scales = self._call(f"{self._prefix}{name}", args, outputs)
        return GemmInput(values, scales, "silu")

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
    ) -> tuple[Tensor, GemmInput] | None:
        """See Operators; for sizes with which blocks of 64 activations nearly fill a GPU (`mlp_kernel.cuh`)."""
        sizes = int(residual.shape[1]), intermediate_size
        fits = not any(size % STAGE_SIZE for size in sizes) and all(
            least <= size <= most for size, (least, most) in zip(sizes, _MLP_SIZES, strict=True)
        )
        if not (fits and self._target == "cuda" and self._quantize and tp_size == 1 and x.scales == "norm"):
            return None
        tokens, columns = residual.shape
        operands = [part for pair in (x, gate_up, down) for part in (pair.values, pair.scale) if part is not None]
        outputs = [((tokens, 2 * intermediate_size), self._dtype), *_grouped(tokens, intermediate_size, _SILU_GROUPS)]
        *_, total, normed, norms = self._call(
            f"{self._prefix}mlp_fp8_add_rms_norm",
            [*operands, residual, norm.weight, norm.eps],
            [*outputs, *self._begun_norm(tokens, columns)],
        )
        if not quantize:
            return total, GemmInput(self._extern("rms_norm", [total, norm.weight, norm.eps], total.shape))
        return total, GemmInput(normed, norms, "norm")

    def joined_attention(
        self,
        x: GemmInput,
        qkv: GemmWeight,
        batch: BatchInputs,
        kv: PagedKV,
        shape: AttentionShape,
    ) -> GemmInput | None:
        """See Operators; for sizes of which a GPU has all blocks at once (`kernels/cuda/qkv_attention_kernel.cuh`)."""
        tokens, hidden = x.values.shape
        heads, columns = shape.num_q_heads + 2 * shape.num_kv_heads, shape.num_q_heads * shape.head_dim
        group, most_kv_heads, head_dim = _JOINED_HEADS
        fits = (
            shape.num_q_heads == group * shape.num_kv_heads
            and shape.num_kv_heads <= most_kv_heads
            and shape.head_dim == head_dim
            and int(hidden) % (2 * STAGE_SIZE) == 0
            and int(hidden) <= _JOINED_HIDDEN
        )
        if not (fits and self._target == "cuda" and shape.has_groups and shape.window == 0 and x.scales == "norm"):
            return None
        if x.scale is None or qkv.scale is None:  # of bfloat16
            return None
        name, scales = ("qkv_attention_grouped", []) if kv.scale is None else ("qkv_attention_fp8_grouped", [kv.scale])
        operands = [x.values, x.scale, qkv.values, qkv.scale, *scales, kv.pages]
        where = [batch.positions, batch.token_slots, batch.page_table, batch.rope, batch.plan]
        _, _, values, groups = self._call(
            f"{self._prefix}{name}",
            [*operands, *where, shape.scale, shape.window, batch.workspace],
            [
                ((tokens, heads * shape.head_dim), self._dtype),
                ((tokens, columns), self._dtype),
                *_grouped(tokens, columns),
            ],
        )
        return GemmInput(values, groups, "grouped")

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
        if self._quantize and shape.has_groups:
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
        norm = list(qk_norm or ())
        assert self._target == "cpu" or (not norm and kv.scale is None), "a GPU's kernel has neither norm nor scales"
        args = [qkv, *norm, batch.positions, batch.token_slots, batch.page_table, batch.rope, kv.pages]
        heads = (qkv.shape[0], shape.num_q_heads, shape.head_dim)
        return self._extern(f"{'qk_norm_' if norm else ''}rope_append", args, heads)

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """See Operators."""
        return self._extern("take_rows", [x, rows], (rows.shape[0], x.shape[1]))

    def takes_rows_within(self, tp_size: int) -> bool:
        """See Operators."""
        return not self._quantize and (self._target == "cpu" or tp_size == 1)

    def concat(self, parts: Sequence[Tensor]) -> Tensor:
        """See Operators."""
        if self._target == "cpu":
            return op.concat(list(parts), dim=-1)
        tokens, columns = parts[0].shape
        return self._extern(f"concat_{len(parts)}", parts, (tokens, len(parts) * columns))

    def whole_rows(self, x: Tensor, tp_size: int) -> Tensor:
        """See Operators."""
        if self._target == "cpu" or tp_size == 1:
            return x
        return op.extern("tpserve.whole_rows", [x], Tensor.placeholder(x.shape, x.dtype))

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
    if x.scales == "norm" and weight.scale is None:
        name, args = "gemm_normed", [x.values, x.scale, weight.values]
    elif x.scale is not None and weight.scale is not None:
        kind = {"row": "", "grouped": "_grouped", "silu": "_after_silu", "norm": "_normed"}[x.scales]
        name, args = f"gemm_fp8{kind}", [x.values, x.scale, weight.values, weight.scale]
    return (f"{name}{ending}", args) if bias is None else (f"{name}{ending}_bias", [*args, bias])


def _quantized(shape: tuple[object, ...]) -> list[tuple[tuple[object, ...], str]]:
    """Return the outputs of whatever quantises rows: e4m3 values and a scale each."""
    return [(tuple(shape), "float8_e4m3fn"), ((shape[0],), "float32")]


def _grouped(tokens: Any, columns: int, groups: int = 2) -> list[tuple[tuple[object, ...], str]]:
    """Return the outputs of whatever quantises groups; see `kernels/cuda/grouped_scales.cuh`.

    `groups`: of `STAGE_SIZE` elements, that the tensor of scales has room for.
    """
    scales = (columns // STAGE_SIZE, groups, _padded(tokens))
    return [((tokens, columns), "float8_e4m3fn"), (scales, "float32")]


def _padded(tokens: Any) -> Any:
    """Return the places of tokens that stand side by side; see `kernels/cuda/grouped_scales.cuh`."""
    return (tokens + 7) // 8 * 8
