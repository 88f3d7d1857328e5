"""Speculation on GPUs for some sequences of a batch: others have penalties or a grammar, and nobody's text changes.

The same ranks run the same requests without draft tokens. Steps of other sizes move bfloat16 logits by a little, so a
text may part where its two best tokens are about as good, and nowhere else; until then its log-probabilities are near.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from gpu.test_engine import GOLDENS, MAX_NUM_SEQS, TIE, check
from gpu.test_speculation import Cycle, make_scheduler, speculating
from rank_group import RankGroup
from tpserve.coordinator.request import Request
from tpserve.coordinator.scheduler import Scheduler
from tpserve.proto.messages import FinishReason, Grammar, GrammarKind, SamplingParams, StepResult, TokenLogprobs
from unit.compile.test_cuda_speculation import MOST

EOS = 2
TYPES = ("q0bf16", "auto")
NEAR = 2 * TIE[TYPES]
"""Log-probabilities of the two runs may differ by so much: a penalty that is counted twice moves them by `PENALTY`."""
PENALTY = 1.5
NUMBERS = Grammar(GrammarKind.REGEX, r"\d{3}-\d{4}(, \d{3}-\d{4}){2}", (EOS,))
NAMES = Grammar(GrammarKind.REGEX, r'\{"name": "[a-z]{1,12}", "age": [1-9]\d\}', (EOS,))
PROMPTS = (
    "Once upon a time",
    "The capital of France is",
    "A list: one, two, three, one, two,",
    "She said that he said",
)

CASES = [
    # TP of the model, of its draft, by which the ranks exchange activations, and where it drafts.
    pytest.param((1, 1, "auto", "colocated"), marks=pytest.mark.gpu(count=1), id="tp1"),
    pytest.param((2, 2, "push", "colocated"), marks=pytest.mark.gpu(count=2), id="tp2"),
    pytest.param((1, 1, "auto", "dedicated"), marks=pytest.mark.gpu(count=1), id="tp1-dedicated"),
]


@dataclass(slots=True)
class Answer:
    """What became of one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """Of its events."""
    finish: FinishReason | None = None
    detail: str = ""


@dataclass(slots=True)
class Run:
    """Answers by request, and what the steps said."""

    answers: list[Answer]
    results: list[StepResult] = field(default_factory=list)

    @property
    def mixed(self) -> list[StepResult]:
        """Steps that verified drafts of some slots and none of others, which went on."""
        return [
            result
            for result in self.results
            if any(result.drafted)
            and any(count and not drafted for count, drafted in zip(result.counts, result.drafted, strict=True))
        ]


class Engine:
    """Ranks with a draft, and the tokenizer of their model."""

    def __init__(self, ranks: RankGroup, model: Path) -> None:
        self._ranks = ranks
        self.tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))

    def ids(self, prompt: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(prompt, add_special_tokens=False).ids)

    def text(self, answer: Answer) -> str:
        return str(self.tokenizer.decode(answer.token_ids))

    def run(self, requests: Sequence[Request], scheduler: Scheduler) -> Run:
        """Run requests together, as many plans ahead of results as the scheduler makes."""
        run = Run([Answer() for _ in requests])
        for request in requests:
            scheduler.add_request(request)
        while scheduler.has_unfinished or scheduler.num_in_flight_steps:
            while (plan := scheduler.schedule()) is not None:
                self._ranks.submit(plan)
            run.results.append(self._ranks.wait())
            for event in scheduler.update(run.results[-1]):
                answer = run.answers[event.request_id]
                answer.token_ids += event.token_ids
                answer.logprobs += event.logprobs
                answer.sizes.append(len(event.token_ids))
                answer.finish, answer.detail = event.finish, event.detail
        self._ranks.clear()
        return run


