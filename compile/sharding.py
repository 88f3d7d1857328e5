"""How a model is split over ranks: which heads, feed-forward columns and vocabulary rows each rank holds.

Attention is split by KV heads with their query heads. Where counts do not divide, zero head groups are added or KV
heads are replicated; padded query heads meet zero columns of o_proj, so the result is exact:

    9 query / 3 KV heads, TP=2:  4 groups of 3   rank 0: groups 0 1     rank 1: group 2 and a zero group
    8 query / 2 KV heads, TP=4:  each KV head on two ranks, with half of its query heads on each
    9 query / 3 KV heads, TP=8:  4 groups, each on two ranks; 3 query heads padded to 4, two on each
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tpserve.compile.config import ModelConfig
from tpserve.proto.manifest import SplitMap

PANEL_ROWS = 16
"""GEMM weights are packed in panels of this many output rows."""


@dataclass(frozen=True, slots=True)
class Sharding:
    """Per-rank sizes and the split maps that fill them from the checkpoint."""

    tp_size: int
    num_q_heads: int
    """Per rank."""
    num_kv_heads: int
    """Per rank."""
    intermediate_size: int
    """Per rank, a multiple of 16."""
    vocab_size: int
    """Per rank, a multiple of 16."""
    splits: dict[str, SplitMap]
    """q_heads, kv_heads, ffn, vocab; `once` gives a bias that is added after the sum to rank 0 alone. Of a head also
    hidden, by the rows of its projection."""


def shard(config: ModelConfig, tp_size: int) -> Sharding:
    """Split a model over `tp_size` ranks."""
    q_ranks, kv_ranks = _split_heads(config.num_attention_heads, config.num_kv_heads, tp_size)
    ffn = _round_up(-(-config.intermediate_size // tp_size), PANEL_ROWS)
    vocab = _round_up(-(-config.vocab_size // tp_size), PANEL_ROWS)
    return Sharding(
        tp_size=tp_size,
        num_q_heads=len(q_ranks[0]),
        num_kv_heads=len(kv_ranks[0]),
        intermediate_size=ffn,
        vocab_size=vocab,
        splits={
            "q_heads": SplitMap(config.head_dim, q_ranks, config.num_attention_heads * config.head_dim),
            "kv_heads": SplitMap(config.head_dim, kv_ranks, config.num_kv_heads * config.head_dim),
            "ffn": SplitMap(ffn, tuple((rank,) for rank in range(tp_size)), config.intermediate_size),
            "vocab": SplitMap(vocab, tuple((rank,) for rank in range(tp_size)), config.vocab_size),
            "once": SplitMap(config.hidden_size, ((0,), *(((None,),) * (tp_size - 1))), config.hidden_size),
        },
    )


def shard_head(layer: ModelConfig, tp_size: int) -> Sharding:
    """Split an EAGLE-3 head over `tp_size` ranks, given its layer."""
    sharding = shard(layer, tp_size)
    block = _round_up(-(-layer.hidden_size // tp_size), PANEL_ROWS)
    hidden = SplitMap(block, tuple((rank,) for rank in range(tp_size)), layer.hidden_size)
    return replace(sharding, splits=sharding.splits | {"hidden": hidden})


def _split_heads(
    num_q: int, num_kv: int, tp_size: int
) -> tuple[tuple[tuple[int | None, ...], ...], tuple[tuple[int | None, ...], ...]]:
    """Return, for each rank, its query heads and its KV heads; None is a head of zeros."""
    group = num_q // num_kv
    if num_kv >= tp_size:
        replicas = 1
        padded_kv = _round_up(num_kv, tp_size)
    else:
        padded_kv = 1
        while padded_kv < num_kv:
            padded_kv *= 2  # tp_size is a power of two, so this divides it
        replicas = tp_size // padded_kv
    group_part = -(-group // replicas)  # query heads of one KV head on one rank
    kv_per_rank = padded_kv * replicas // tp_size
    q_ranks: list[tuple[int | None, ...]] = []
    kv_ranks: list[tuple[int | None, ...]] = []
    for rank in range(tp_size):
        q_heads: list[int | None] = []
        kv_heads: list[int | None] = []
        for local in range(kv_per_rank):
            kv_head, replica = divmod(rank * kv_per_rank + local, replicas)
            kv_heads.append(kv_head if kv_head < num_kv else None)
            for i in range(replica * group_part, (replica + 1) * group_part):
                q_heads.append(kv_head * group + i if kv_head < num_kv and i < group else None)
        q_ranks.append(tuple(q_heads))
        kv_ranks.append(tuple(kv_heads))
    return tuple(q_ranks), tuple(kv_ranks)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
