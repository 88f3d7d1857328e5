"""Steps that verify drafts emit what plain decoding emits, bit for bit, whatever was drafted."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rank_group import Artifacts
from speculating import GREEDY, Driver, PlainDecoding, Text, assert_same, varied_texts
from text_models import write_byte_tokenizer
from tiny_models import MODELS
from tpserve.proto.manifest import Manifest
from tpserve.proto.messages import PromptChunk, SlotAdd, StepPlan
from tpserve.proto.rank import RankConfig
from tpserve.proto.speculation import Method, Speculation
from tpserve.worker import runner as runner_module
from tpserve.worker import verify as verify_module
from tpserve.worker.arrays import Array
from tpserve.worker.batch import Batch, DraftTokens
from tpserve.worker.errors import LibraryError, PlanError
from tpserve.worker.proposers.base import TextProposer
from tpserve.worker.runner import Runner

NUM_SLOTS = 8
MOST = 4
VOCAB = 200
MODEL = MODELS["llama_4q_2kv"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    MODEL.write(path)
    write_byte_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def config(folder: Path, artifacts: Artifacts) -> RankConfig:
    artifact = artifacts.build(folder, 1, max_num_batched_tokens=128, max_num_seqs=NUM_SLOTS, max_num_draft_tokens=MOST)
    return RankConfig(0, 1, folder, artifact, "auto", 64, NUM_SLOTS, 1, "unused", 10.0)


def start(config: RankConfig, method: Method | None = None, **options: Any) -> Runner:
    speculation = None if method is None else Speculation(method, MOST, **options)
    return Runner(replace(config, speculation=speculation), lambda done, total: None)


@pytest.fixture(scope="module")
def plain(config: RankConfig) -> Iterator[PlainDecoding]:
    """The same model in a replica that never speculates."""
    runner = start(config)
    yield PlainDecoding(Driver(runner, num_slots=NUM_SLOTS, speculates=False))
    runner.close()


@pytest.mark.parametrize("method", ["ngram", "suffix"])
@pytest.mark.parametrize("seed", range(3))
def test_text_and_logprobs_are_those_of_plain_decoding(
    config: RankConfig, plain: PlainDecoding, method: Method, seed: int
) -> None:
    texts = varied_texts(seed)
    runner = start(config, method, min_ngram=1)
    rng = random.Random(seed)
    lengths = [rng.randrange(MOST + 1) for _ in range(4000)]
    Driver(runner, num_slots=NUM_SLOTS).run(texts, lambda step: lengths[step])
    runner.close()
    assert sum(map(sum, (text.drafted for text in texts))) > 20
    assert max(max(text.counts) for text in texts) > 1
    assert_same(texts, plain.of(texts))


class Scripted(TextProposer):
    """Knows how every sequence goes on, and proposes that, but for what the script spoils.

    The script says for each proposal how many tokens are right, and what comes behind them.
    """

    def __init__(self, batch: Batch, expected: Sequence[Text], script: Callable[[], tuple[int, str]]) -> None:
        self._batch = batch
        self._expected = expected
        self._script = script
        self.promised: dict[tuple[int, ...], int] = {}
        """By what stood in a slot, how many right tokens were proposed."""

    def propose(self, slots: Array, limits: Array, num_draft_tokens: int) -> Array:
        out = np.full((len(slots), num_draft_tokens), -1, np.int32)
        for row, slot in enumerate(slots.tolist()):
            tokens = self._batch.tokens[slot, : self._batch.num_tokens[slot]].tolist()
            num_right, then = self._script()
            self.promised[tuple(tokens)] = min(num_right, int(limits[row]))
            for column, right in enumerate(self._following(tokens)[:num_draft_tokens]):
                if column < num_right:
                    out[row, column] = right
                elif then == "wrong":
                    out[row, column] = (right + 1 + column) % VOCAB
                elif then == "one wrong":
                    out[row, column] = (right + 1) % VOCAB if column == num_right else right
                elif then == "garbage":
                    out[row, column] = (-7, 1 << 30, VOCAB, -(1 << 31))[column % 4]
        return out

    def _following(self, tokens: list[int]) -> list[int]:
        for text in self._expected:
            if text.speculates and text.tokens[: len(tokens)] == tokens:
                return text.tokens[len(tokens) :]
        return []  # not one of them, or one that a planted bug has led astray


def assert_exact(texts: Sequence[Text], expected: Sequence[Text], promised: dict[tuple[int, ...], int]) -> None:
    """The text is that of plain decoding, and each step emitted all right tokens that were proposed and one more."""
    assert_same(texts, expected)
    for text in texts:
        count = len(text.prompt)
        for emitted in text.counts:
            assert emitted == promised.get(tuple(text.tokens[:count]), 0) + 1
            count += emitted


THENS = ("wrong", "one wrong", "garbage", "nothing")


@contextmanager
def scripted(
    config: RankConfig, expected: Sequence[Text], script: Callable[[], tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Runner, dict[tuple[int, ...], int]]]:
    proposers: list[Scripted] = []

    def make(_config: RankConfig, _wanted: Speculation, _manifest: Manifest, batch: Batch, *_: object) -> Scripted:
        proposers.append(Scripted(batch, expected, script))
        return proposers[-1]

    monkeypatch.setattr(runner_module, "make_proposer", make)
    runner = start(config, "ngram")
    yield runner, proposers[0].promised
    runner.close()


@pytest.mark.parametrize("seed", [10, 11])
def test_planted_proposals_of_every_kind_change_nothing(
    config: RankConfig, plain: PlainDecoding, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = varied_texts(seed, 16)
    expected = plain.of(texts)
    rng = random.Random(seed)
    script = lambda: (rng.randrange(MOST + 1), rng.choice(THENS))  # noqa: E731  # shortest here
    with scripted(config, expected, script, monkeypatch) as (runner, promised):
        Driver(runner, num_slots=NUM_SLOTS).run(texts, lambda step: 2 if step % 5 == 0 else MOST)
    assert_exact(texts, expected, promised)
    assert {count for text in texts for count in text.counts} == set(range(1, MOST + 2))
    assert {drafted for text in texts for drafted in text.drafted} == set(range(MOST + 1))
    assert not any(any(text.drafted) for text in texts if not text.speculates)


@pytest.mark.parametrize("num_right", range(MOST + 1))
@pytest.mark.parametrize("then", THENS)
def test_a_step_emits_what_was_right_and_one_more(
    config: RankConfig, plain: PlainDecoding, num_right: int, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Text([5, 6, 7], max_tokens=2 * (num_right + 1) + 1)
    expected = plain.of([text])
    with scripted(config, expected, lambda: (num_right, then), monkeypatch) as (runner, _):
        Driver(runner).run([text], MOST)
    assert_same([text], expected)
    right = min(num_right, MOST)
    assert text.counts == [1, right + 1, right + 1]  # the prompt's own token, then what is left in two steps


def _accept_always(draft: DraftTokens, alive: Array, wave: int, token_ids: Array) -> Array:
    counts = np.zeros(int(alive.max()) + 1, np.int32)
    counts[: len(draft.counts)] = draft.counts[: len(counts)]
    accepted: Array = counts[alive] > wave
    return accepted


def _accept_next(draft: DraftTokens, alive: Array, wave: int, token_ids: Array) -> Array:
    shifted = DraftTokens(np.roll(draft.token_ids, -1, axis=1), draft.counts)
    return _accepted(shifted, alive, wave, token_ids)


def _accept_neighbour(draft: DraftTokens, alive: Array, wave: int, token_ids: Array) -> Array:
    return _accepted(draft, alive, wave, np.roll(token_ids, 1))


def _row_before(logits: Any, rows: Array) -> Any:
    return _take_rows(logits, np.sort(np.maximum(rows - 1, 0)) if rows[0] else rows)


def _keeps_one_more(self: Batch, slots: Array, token_ids: Array, counts: Array) -> None:
    wide = np.concatenate([token_ids, token_ids[:, -1:]], axis=1)
    _commit_runs(self, slots, wide, counts + 1)


_accepted, _take_rows, _commit_runs = verify_module._accepted, verify_module._take_rows, Batch.commit_runs


@pytest.mark.parametrize(
    ("owner", "name", "bug"),
    [
        (verify_module, "_accepted", _accept_always),
        (verify_module, "_accepted", _accept_next),
        (verify_module, "_accepted", _accept_neighbour),
        (verify_module, "_take_rows", _row_before),
        (Batch, "commit_runs", _keeps_one_more),
    ],
)
def test_a_planted_bug_is_seen(
    config: RankConfig, plain: PlainDecoding, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, bug: Any
) -> None:
    """The comparison above fails if drafts are accepted by another rule, or logits or roll-back are a row off."""
    texts = varied_texts(12)
    expected = plain.of(texts)
    monkeypatch.setattr(owner, name, bug)
    rng = random.Random(1)
    with scripted(config, expected, lambda: (rng.randrange(MOST + 1), rng.choice(THENS)), monkeypatch) as (
        runner,
        promised,
    ):
        try:
            Driver(runner, num_slots=NUM_SLOTS).run(texts, MOST)
        except (PlanError, AssertionError):
            return  # it led to a plan or a result that cannot be
    with pytest.raises(AssertionError):
        assert_exact(texts, expected, promised)


def prompt_step(step: int, *slots: int, max_len: int = 0, pages: int = 2, num_tokens: int = 3) -> StepPlan:
    """Adds slots with prompts."""
    added = tuple(
        SlotAdd(slot, GREEDY, tuple(range(slot * pages, (slot + 1) * pages)), max_len=max_len) for slot in slots
    )
    chunks = tuple(PromptChunk(slot, 0, tuple(range(5, 5 + num_tokens)), sample=True) for slot in slots)
    return StepPlan(step, added_slots=added, chunks=chunks)


def test_a_slot_at_its_end_waits_to_be_removed(config: RankConfig) -> None:
    runner = start(config, "ngram")
    first = runner.execute(prompt_step(1, 0, 1, max_len=5))
    assert (first.slots, first.counts, first.drafted) == ((0, 1), (), ())  # nothing to say of a plain step
    second = runner.execute(prompt_step(2, 2, max_len=0))
    assert (second.slots, second.counts, len(second.token_ids)) == ((0, 1, 2), (), 3)
    third = runner.execute(StepPlan(3, num_draft_tokens=2))
    assert (third.slots, third.counts, len(third.token_ids)) == ((2, 0, 1), (1, 0, 0), 1)
    assert third.num_tokens == 1
    fourth = runner.execute(StepPlan(4, removed_slots=(2,)))
    assert (fourth.slots, fourth.counts, fourth.token_ids, fourth.num_tokens) == ((0, 1), (0, 0), (), 0)
    fifth = runner.execute(StepPlan(5, removed_slots=(0,)))
    assert (fifth.slots, fifth.counts) == ((1,), (0,))
    assert runner.execute(StepPlan(6, removed_slots=(1,))).slots == ()
    runner.close()


def test_nothing_is_drafted_past_the_end(
    config: RankConfig, plain: PlainDecoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Text([9, 8, 7, 6], max_tokens=7)
    expected = plain.of([text])
    with scripted(config, expected, lambda: (MOST, "nothing"), monkeypatch) as (runner, _):
        Driver(runner).run([text], MOST)
    assert text.drafted == [0, 4, 0]
    assert text.counts == [1, 5, 1]
    assert_same([text], expected)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (StepPlan(2, num_draft_tokens=5), "step 2 asks for 5 draft tokens, this replica verifies 4"),
        (StepPlan(2, num_draft_tokens=3), "step 2: a decoding slot has no page for its next token"),
        (StepPlan(2, removed_slots=(9,)), "step 2 names slot 9 of 8"),
        (prompt_step(2, 9, max_len=12), "step 2 names slot 9 of 8"),
    ],
)
def test_a_wrong_plan_is_refused(
    config: RankConfig, plan: StepPlan, message: str, plain: PlainDecoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Text([*range(5, 19)], max_tokens=20)
    expected = plain.of([text])
    with scripted(config, expected, lambda: (MOST, "nothing"), monkeypatch) as (runner, _):
        runner.execute(prompt_step(1, 0, max_len=34, pages=1, num_tokens=14))
        with pytest.raises(PlanError, match=message):
            runner.execute(plan)


def test_a_library_without_room_for_the_rows_is_refused(config: RankConfig, folder: Path, artifacts: Artifacts) -> None:
    narrow = artifacts.build(folder, 1, max_num_batched_tokens=128, max_num_seqs=NUM_SLOTS)
    with pytest.raises(
        LibraryError, match="4 draft tokens for each of 8 sequences need 40 rows in a step, the library"
    ):
        start(replace(config, artifact_dir=narrow), "ngram")


def test_a_replica_without_a_draft_refuses_to_speculate(config: RankConfig) -> None:
    runner = start(config)
    with pytest.raises(PlanError, match="step 1 lets slot 3 speculate: no draft is loaded"):
        runner.execute(prompt_step(1, 3, max_len=30))
    runner.close()