@pytest.fixture(scope="module", params=CASES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with speculating(tmp_path_factory, *request.param) as (ranks, model):
        yield Engine(ranks, model)


@pytest.fixture(scope="module")
def goldens() -> list[dict[str, Any]]:
    prompts: list[dict[str, Any]] = json.loads(GOLDENS.read_text())["prompts"]
    return [prompt for prompt in prompts if len(prompt["prompt_token_ids"]) < 100][:6]


def mix(engine: Engine, goldens: list[dict[str, Any]]) -> list[Request]:
    """Return greedy requests of all kinds, of several lengths and more than there are slots: each kind follows others.

    The goldens' come first, in their order. The others have log-probabilities, and every third of them neither
    penalties nor a grammar.
    """
    greedy = SamplingParams(temperature=0.0)
    requests = [
        Request(number, tuple(golden["prompt_token_ids"]), greedy, len(golden["output_token_ids"]))
        for number, golden in enumerate(goldens)
    ]
    told = SamplingParams(temperature=0.0, num_logprobs=2)
    counted = SamplingParams(temperature=0.0, num_logprobs=2, frequency_penalty=PENALTY, presence_penalty=0.3)
    for number in range(18):
        prompt = engine.ids(f"{number}. {PROMPTS[number % len(PROMPTS)]}")
        grammar = (NUMBERS, NAMES)[number // 3 % 2] if number % 3 == 2 else None
        sampling = told if number % 3 == 0 else counted if number % 3 == 1 or number == 17 else told
        stops = frozenset({EOS}) if grammar is not None else frozenset()
        requests.append(Request(len(requests), prompt, sampling, 12 + 5 * (number % 7), 1, stops, grammar))
    assert len(requests) > MAX_NUM_SEQS
    return requests


def may_be_drafted_for(request: Request) -> bool:
    return request.grammar is None and not request.sampling.needs_output_history


def assert_the_same_but_for_ties(request: Request, plain: Answer, other: Answer) -> None:
    """Until the texts part, log-probabilities are near; they part where the two best are about as good."""
    assert len(plain.logprobs) == len(plain.token_ids)
    assert len(other.logprobs) == len(other.token_ids)
    for position, (want, have) in enumerate(zip(plain.token_ids, other.token_ids, strict=False)):
        expected, found = plain.logprobs[position], other.logprobs[position]
        where = f"request {request.request_id}, token {position}"
        if want != have:
            values = [value for _, value in expected.top]
            assert len(values) == 2, f"{where}: {have} where only {want} may come"
            assert values[0] - values[1] < TIE[TYPES], f"{where}: {have} for {want}, log-probabilities {values}"
            return
        assert abs(expected.logprob - found.logprob) < NEAR, f"{where}: {found.logprob}, alone {expected.logprob}"
    assert (len(plain.token_ids), plain.finish) == (len(other.token_ids), other.finish)


@pytest.mark.parametrize("lengths", [[3], [MOST], [0, 0, 0, 0, 2, 1, MOST]], ids=["3", "most", "switching"])
def test_texts_of_a_mix_are_those_of_plain_decoding(
    engine: Engine, goldens: list[dict[str, Any]], lengths: list[int]
) -> None:
    requests = mix(engine, goldens)
    plain = engine.run(requests, make_scheduler(0))
    run = engine.run(requests, make_scheduler(MOST, Cycle(lengths)))
    assert not any(any(result.drafted) for result in plain.results)
    assert len(run.mixed) > 5
    check(goldens, [answer.token_ids for answer in run.answers[: len(goldens)]], TYPES)
    several = 0
    for request, before, after in zip(requests, plain.answers, run.answers, strict=True):
        assert after.detail == ""
        if may_be_drafted_for(request):
            several += sum(size > 1 for size in after.sizes)
        else:
            assert set(after.sizes) == {1}
        if request.grammar is not None and after.finish is FinishReason.STOP:
            assert re.fullmatch(request.grammar.source, engine.text(after))
        if request.sampling.num_logprobs is not None:
            assert_the_same_but_for_ties(request, before, after)
    assert several > 20, "its own draft is hardly accepted"
    assert any(answer.finish is FinishReason.STOP for answer in run.answers)


def test_drafted_tokens_are_of_those_who_may_be_drafted_for(engine: Engine) -> None:
    """A batch that stays as it is: the slots are given in the order of the requests."""
    counted = SamplingParams(temperature=0.0, frequency_penalty=PENALTY)
    kinds: list[tuple[SamplingParams, Grammar | None]] = [
        (SamplingParams(temperature=0.0), None),
        (counted, None),
        (SamplingParams(temperature=1.0, seed=3), NUMBERS),
        (SamplingParams(temperature=0.8, seed=4), None),
        (SamplingParams(temperature=0.7, seed=5, presence_penalty=0.5), None),
    ]
    prompt = engine.ids(PROMPTS[0])
    requests = [
        Request(number, (*prompt, 100 + number), sampling, 24, grammar=grammar)
        for number, (sampling, grammar) in enumerate(kinds)
    ]
    run = engine.run(requests, make_scheduler(3))
    drafted = [0] * len(kinds)
    for result in run.results:
        for slot, number in zip(result.slots, result.drafted, strict=bool(result.drafted)):
            drafted[slot] += number
    assert [number > 0 for number in drafted] == [may_be_drafted_for(request) for request in requests]
    assert run.mixed


def test_after_grammars_slots_are_drafted_for_without_masks(engine: Engine, goldens: list[dict[str, Any]]) -> None:
    """Also by the draft, which samples with the masks that stand on the device."""
    bound = [
        Request(number, engine.ids("Call"), SamplingParams(temperature=0.0), 40, 1, frozenset({EOS}), NUMBERS)
        for number in range(MAX_NUM_SEQS)
    ]
    free = [
        Request(
            number, tuple(golden["prompt_token_ids"]), SamplingParams(temperature=0.0), len(golden["output_token_ids"])
        )
        for number, golden in enumerate(goldens)
    ]
    engine.run(bound, make_scheduler(3))
    run = engine.run(free, make_scheduler(3))
    check(goldens, [answer.token_ids for answer in run.answers], TYPES)
    drafted = sum(sum(result.drafted) for result in run.results)
    accepted = sum(count - 1 for result in run.results for count in result.counts if count)
    assert accepted > 0.6 * drafted, "its own draft is hardly accepted"
