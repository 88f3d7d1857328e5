"""A draft model beside its target: its proposals are what it would sample, and the text is the target's."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from draft_pairs import DRAFT_TOKENS, MOST, NUM_PAGES, NUM_SLOTS, DedicatedPair, Pairs, started
from rank_group import Artifacts
from speculating import PAGE, VOCAB, Driver, Text, varied_texts
from tiny_models import knob_pair
from tpserve.proto.messages import PromptChunk, SamplingParams, SlotAdd, StepPlan
from tpserve.proto.speculation import DraftPlacement
from tpserve.worker.arrays import Array
from tpserve.worker.proposers.draft import DraftModel
from tpserve.worker.runner import Runner

KNOB = 0.7
"""Drafts that are often wrong."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, artifacts: Artifacts) -> Pairs:
    return Pairs(tmp_path_factory.mktemp("pairs"), artifacts)


def draft_of(runner: Runner | DedicatedPair) -> DraftModel:
    speculator = runner._speculator if isinstance(runner, Runner) else runner.draft._speculator
    assert speculator is not None
    proposer = speculator._proposer
    assert isinstance(proposer, DraftModel)
    return proposer


class FreshDraft:
    """The draft as a model of its own, which computes a whole prefix and samples on."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._step = 0

    def continued(self, tokens: Sequence[int], text: Text, count: int) -> list[int]:
        """`count` tokens behind a prefix of a sequence."""
        pages = tuple(range(len(tokens) // PAGE + 2))
        sampling = replace(text.sampling, num_logprobs=None, wants_hidden=False)
        output = tuple(tokens[len(text.prompt) :]) if sampling.needs_output_history else ()
        added: tuple[SlotAdd, ...] = (SlotAdd(0, sampling, pages, output),)
        for begin in range(0, len(tokens), DRAFT_TOKENS):
            part = tuple(tokens[begin : begin + DRAFT_TOKENS])
            chunk = PromptChunk(0, begin, part, sample=begin + len(part) == len(tokens))
            out = list(self._execute(added_slots=added, chunks=(chunk,)))
            added = ()
        while len(out) < count:
            out += self._execute()
        self._execute(removed_slots=(0,))
        return out

    def _execute(self, **fields: Any) -> tuple[int, ...]:
        self._step += 1
        return self._runner.execute(StepPlan(self._step, **fields)).token_ids


@dataclass(slots=True)
class Proposals:
    """What a draft proposed while it was watched."""

    driver: Driver
    """Whose sequences they are of."""
    made: list[tuple[Text, list[int], list[int]]] = field(default_factory=list)
    """The sequence, what stood in the slot, and the proposal."""
    num_late: int = 0
    """Slots that might have drafted, and had not caught up."""
    num_hits: int = 0
    """Pages found in the prefix cache with their draft KV."""
    num_invalid_hits: int = 0
    """Pages found without it."""
    forwards: list[list[int]] = field(default_factory=list)
    """By round, the tokens of each forward of the draft."""


def watch(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> Proposals:
    draft = draft_of(runner)
    seen = Proposals(Driver(runner, num_slots=NUM_SLOTS, num_pages=NUM_PAGES, caches=True))
    propose, add, forward = draft.propose, draft.add, draft._model.step

    def watched(slots: Array, limits: Array, count: int) -> Array:
        seen.forwards.append([])
        out = propose(slots, limits, count)
        assert ((out >= 0) <= (np.arange(count) < limits[:, None])).all()
        for row, slot in enumerate(slots.tolist()):
            proposed = out[row][out[row] >= 0].tolist()
            length = draft._batch.num_tokens[slot]
            if proposed:
                assert len(proposed) == limits[row]
                (text,) = (text for text in seen.driver.running if text.slot == slot)
                seen.made.append((text, draft._batch.tokens[slot, :length].tolist(), proposed))
            else:
                seen.num_late += bool(limits[row])
        return out

    def watched_add(added: SlotAdd) -> None:
        add(added)
        num_hits = len(added.prefix_token_ids) // PAGE
        num_valid = int(draft._num_computed[added.slot]) // PAGE
        seen.num_hits += num_valid
        seen.num_invalid_hits += num_hits - num_valid

    def watched_forward(token_ids: Array, *rest: Any) -> Any:
        seen.forwards[-1].append(len(token_ids))
        return forward(token_ids, *rest)

    monkeypatch.setattr(draft, "propose", watched)
    monkeypatch.setattr(draft, "add", watched_add)
    monkeypatch.setattr(draft._model, "step", watched_forward)
    return seen


def long_run(driver: Driver, seed: int, rounds: int = 300) -> None:
    """Many sequences with shared beginnings come, draft, do not, and leave."""
    rng = random.Random(seed)
    stems = [[rng.randrange(VOCAB) for _ in range(rng.choice([20, 40, 70]))] for _ in range(3)]
    # One drafts, one grows into its pages and stops drafting on the way, one finds what that one left.
    first = Text(stems[0][:20], max_tokens=60)
    driver.run([first], MOST)
    second = Text(first.tokens[:40], SamplingParams(seed=seed), max_tokens=60)
    driver.run([second], lambda step: int(step < 10))
    driver.run([Text(second.tokens, max_tokens=10)], MOST)
    texts: list[Text] = []
    num_draft_tokens = MOST
    for _ in range(rounds):
        coming: list[Text] = []
        leaving: list[Text] = []
        if len(driver.running) < 5 and rng.random() < 0.4:
            stem = rng.choice([*stems, *(text.tokens for text in texts[-4:] if text.over)])
            prompt = [*stem[:100], *(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 12)))]
            (text,) = varied_texts(rng.randrange(1 << 30), 1)
            coming.append(text.again(prompt=prompt, start_step=0, grammar=None, max_tokens=rng.randrange(2, 60)))
            texts += coming
        elif driver.running and rng.random() < 0.03:
            leaving.append(rng.choice(driver.running))
        if rng.random() < 0.1:
            num_draft_tokens = rng.choice([0, 0, 1, 3, MOST, MOST])
        driver.step(coming, num_draft_tokens, leaving)


def check_against_fresh(seen: Proposals, fresh: FreshDraft) -> None:
    for text, tokens, proposed in seen.made:
        assert proposed == fresh.continued(tokens, text, len(proposed))


@pytest.fixture(scope="module")
def fresh(pairs: Pairs) -> Iterator[FreshDraft]:
    draft = knob_pair(KNOB)[1]
    with started(pairs.alone(draft, f"draft-{VOCAB}", DRAFT_TOKENS)) as runner:
        yield FreshDraft(runner)


@pytest.mark.parametrize(("placement", "seed"), [("colocated", 0), ("colocated", 1), ("dedicated", 1)])
def test_proposals_are_those_of_a_draft_that_computed_the_prefix_at_once(
    pairs: Pairs, fresh: FreshDraft, placement: DraftPlacement, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with started(pairs.config(KNOB, placement=placement)) as runner:
        seen = watch(runner, monkeypatch)
        long_run(seen.driver, seed)
    assert len(seen.made) > 200
    assert min(seen.num_late, seen.num_hits, seen.num_invalid_hits) > 10
    check_against_fresh(seen, fresh)


def _roll_back_late(self: DraftModel, slots: Array, limits: Array, count: int) -> Array:
    last = self._batch.num_tokens[slots] - 1  # of the last round's tokens or of a plain step's behind it
    self._num_computed[slots] = np.minimum(self._num_computed[slots], last)
    return _propose(self, slots, limits, count)


def _trust_hits(self: DraftModel, added: SlotAdd) -> None:
    _add(self, added)
    self._num_computed[added.slot] = len(added.prefix_token_ids)


def _trust_pages(self: DraftModel, added: SlotAdd) -> None:
    valid = self._valid.copy()
    _add(self, added)
    self._valid[:] = valid


def _one_short(self: DraftModel, slots: Array, behind: Array) -> Array:
    self._num_computed[slots] += np.where(behind > 2, 1, 0).astype(np.int32)
    return _catch_up(self, slots, np.where(behind > 2, behind - 1, behind))


def _whole_too_soon(self: DraftModel, slots: Array) -> None:
    _settle(self, slots)
    self._valid[self._batch.page_table[slots, self._num_valid[slots]]] = True


_propose, _settle, _add, _catch_up = DraftModel.propose, DraftModel.settle, DraftModel.add, DraftModel._catch_up


@pytest.mark.parametrize(
    "bugs",
    [
        {"propose": _roll_back_late, "settle": lambda self, slots: None},
        {"add": _trust_hits},
        {"add": _trust_pages},
        {"grow": lambda self, page: None},
        {"settle": _whole_too_soon},
        {"_catch_up": _one_short},
        {},
    ],
    ids=lambda bugs: " ".join(bugs) or "counts",
)
def test_a_draft_out_of_step_is_seen(
    pairs: Pairs, fresh: FreshDraft, bugs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, bug in bugs.items():
        monkeypatch.setattr(DraftModel, name, bug)
    if not bugs:
        monkeypatch.setattr("tpserve.worker.sampler.Sampler.copy_counts", lambda self, source, slots: None)
    assert any(is_seen(pairs, fresh, seed, monkeypatch) for seed in range(4))  # most are in the first run


def is_seen(pairs: Pairs, fresh: FreshDraft, seed: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    with started(pairs.config(KNOB)) as runner:
        seen = watch(runner, monkeypatch)
        long_run(seen.driver, seed)
    try:
        check_against_fresh(seen, fresh)
    except AssertionError:
        return True
    return False
