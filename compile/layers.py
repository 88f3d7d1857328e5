"""Layers of the Llama family in relax nn, each declaring beside its weights how they are split over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor

from tpserve.compile.config import ModelConfig
from tpserve.compile.operators import AttentionShape, BatchInputs, GemmInput, GemmWeight, Norm, Operators, PagedKV
from tpserve.compile.sharding import PANEL_ROWS, Sharding
from tpserve.proto.manifest import ParamSource, ParamSpec
from tpserve.proto.packing import packed_shape


@dataclass(slots=True)
class GraphContext:
    """What every layer of one graph shares while it is built."""

    config: ModelConfig
    sharding: Sharding
    operators: Operators
    weight_dtype: str
    page_size: int
    weight_layout: Literal["panel16", "wgmma64x256g132"]
    quantized: bool
    """Whether the layers' weights are e4m3 with a scale for each output channel."""
    quantized_kv: bool = False
    """Whether KV pages are e4m3 with a scale of keys and one of values for each layer."""
    logits_by_rank: bool = False
    """Whether each rank gives the logits of its own part of the vocabulary: a GPU's sampler wants few."""
    specs: dict[int, ParamSpec] = field(default_factory=dict)
    """By identity of the graph's parameter."""

    def parameter(self, spec: ParamSpec) -> nn.Parameter:
        """Make a parameter and remember how it is filled from the checkpoint."""
        parameter = nn.Parameter(spec.shape, spec.dtype)
        self.specs[id(parameter)] = spec
        return parameter

    def vector(self, name: str, size: int) -> nn.Parameter:
        """(size,) float32, whole on each rank: a norm's weight."""
        return self.parameter(ParamSpec(name, (size,), "float32", "plain", (ParamSource(name),)))


