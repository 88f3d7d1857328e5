"""Portable TVM kernels of the operators that relax cannot express: paged rope + append and paged attention.

They run wherever TVM has a code generator, and are the plain twins that tuned kernels are compared with. Clear and
slow: every loop is serial. Shapes: T tokens, S slots, P pages of a table; `proto.manifest.KVLayout` has the pages.
"""

# mypy: ignore-errors
# TVMScript is parsed, not run: its annotations are buffers and values that no type checker knows.

from __future__ import annotations

import tvm
from tvm.script import tirx as T


def rope_append(num_q_heads: int, num_kv_heads: int, head_dim: int, page_size: int) -> tvm.tirx.PrimFunc:
    """Rotate q and k ("rotate half") at their positions, write k and v to their pages, return the rotated q."""
    qkv_dim = (num_q_heads + 2 * num_kv_heads) * head_dim
    half = head_dim // 2

    @T.prim_func(private=True, s_tir=True)
    def rope_append_paged(
        var_qkv: T.handle,
        var_positions: T.handle,
        var_token_slots: T.handle,
        var_page_table: T.handle,
        var_rope: T.handle,
        var_pages: T.handle,
        var_q_out: T.handle,
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        num_tokens = T.int64()
        num_slots = T.int64()
        max_pages = T.int64()
        max_len = T.int64()
        num_pages = T.int64()
        qkv = T.match_buffer(var_qkv, (num_tokens, qkv_dim), "float32")
        positions = T.match_buffer(var_positions, (num_tokens,), "int32")
        token_slots = T.match_buffer(var_token_slots, (num_tokens,), "int32")
        page_table = T.match_buffer(var_page_table, (num_slots, max_pages), "int32")
        rope = T.match_buffer(var_rope, (max_len, head_dim), "float32")
        pages = T.match_buffer(var_pages, (num_pages, num_kv_heads, 2, head_dim * page_size), "float32")
        q_out = T.match_buffer(var_q_out, (num_tokens, num_q_heads, head_dim), "float32")
        for t in T.serial(num_tokens):
            with T.sblock("token"):
                for h, d in T.grid(num_q_heads, half):
                    q_out[t, h, d] = (
                        qkv[t, h * head_dim + d] * rope[positions[t], d]
                        - qkv[t, h * head_dim + half + d] * rope[positions[t], half + d]
                    )
                    q_out[t, h, half + d] = (
                        qkv[t, h * head_dim + half + d] * rope[positions[t], d]
                        + qkv[t, h * head_dim + d] * rope[positions[t], half + d]
                    )
                for h, d in T.grid(num_kv_heads, half):
                    pages[
                        page_table[token_slots[t], positions[t] // page_size],
                        h,
                        0,
                        d * page_size + positions[t] % page_size,
                    ] = (
                        qkv[t, (num_q_heads + h) * head_dim + d] * rope[positions[t], d]
                        - qkv[t, (num_q_heads + h) * head_dim + half + d] * rope[positions[t], half + d]
                    )
                    pages[
                        page_table[token_slots[t], positions[t] // page_size],
                        h,
                        0,
                        (half + d) * page_size + positions[t] % page_size,
                    ] = (
                        qkv[t, (num_q_heads + h) * head_dim + half + d] * rope[positions[t], d]
                        + qkv[t, (num_q_heads + h) * head_dim + d] * rope[positions[t], half + d]
                    )
                for h, d in T.grid(num_kv_heads, head_dim):
                    pages[
                        page_table[token_slots[t], positions[t] // page_size],
                        h,
                        1,
                        (positions[t] % page_size) * head_dim + d,
                    ] = qkv[t, (num_q_heads + num_kv_heads + h) * head_dim + d]

    return rope_append_paged


def attention(
    num_q_heads: int, num_kv_heads: int, head_dim: int, page_size: int, scale: float, window: int
) -> tvm.tirx.PrimFunc:
    """Attend from each token to the positions of its slot up to its own, at most `window` of them if it is not 0."""
    group = num_q_heads // num_kv_heads
    span = window if window > 0 else 2**31 - 1

    @T.prim_func(private=True, s_tir=True)
    def attention_paged(
        var_q: T.handle,
        var_pages: T.handle,
        var_positions: T.handle,
        var_token_slots: T.handle,
        var_page_table: T.handle,
        var_out: T.handle,
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        num_tokens = T.int64()
        num_slots = T.int64()
        max_pages = T.int64()
        num_pages = T.int64()
        q = T.match_buffer(var_q, (num_tokens, num_q_heads, head_dim), "float32")
        pages = T.match_buffer(var_pages, (num_pages, num_kv_heads, 2, head_dim * page_size), "float32")
        positions = T.match_buffer(var_positions, (num_tokens,), "int32")
        token_slots = T.match_buffer(var_token_slots, (num_tokens,), "int32")
        page_table = T.match_buffer(var_page_table, (num_slots, max_pages), "int32")
        out = T.match_buffer(var_out, (num_tokens, num_q_heads * head_dim), "float32")
        for t, h in T.grid(num_tokens, num_q_heads):
            with T.sblock("head"):
                acc = T.sblock_alloc_buffer((head_dim,), "float32")
                best = T.sblock_alloc_buffer((1,), "float32")
                new_best = T.sblock_alloc_buffer((1,), "float32")
                total = T.sblock_alloc_buffer((1,), "float32")
                score = T.sblock_alloc_buffer((1,), "float32")
                first = T.sblock_alloc_buffer((1,), "int32")
                best[0] = T.float32(-3.0e38)
                total[0] = 0.0
                first[0] = T.max(positions[t] - (span - 1), 0)
                for d in T.serial(head_dim):
                    acc[d] = 0.0
                for j in T.serial(positions[t] + 1 - first[0]):
                    score[0] = 0.0
                    for d in T.serial(head_dim):
                        score[0] += (
                            q[t, h, d]
                            * pages[
                                page_table[token_slots[t], (first[0] + j) // page_size],
                                h // group,
                                0,
                                d * page_size + (first[0] + j) % page_size,
                            ]
                        )
                    score[0] *= T.float32(scale)
                    new_best[0] = T.max(best[0], score[0])
                    total[0] = total[0] * T.exp(best[0] - new_best[0]) + T.exp(score[0] - new_best[0])
                    for d in T.serial(head_dim):
                        acc[d] = (
                            acc[d] * T.exp(best[0] - new_best[0])
                            + T.exp(score[0] - new_best[0])
                            * pages[
                                page_table[token_slots[t], (first[0] + j) // page_size],
                                h // group,
                                1,
                                ((first[0] + j) % page_size) * head_dim + d,
                            ]
                        )
                    best[0] = new_best[0]
                for d in T.serial(head_dim):
                    out[t, h * head_dim + d] = acc[d] / total[0]

    return attention_paged
