"""What the sampler keeps for each slot, given to the real sampling kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rank_group import Artifacts
from tiny_models import MODELS
from tpserve.proto.messages import SamplingParams, SlotAdd, TokenLogprobs
from tpserve.worker.arrays import aligned_zeros, as_tensor
from tpserve.worker.library import load_kernels
from tpserve.worker.sampler import Sampler

VOCAB = 50
PADDED = 64
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory, artifacts: Artifacts) -> Callable[..., None]:
    folder = tmp_path_factory.mktemp("model")
    MODELS["llama_4q_2kv"].write(folder)
    function: Callable[..., None] = load_kernels(artifacts.build(folder, 1))["sample"]
    return function


def falling_logits(num_rows: int) -> Any:
    """Token 0 is best by 0.5, then 1, ...; what is past the vocabulary is larger than all."""
    logits = aligned_zeros((num_rows, PADDED), np.float32)
    logits[:] = 20 - 0.5 * np.arange(PADDED)
    logits[:, VOCAB:] = 1e9
    return logits


def sample(sampler: Sampler, *slots: int, position: int = 5) -> tuple[list[int], dict[int, TokenLogprobs]]:
    def array(values: list[int]) -> Any:
        out = aligned_zeros((len(values),), np.int32)
        out[:] = values
        return out

    positions = array([position] * len(slots))
    ids, logprobs = sampler.sample(as_tensor(falling_logits(len(slots))), array(list(slots)), positions)
    return ids.tolist(), logprobs


def test_each_slot_has_its_own_parameters(kernel: Callable[..., None]) -> None:
    sampler = Sampler(kernel, 4, VOCAB)
    sampler.add(SlotAdd(0, GREEDY, ()))
    sampler.add(SlotAdd(2, replace(GREEDY, logit_bias=((7, 100.0),)), ()))
    sampler.add(SlotAdd(3, SamplingParams(temperature=100.0, top_k=1), ()))
    assert sample(sampler, 3, 0, 2)[0] == [0, 0, 7]
    assert sample(sampler, 2)[0] == [7]


def test_bias_tables_grow_and_keep_what_others_have(kernel: Callable[..., None]) -> None:
    sampler = Sampler(kernel, 4, VOCAB)
    sampler.add(SlotAdd(1, replace(GREEDY, logit_bias=((9, 50.0),)), ()))
    forbid = tuple((token, -100.0) for token in range(VOCAB - 1))
    sampler.add(SlotAdd(2, replace(GREEDY, logit_bias=forbid), ()))
    sampler.add(SlotAdd(0, replace(GREEDY, logit_bias=((0, -1.2), (4, 1.6))), ()))
    assert sample(sampler, 0, 1, 2)[0] == [4, 9, VOCAB - 1]
    # The next sequence of a slot has none of its predecessor's.
    sampler.add(SlotAdd(2, GREEDY, ()))
    assert sample(sampler, 2)[0] == [0]


def test_penalties_count_the_output_alone_and_from_before_a_preemption(kernel: Callable[..., None]) -> None:
    sampler = Sampler(kernel, 4, VOCAB)
    sampler.add(SlotAdd(0, GREEDY, ()))
    penalised = replace(GREEDY, frequency_penalty=0.6)
    sampler.add(SlotAdd(1, penalised, ()))
    # Each choice costs its token 0.6, where neighbours are 0.5 apart.
    first = [sample(sampler, 0, 1)[0] for _ in range(4)]
    assert [ids[0] for ids in first] == [0, 0, 0, 0]
    assert [ids[1] for ids in first] == [0, 1, 0, 2]
    # In another slot, as after a preemption: it goes on where it stood.
    sampler.add(SlotAdd(3, penalised, (), output_token_ids=(0, 1, 0, 2)))
    assert [sample(sampler, 3)[0] for _ in range(3)] == [sample(sampler, 1)[0] for _ in range(3)]
    # The next sequence of the slot starts from nothing.
    sampler.add(SlotAdd(3, replace(GREEDY, presence_penalty=1.1), ()))
    assert [sample(sampler, 3)[0][0] for _ in range(4)] == [0, 1, 2, 0]


def test_logprobs_come_for_the_slots_that_asked(kernel: Callable[..., None]) -> None:
    sampler = Sampler(kernel, 4, VOCAB)
    sampler.add(SlotAdd(0, GREEDY, ()))
    sampler.add(SlotAdd(1, replace(GREEDY, num_logprobs=0), ()))
    sampler.add(SlotAdd(2, replace(GREEDY, num_logprobs=3), ()))
    _, logprobs = sample(sampler, 2, 0, 1)
    assert sorted(logprobs) == [1, 2]
    logits = falling_logits(1)[0, :VOCAB].astype(np.float64)
    expected = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert logprobs[1].logprob == pytest.approx(expected[0], abs=1e-5)
    assert logprobs[1].top == ()
    assert [token for token, _ in logprobs[2].top] == [0, 1, 2]
    np.testing.assert_allclose([value for _, value in logprobs[2].top], expected[:3], atol=1e-5)


def test_a_seed_of_64_bits_and_the_position_decide_the_draw(kernel: Callable[..., None]) -> None:
    sampler = Sampler(kernel, 4, VOCAB)
    hot = SamplingParams(temperature=50.0)
    for slot, seed in enumerate((1, 2**64 - 1, 1, 2**64 - 2)):
        sampler.add(SlotAdd(slot, replace(hot, seed=seed), ()))
    draws = np.array([sample(sampler, 0, 1, 2, 3, position=position)[0] for position in range(20)])
    assert (draws[:, 0] == draws[:, 2]).all()
    for one, two in ((0, 1), (1, 3), (0, 3)):
        assert (draws[:, one] != draws[:, two]).any()
    assert len(set(draws[:, 0].tolist())) > 5
    assert draws.max() < VOCAB