class Linear(nn.Module):
    """y = x W^T + b with W packed as the target's GEMM reads it.

    Parameters
    ----------
    sources : tuple of ParamSource
        Checkpoint weights, concatenated along their rows.
    rows, columns : int
        Per rank, after the split.
    bias : tuple of ParamSource
        Empty for none.
    out_dtype : str or None
        Of the result, if not that of activations.
    quantized : bool
        False keeps the weight unquantised in any model.
    interleave : int
        See `ParamSpec`: of the rows, with their scales and biases.
    """

    def __init__(
        self,
        context: GraphContext,
        name: str,
        sources: tuple[ParamSource, ...],
        rows: int,
        columns: int,
        bias: tuple[ParamSource, ...] = (),
        out_dtype: str | None = None,
        quantized: bool = True,
        interleave: int = 0,
    ) -> None:
        self._context = context
        self._rows = rows
        self._out_dtype = out_dtype
        quantized = quantized and context.quantized
        layout = context.weight_layout
        if layout == "panel16":
            shape = (rows // PANEL_ROWS, columns, PANEL_ROWS)
        else:
            shape = packed_shape(rows, columns, itemsize=1 if quantized else 2)
        dtype = "float8_e4m3fn" if quantized else context.weight_dtype
        self.weight = context.parameter(ParamSpec(name, shape, dtype, layout, sources, (rows, columns), interleave))

        def vector(part: str, layout: Literal["channel_scale", "plain"], of: tuple[ParamSource, ...]) -> nn.Parameter:
            spec = ParamSpec(f"{name}.{part}", (rows,), "float32", layout, of, interleave=interleave)
            return context.parameter(spec)

        self.scale = vector("scale", "channel_scale", sources) if quantized else None
        self.bias = vector("bias", "plain", bias) if bias else None

    def forward(self, x: GemmInput) -> Tensor:
        """(T, columns) -> (T, rows)."""
        weight = GemmWeight(self.weight, self.scale)
        return self._context.operators.gemm(x, weight, self.bias, self._rows, self._out_dtype)

    def add_to(
        self, residual: Tensor, x: GemmInput, norm: nn.Parameter, *, quantize: bool = True
    ) -> tuple[Tensor, GemmInput]:
        """(T, rows), (T, columns), (rows,) -> residual + sum over ranks of y, and the RMSNorm of that."""
        context = self._context
        return context.operators.gemm_sum_add_rms_norm(
            x,
            GemmWeight(self.weight, self.scale),
            self.bias,
            residual,
            Norm(norm, context.config.rms_norm_eps),
            tp_size=context.sharding.tp_size,
            quantize=quantize,
        )

    def silu_mul(self, x: GemmInput) -> GemmInput:
        """(T, columns) -> (T, rows / 2): SiLU of the first half of the rows, times the second; may be interleaved."""
        weight = GemmWeight(self.weight, self.scale)
        return self._context.operators.gemm_silu_mul(x, weight, self.bias, self._rows)


class Attention(nn.Module):
    """Grouped-query attention over paged KV: heads are split, so the ranks' outputs are summed.

    Parameters
    ----------
    columns : int or None
        Of its input, if not the hidden size.
    """

    def __init__(self, context: GraphContext, prefix: str, columns: int | None = None) -> None:
        config, sharding = context.config, context.sharding
        self._context = context
        self._shape = AttentionShape(
            num_q_heads=sharding.num_q_heads,
            num_kv_heads=sharding.num_kv_heads,
            head_dim=config.head_dim,
            page_size=context.page_size,
            window=config.sliding_window or 0,
        )
        heads = {"q": "q_heads", "k": "kv_heads", "v": "kv_heads"}
        self.qkv = Linear(
            context,
            f"{prefix}.qkv_proj",
            tuple(ParamSource(f"{prefix}.{part}_proj.weight", 0, split) for part, split in heads.items()),
            rows=(sharding.num_q_heads + 2 * sharding.num_kv_heads) * config.head_dim,
            columns=columns or config.hidden_size,
            bias=tuple(ParamSource(f"{prefix}.{part}_proj.bias", 0, split) for part, split in heads.items())
            if config.qkv_bias
            else (),
        )
        self.o = Linear(
            context,
            f"{prefix}.o_proj",
            (ParamSource(f"{prefix}.o_proj.weight", 1, "q_heads"),),
            rows=config.hidden_size,
            columns=sharding.num_q_heads * config.head_dim,
            bias=(ParamSource(f"{prefix}.o_proj.bias", 0, "once"),) if config.o_bias else (),
        )
        self.kv_scale: nn.Parameter | None = None
        if context.quantized_kv:
            sources = tuple(ParamSource(f"{prefix}.{part}_proj") for part in "kv")
            self.kv_scale = context.parameter(ParamSpec(f"{prefix}.kv_scale", (2,), "float32", "kv_scale", sources))
        if config.qk_norm:
            self.q_norm = context.vector(f"{prefix}.q_norm.weight", config.head_dim)
            self.k_norm = context.vector(f"{prefix}.k_norm.weight", config.head_dim)

    def forward(
        self,
        x: GemmInput,
        batch: BatchInputs,
        pages: Tensor,
        residual: Tensor,
        norm: nn.Parameter,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, GemmInput]:
        """(T, H), residual (T, H) -> the residual stream with this layer, and its norm; writes K and V to `pages`.

        `rows`: (R,) int32, the tokens that are wanted; the others have their K and V, and no more.
        """
        kv, operators = PagedKV(pages, self.kv_scale), self._context.operators
        out = self._joined(x, batch, kv) or operators.attention(self.qkv(x), self._qk_norm(), batch, kv, self._shape)
        if rows is not None:
            out, residual = GemmInput(operators.take_rows(out.values, rows)), operators.take_rows(residual, rows)
        return self.o.add_to(residual, out, norm)

    def _joined(self, x: GemmInput, batch: BatchInputs, kv: PagedKV) -> GemmInput | None:
        config = self._context.config
        if config.qkv_bias or config.qk_norm:
            return None
        weight = GemmWeight(self.qkv.weight, self.qkv.scale)
        return self._context.operators.joined_attention(x, weight, batch, kv, self._shape)

    def append(self, x: GemmInput, batch: BatchInputs, pages: Tensor) -> Tensor:
        """(T, H) -> rotated queries, (T, Hq, D); writes K and V to `pages`, and attends to nothing."""
        kv = PagedKV(pages, self.kv_scale)
        return self._context.operators.append(self.qkv(x), self._qk_norm(), batch, kv, self._shape)

    def _qk_norm(self) -> tuple[nn.Parameter, nn.Parameter, float] | None:
        config = self._context.config
        return (self.q_norm, self.k_norm, config.rms_norm_eps) if config.qk_norm else None


class MLP(nn.Module):
    """Gated feed-forward layer: columns of gate and up are split, so the ranks' outputs are summed."""

    def __init__(self, context: GraphContext, prefix: str) -> None:
        config, sharding = context.config, context.sharding
        self._context = context
        self.gate_up = Linear(
            context,
            f"{prefix}.gate_up_proj",
            tuple(ParamSource(f"{prefix}.{part}_proj.weight", 0, "ffn") for part in ("gate", "up")),
            rows=2 * sharding.intermediate_size,
            columns=config.hidden_size,
            bias=tuple(ParamSource(f"{prefix}.{part}_proj.bias", 0, "ffn") for part in ("gate", "up"))
            if config.mlp_bias
            else (),
            interleave=context.operators.gate_up_interleave(sharding.intermediate_size),
        )
        self.down = Linear(
            context,
            f"{prefix}.down_proj",
            (ParamSource(f"{prefix}.down_proj.weight", 1, "ffn"),),
            rows=config.hidden_size,
            columns=sharding.intermediate_size,
            bias=(ParamSource(f"{prefix}.down_proj.bias", 0, "once"),) if config.mlp_bias else (),
        )

    def forward(
        self, x: GemmInput, residual: Tensor, norm: nn.Parameter, *, quantize: bool
    ) -> tuple[Tensor, GemmInput]:
        """(T, H), residual (T, H) -> the residual stream with this layer, and its norm, quantised if GEMMs want it."""
        config, sharding = self._context.config, self._context.sharding
        if not config.mlp_bias:
            joined = self._context.operators.joined_mlp(
                x,
                GemmWeight(self.gate_up.weight, self.gate_up.scale),
                GemmWeight(self.down.weight, self.down.scale),
                sharding.intermediate_size,
                residual,
                Norm(norm, config.rms_norm_eps),
                tp_size=sharding.tp_size,
                quantize=quantize,
            )
            if joined is not None:
                return joined
        return self.down.add_to(residual, self.gate_up.silu_mul(x), norm, quantize=quantize)


class DecoderLayer(nn.Module):
    """Attention and MLP with their norms. Each adds to the residual stream and gives the norm that comes next."""

    def __init__(self, context: GraphContext, prefix: str) -> None:
        hidden = context.config.hidden_size
        self.input_norm = context.vector(f"{prefix}.input_layernorm.weight", hidden)
        self.attention = Attention(context, f"{prefix}.self_attn")
        self.post_attention_norm = context.vector(f"{prefix}.post_attention_layernorm.weight", hidden)
        self.mlp = MLP(context, f"{prefix}.mlp")
