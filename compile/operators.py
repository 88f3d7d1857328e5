"""The operators a model graph is made of: what a kernel set must offer, and what they take and give.

`tuned_operators` calls named externs of `compile/kernels/<target>`, `portable_operators` builds everything from TVM.
Collectives are externs in both.
Shapes: T tokens of the step, R sampled rows, S slots, P pages of a page table, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from tvm.relax.frontend.nn import Tensor, op

GROUP_SIZE = 128
"""Elements of an e4m3 row that have a scale of their own."""
STAGE_SIZE = 256
"""Elements that a GEMM takes at once: two groups."""


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

    @property
    def has_groups(self) -> bool:
        """Whether e4m3 output has grouped scales: of one head, or of heads beside each other with the same keys."""
        of_kv_head = self.num_q_heads // self.num_kv_heads * self.head_dim
        whole = GROUP_SIZE % self.head_dim == 0 and of_kv_head % GROUP_SIZE == 0
        return whole and self.num_q_heads * self.head_dim % STAGE_SIZE == 0


@dataclass(frozen=True, slots=True)
class GemmInput:
    """Rows that a GEMM takes."""

    values: Tensor
    """(T, K), of the activations' type, or e4m3."""
    scale: Tensor | None = None
    """For e4m3, float32: a value is its stored value times a scale. Of rows that the next GEMM norms: their sums of
    squares, in e4m3 behind the scales of its tiles."""
    scales: Literal["row", "grouped", "silu", "norm"] = "row"
    """(T,), one for each row; grouped, see `tuned_operators`: of 128 elements, or those that `gemm_silu_mul` gives; or
    sums of squares. Portable kernels have (T, places) of any kind."""


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
        """Return (residual + the MLP of x, its norm) of one call; None where two products are what there is.

        x is (T, H), of a norm that `gemm_sum_add_rms_norm` has begun; F = `intermediate_size` of the rank, no biases.
        """

    def joined_attention(
        self,
        x: GemmInput,
        qkv: GemmWeight,
        batch: BatchInputs,
        kv: PagedKV,
        shape: AttentionShape,
    ) -> GemmInput | None:
        """Return what `attention` gives of x's queries, keys and values, of one call; None where two are what there is.

        x is (T, H), of a norm that `gemm_sum_add_rms_norm` has begun; no biases, no norms of heads.
        """

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
        """Do as `attention`, but attend to nothing: return the rotated queries, (T, Hq, D).

        On a GPU for pages of bfloat16 and without norms alone.
        """

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """(T, H), (R,) int32 -> (R, H)."""

    def takes_rows_within(self, tp_size: int) -> bool:
        """Return whether `take_rows` may take them of what attention gives and of the residual stream within a layer.

        They must be whole on each rank, and not quantised.
        """

    def concat(self, parts: Sequence[Tensor]) -> Tensor:
        """(T, H) each, two or three -> side by side, (T, 2 H) or (T, 3 H)."""

    def whole_rows(self, x: Tensor, tp_size: int) -> Tensor:
        """(T, H), the residual stream as `gemm_sum_add_rms_norm` gives it for T rows -> whole in all, on each rank."""


def all_reduce(x: Tensor, tp_size: int) -> Tensor:
    """Sum over ranks, in rank order."""
    return x if tp_size == 1 else op.extern("tpserve.all_reduce", [x], Tensor.placeholder(x.shape, x.dtype))


def all_gather(x: Tensor, tp_size: int) -> Tensor:
    """(R, C) on each rank -> (R, tp_size * C), rank 0's columns first."""
    rows, columns = x.shape
    return op.extern("tpserve.all_gather", [x], Tensor.placeholder((rows, tp_size * columns), x.dtype))
