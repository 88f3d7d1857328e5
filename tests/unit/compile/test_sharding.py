"""Which rank holds what: properties that make padded and replicated heads exact."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_models import MODELS
from tpserve.compile.config import ModelConfig
from tpserve.compile.sharding import Sharding, shard

TP_SIZES = st.sampled_from([1, 2, 4, 8])


def make_config(num_kv: int, group: int, *, intermediate: int = 64, vocab: int = 200) -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        hidden_size=64,
        intermediate_size=intermediate,
        num_layers=1,
        num_attention_heads=num_kv * group,
        num_kv_heads=num_kv,
        head_dim=16,
        vocab_size=vocab,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_window=None,
        stored_fp8=False,
        sha256="",
    )


def heads(sharding: Sharding, kind: str) -> tuple[tuple[int | None, ...], ...]:
    return sharding.splits[kind].ranks


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), TP_SIZES)
def test_every_query_head_is_on_one_rank_with_its_kv_head(num_kv: int, group: int, tp_size: int) -> None:
    sharding = shard(make_config(num_kv, group), tp_size)
    q_ranks, kv_ranks = heads(sharding, "q_heads"), heads(sharding, "kv_heads")
    assert len(q_ranks) == len(kv_ranks) == tp_size
    assert {len(rank) for rank in q_ranks} == {sharding.num_q_heads}
    assert {len(rank) for rank in kv_ranks} == {sharding.num_kv_heads}
    # A query head counted twice in o_proj's sum would be as wrong as one left out.
    assert sorted(head for rank in q_ranks for head in rank if head is not None) == list(range(num_kv * group))
    per_kv = sharding.num_q_heads // sharding.num_kv_heads
    assert per_kv * sharding.num_kv_heads == sharding.num_q_heads
    for q_heads, kv_heads in zip(q_ranks, kv_ranks, strict=True):
        for i, head in enumerate(q_heads):
            # The kernel pairs local query head i with local KV head i // per_kv.
            if head is not None:
                assert kv_heads[i // per_kv] == head // group


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), TP_SIZES)
def test_kv_heads_are_replicated_equally_and_only_when_they_are_few(num_kv: int, group: int, tp_size: int) -> None:
    kv_ranks = heads(shard(make_config(num_kv, group), tp_size), "kv_heads")
    counts = Counter(head for rank in kv_ranks for head in rank if head is not None)
    assert sorted(counts) == list(range(num_kv))
    assert len(set(counts.values())) == 1
    if num_kv >= tp_size:
        assert counts[0] == 1


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), TP_SIZES)
def test_columns_and_vocabulary_are_covered_once_in_whole_panels(intermediate: int, vocab: int, tp_size: int) -> None:
    sharding = shard(make_config(2, 2, intermediate=intermediate, vocab=vocab), tp_size)
    for kind, size, per_rank in (
        ("ffn", intermediate, sharding.intermediate_size),
        ("vocab", vocab, sharding.vocab_size),
    ):
        split = sharding.splits[kind]
        assert split.block == per_rank
        assert split.size == size
        assert per_rank % 16 == 0
        assert per_rank * tp_size >= size
        assert split.ranks == tuple((rank,) for rank in range(tp_size))
        assert per_rank * tp_size - size < 16 * tp_size  # no more padding than panels need


@given(TP_SIZES)
def test_a_bias_after_the_sum_is_on_one_rank(tp_size: int) -> None:
    split = shard(make_config(2, 2), tp_size).splits["once"]
    assert (split.block, split.size) == (64, 64)
    assert split.ranks == ((0,), *[(None,)] * (tp_size - 1))


@pytest.mark.parametrize(
    ("num_kv", "group", "tp_size", "q_heads", "kv_heads"),
    [
        (3, 3, 2, ((0, 1, 2, 3, 4, 5), (6, 7, 8, None, None, None)), ((0, 1), (2, None))),
        (2, 4, 4, ((0, 1), (2, 3), (4, 5), (6, 7)), ((0,), (0,), (1,), (1,))),
        (
            3,
            3,
            8,
            ((0, 1), (2, None), (3, 4), (5, None), (6, 7), (8, None), (None, None), (None, None)),
            ((0,), (0,), (1,), (1,), (2,), (2,), (None,), (None,)),
        ),
    ],
)
def test_the_examples_of_the_docstring(
    num_kv: int, group: int, tp_size: int, q_heads: tuple[object, ...], kv_heads: tuple[object, ...]
) -> None:
    sharding = shard(make_config(num_kv, group), tp_size)
    assert heads(sharding, "q_heads") == q_heads
    assert heads(sharding, "kv_heads") == kv_heads


def test_the_splits_know_the_size_of_what_they_split(tmp_path: Path) -> None:
    model = MODELS["llama_9q_3kv_tied"]
    model.write(tmp_path)
    weights = model.weights()
    splits = shard(ModelConfig.from_hf(tmp_path), 8).splits
    layer = "model.layers.0"
    for kind, size in (
        ("q_heads", weights[f"{layer}.self_attn.q_proj.weight"].shape[0]),
        ("kv_heads", weights[f"{layer}.self_attn.k_proj.weight"].shape[0]),
        ("ffn", weights[f"{layer}.mlp.down_proj.weight"].shape[1]),
        ("vocab", weights["model.embed_tokens.weight"].shape[0]),
        ("once", weights[f"{layer}.self_attn.o_proj.weight"].shape[0]),
    ):
        assert splits[kind].size == size
