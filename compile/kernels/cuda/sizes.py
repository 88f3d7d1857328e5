"""Sizes of the buffers that a graph gives to the CUDA kernels; `attention.cu` and `sample.cu` check them."""

from __future__ import annotations

_MAX_SPLITS = 32
_DECODE_ROWS = 16


def attention_plan_size(num_tokens: int, num_slots: int, decode_only: bool) -> int:
    """Return the int32 words of the plan of a step with `num_tokens` tokens (the bucket's) of `num_slots` slots.

    With `decode_only` each token is its slot's only one. The two sizes differ, and tell the kernels which plan it is.
    """
    most = min(num_tokens, num_slots)
    return 16 + 12 * (most * _MAX_SPLITS + (num_tokens - most if decode_only else num_tokens))


def attention_workspace_size(num_tokens: int, num_slots: int, num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """Return the float32 elements of the workspace that all layers share, for `num_heads` query heads of the rank.

    All bits are set before its first use: places for partial sums that are empty. The kernels leave it so.
    """
    group = num_heads // num_kv_heads
    rows = min(num_tokens, num_slots * (_DECODE_ROWS // group)) * group
    return rows * _MAX_SPLITS * num_kv_heads * (head_dim + 4)


def push_workspace_bytes(world_size: int, hidden_size: int) -> int:
    """Return about how much a rank lends to its group for collectives over peer memory."""
    rows = 3 * world_size * 128 + 3 * 512 + 3 * 512  # one-shot, two-shot, and what comes back of that
    return rows * hidden_size * 2 + 2 * world_size * (16 << 20)


def sampler_bytes(num_slots: int, num_rows: int, vocab_size: int, padded_vocab_size: int) -> int:
    """Return about what sampling keeps: adjusted logits by row, counts of output tokens and grammar masks by slot."""
    return 4 * num_rows * padded_vocab_size + num_slots * (4 * vocab_size + vocab_size // 8)
