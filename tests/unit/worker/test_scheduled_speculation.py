"""Speculation under the real scheduler: plans in flight, preemption, prefix hits, choices, aborts, a lost rank."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import pytest

from draft_pairs import MOST, NUM_SLOTS, Pairs, start, started
from rank_group import Artifacts
from speculating import VOCAB, WORDS, Executor
from text_models import EOS
from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.request import Request
from tpserve.coordinator.scheduler import Scheduler
from tpserve.proto.messages import FinishReason, SamplingParams, StepPlan, StepResult, TokenLogprobs
from tpserve.proto.rank import RankConfig
from tpserve.proto.speculation import DraftPlacement, Speculation


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, artifacts: Artifacts) -> Pairs:
    return Pairs(tmp_path_factory.mktemp("pairs"), artifacts)


@dataclass(slots=True)
class Choice:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None


@dataclass(slots=True)
class Outcome:
    choices: dict[tuple[int, int], Choice]
    results: list[StepResult]
    num_preemptions: int
    num_hits: int


def serve(
    config: RankConfig,
    requests: Sequence[Request],
    *,
    ahead: int = 2,
    num_pages: int = 64,
    drafts_on_device: bool = False,
    aborts: dict[int, int] | None = None,
    lose_after: int | None = None,
) -> Outcome:
    """Run requests to their end.

    Parameters
    ----------
    drafts_on_device
        Plan as for a GPU.
    aborts
        By request id, the tokens after which its client goes.
    lose_after
        Results after which the rank is lost and another one starts.
    """
    aborts = dict(aborts or {})
    scheduler = Scheduler(
        SchedulerConfig(
            NUM_SLOTS,
            64,
            128,
            16,
            num_pages,
            max_in_flight_steps=ahead,
            max_num_draft_tokens=0 if config.speculation is None else MOST,
            drafts_on_device=drafts_on_device,
        )
    )
    for request in requests:
        scheduler.add_request(request)
    outcome = Outcome({(r.request_id, c): Choice() for r in requests for c in range(r.n)}, [], 0, 0)
    pending: deque[StepResult] = deque()
    step, second = 0, None
    with started(config) as first:
        runner: Executor = first
        while scheduler.has_unfinished or pending:
            while (plan := scheduler.schedule()) is not None:
                scheduler.check_integrity()
                step += 1
                result = runner.execute(replace(StepPlan.from_pb(plan.to_pb()), step_id=step))
                pending.append(replace(result, step_id=plan.step_id))
            if lose_after is not None and len(outcome.results) >= lose_after:
                lose_after = None
                pending.clear()
                second = runner = start(config)
                scheduler.reset_after_group_loss()
                continue
            outcome.results.append(pending.popleft())
            for event in scheduler.update(outcome.results[-1]):
                choice = outcome.choices[event.request_id, event.choice]
                choice.token_ids += event.token_ids
                choice.logprobs += event.logprobs
                choice.finish = event.finish
                if len(choice.token_ids) >= aborts.get(event.request_id, 1 << 30):
                    scheduler.abort(event.request_id)
                    del aborts[event.request_id]
        if second is not None:
            second.close()
    stats = scheduler.stats()
    outcome.num_preemptions, outcome.num_hits = stats.num_preemptions, stats.num_prefix_hit_tokens
    return outcome


def requests_of_all_kinds(seed: int, *, grammars: bool = True) -> list[Request]:
    rng = random.Random(seed)
    stem = tuple(rng.randrange(VOCAB) for _ in range(40))
    out = []
    for number in range(12):
        prompt = stem[: rng.choice([0, 20, 35, 40])] + tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30)))
        sampling = SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            frequency_penalty=rng.choice([0.0, 0.5]),
            seed=rng.randrange(1 << 62),
            num_logprobs=rng.choice([None, 2]),
        )
        grammar = WORDS if grammars and rng.random() < 0.3 else None
        stops = frozenset({EOS, *range(10)}) if rng.random() < 0.5 else frozenset({EOS})
        out.append(Request(number, prompt, sampling, rng.randrange(1, 50), rng.choice([1, 1, 3]), stops, grammar))
    return out


def assert_same(one: Outcome, other: Outcome, but: Sequence[int] = ()) -> None:
    for key, choice in one.choices.items():
        if key[0] not in but:
            assert choice == other.choices[key], key


@pytest.fixture(scope="module", params=get_args(DraftPlacement))
def sure(request: pytest.FixtureRequest, pairs: Pairs) -> RankConfig:
    """A target of whose drafts each is right, if the draft has the right KV."""
    return pairs.config(0.0, placement=request.param)


@pytest.fixture(params=["colocated", "dedicated", "ngram", "suffix"])
def speculating(request: pytest.FixtureRequest, pairs: Pairs) -> RankConfig:
    if request.param in get_args(DraftPlacement):
        return pairs.config(0.1, placement=request.param)
    return replace(pairs.config(0.1), speculation=Speculation(request.param, MOST))


@pytest.fixture(scope="module")
def expected(pairs: Pairs) -> Outcome:
    return serve(replace(pairs.config(0.1), speculation=None), requests_of_all_kinds(1))


@pytest.mark.parametrize("ahead", [1, 3])
def test_answers_are_those_of_plain_decoding(speculating: RankConfig, expected: Outcome, ahead: int) -> None:
    outcome = serve(speculating, requests_of_all_kinds(1), ahead=ahead)
    assert_same(expected, outcome)
    assert max(max(result.counts, default=1) for result in outcome.results) > 1


def test_answers_are_those_of_plain_decoding_when_pages_are_few(speculating: RankConfig, expected: Outcome) -> None:
    outcome = serve(speculating, requests_of_all_kinds(1), num_pages=9)
    assert outcome.num_preemptions > 0
    assert outcome.num_hits > 16
    assert_same(expected, outcome)


@pytest.mark.parametrize("num_pages", [64, 9])
def test_answers_are_those_of_plain_decoding_where_only_some_are_drafted_for(
    pairs: Pairs, expected: Outcome, num_pages: int
) -> None:
    """As a GPU's steps are planned: penalties and grammars decode plainly beside the others' drafts."""
    outcome = serve(pairs.config(0.1), requests_of_all_kinds(1), num_pages=num_pages, drafts_on_device=True)
    assert_same(expected, outcome)
    beside = 0
    for result in outcome.results:
        if any(result.drafted):
            beside += any(count and not drafted for count, drafted in zip(result.counts, result.drafted, strict=True))
    assert beside > 10
    assert (outcome.num_preemptions > 0) == (num_pages == 9)


def test_aborts_and_a_lost_rank_leave_other_answers_alone(speculating: RankConfig, expected: Outcome) -> None:
    outcome = serve(speculating, requests_of_all_kinds(1), aborts={2: 3, 5: 7}, lose_after=9)
    assert_same(expected, outcome, but=(2, 5))


@pytest.mark.parametrize("num_pages", [64, 9])
def test_a_draft_that_is_always_right_is_always_accepted(sure: RankConfig, num_pages: int) -> None:
    """So its KV is right after preemptions, prefix hits, aborts and in the choices of one request."""
    requests = requests_of_all_kinds(2, grammars=False)
    outcome = serve(sure, requests, num_pages=num_pages, aborts={1: 5, 4: 2, 8: 9})
    drafted = 0
    for result in outcome.results:
        for count, num_drafted in zip(result.counts, result.drafted, strict=bool(result.drafted)):
            assert count == num_drafted + 1 or not (count or num_drafted)
            drafted += num_drafted
    assert drafted > 200
    assert outcome.num_hits > 50
    assert (outcome.num_preemptions > 0) == (num_pages == 9)
