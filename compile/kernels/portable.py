"""Portable TVM kernels of the operators that relax cannot express: paged rope + append and paged attention.

They run wherever TVM has a code generator, and are the plain twins that tuned kernels are compared with. Clear and
slow: every loop is serial, all arithmetic float32. Shapes: T tokens, S slots, P pages of a table;
`proto.manifest.KVLayout` has the pages, of float32, bfloat16 or e4m3. `kv_scale` is (2,): what is stored of keys is
multiplied by the first, of values by the second; ones where pages have no scales.
"""

# mypy: ignore-errors
# TVMScript is parsed, not run: its annotations are buffers and values that no type checker knows.

from __future__ import annotations

from functools import cache

import tvm
from tvm.script import tirx as T

from tpserve.compile.kernels.portable_numbers import narrowed, widened


@cache  # layers have the same shapes: it takes 0.1 s to parse
def rope_append(
    num_q_heads: int, num_kv_heads: int, head_dim: int, page_size: int, dtype: str, page_dtype: str
) -> tvm.tirx.PrimFunc:
    """Rotate q and k ("rotate half") at their positions, write k and v to their pages, return the rotated q.

    qkv is (T, (Hq + 2 Hkv) D) float32, the result (T, Hq, D) of `dtype`.
    """
    qkv_dim = (num_q_heads + 2 * num_kv_heads) * head_dim
    half = head_dim // 2

    @T.prim_func(private=True, s_tir=True)
    def rope_append_paged(
        var_qkv: T.handle,
        var_positions: T.handle,
        var_token_slots: T.handle,
        var_page_table: T.handle,
        var_rope: T.handle,
        var_kv_scale: T.handle,
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
        kv_scale = T.match_buffer(var_kv_scale, (2,), "float32")
        pages = T.match_buffer(var_pages, (num_pages, num_kv_heads, 2, head_dim * page_size), page_dtype)
        q_out = T.match_buffer(var_q_out, (num_tokens, num_q_heads, head_dim), dtype)
        for t in T.serial(num_tokens):
            with T.sblock("token"):
                first = T.sblock_alloc_buffer((1,), "float32")
                second = T.sblock_alloc_buffer((1,), "float32")
                for h, d in T.grid(num_q_heads + num_kv_heads, half):
                    first[0] = (
                        qkv[t, h * head_dim + d] * rope[positions[t], d]
                        - qkv[t, h * head_dim + half + d] * rope[positions[t], half + d]
                    )
                    second[0] = (
                        qkv[t, h * head_dim + half + d] * rope[positions[t], d]
                        + qkv[t, h * head_dim + d] * rope[positions[t], half + d]
                    )
                    if h < num_q_heads:
                        q_out[t, h, d] = narrowed(first[0], dtype)
                        q_out[t, h, half + d] = narrowed(second[0], dtype)
                    else:
                        first[0] = first[0] * (T.float32(1.0) / kv_scale[0])
                        second[0] = second[0] * (T.float32(1.0) / kv_scale[0])
                        pages[
                            page_table[token_slots[t], positions[t] // page_size],
                            h - num_q_heads,
                            0,
                            d * page_size + positions[t] % page_size,
                        ] = narrowed(first[0], page_dtype)
                        pages[
                            page_table[token_slots[t], positions[t] // page_size],
                            h - num_q_heads,
                            0,
                            (half + d) * page_size + positions[t] % page_size,
                        ] = narrowed(second[0], page_dtype)
                for h, d in T.grid(num_kv_heads, head_dim):
                    first[0] = qkv[t, (num_q_heads + num_kv_heads + h) * head_dim + d] * (T.float32(1.0) / kv_scale[1])
                    pages[
                        page_table[token_slots[t], positions[t] // page_size],
                        h,
                        1,
                        (positions[t] % page_size) * head_dim + d,
                    ] = narrowed(first[0], page_dtype)

    return rope_append_paged


@cache
def attention(
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    scale: float,
    window: int,
    dtype: str,
    page_dtype: str,
) -> tvm.tirx.PrimFunc:
    """Attend from each token to the positions of its slot up to its own, at most `window` of them if it is not 0.

    q is (T, Hq, D) of `dtype`, the result (T, Hq D) float32.
    """
    group = num_q_heads // num_kv_heads
    span = window if window > 0 else 2**31 - 1

    @T.prim_func(private=True, s_tir=True)
    def attention_paged(
        var_q: T.handle,
        var_kv_scale: T.handle,
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
        q = T.match_buffer(var_q, (num_tokens, num_q_heads, head_dim), dtype)
        kv_scale = T.match_buffer(var_kv_scale, (2,), "float32")
        pages = T.match_buffer(var_pages, (num_pages, num_kv_heads, 2, head_dim * page_size), page_dtype)
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
                        score[0] += widened(q[t, h, d], dtype) * widened(
                            pages[
                                page_table[token_slots[t], (first[0] + j) // page_size],
                                h // group,
                                0,
                                d * page_size + (first[0] + j) % page_size,
                            ],
                            page_dtype,
                        )
                    score[0] *= T.float32(scale) * kv_scale[0]
                    new_best[0] = T.max(best[0], score[0])
                    total[0] = total[0] * T.exp(best[0] - new_best[0]) + T.exp(score[0] - new_best[0])
                    for d in T.serial(head_dim):
                        acc[d] = acc[d] * T.exp(best[0] - new_best[0]) + T.exp(score[0] - new_best[0]) * widened(
                            pages[
                                page_table[token_slots[t], (first[0] + j) // page_size],
                                h // group,
                                1,
                                ((first[0] + j) % page_size) * head_dim + d,
                            ],
                            page_dtype,
                        )
                    best[0] = new_best[0]
                for d in T.serial(head_dim):
                    out[t, h * head_dim + d] = acc[d] / total[0] * kv_scale[1]

    return attention_paged
