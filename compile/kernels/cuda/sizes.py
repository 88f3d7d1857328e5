"""Sizes of the buffers that a graph gives to the CUDA kernels; `attention.cu` and `sample.cu` check them."""

from __future__ import annotations

_MAX_SPLITS = 32
_DECODE_ROWS = 16


def attention_plan_size(num_tokens: int, num_slots: int) -> int:
    """Return the int32 words of the plan of a step with `num_tokens` tokens (the bucket's) of `num_slots` slots."""
    return 16 + 12 * (num_tokens + min(num_tokens, num_slots) * _MAX_SPLITS)


def attention_workspace_size(num_tokens: int, num_slots: int, num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """Return the float32 elements of the workspace that all layers share, for `num_heads` query heads of the rank."""
    group = num_heads // num_kv_heads
    rows = min(num_tokens, num_slots * (_DECODE_ROWS // group)) * group
    return attention_arrivals(num_slots, num_kv_heads) + rows * _MAX_SPLITS * num_kv_heads * (head_dim + 4)


def attention_arrivals(num_slots: int, num_kv_heads: int) -> int:
    """Return the words at the workspace's start that must be zero before its first use; the kernels leave them so."""
    return num_slots * _DECODE_ROWS * num_kv_heads
