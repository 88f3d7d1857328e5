"""Batches on a GPU of which some sequences may not be drafted for: the others are, and everybody's text is his own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from builders import Loop, make_config, make_request
from simulated_worker import expected_output
from tpserve.coordinator.draft_length import DraftLength, FixedLength
from tpserve.coordinator.request import Request
from tpserve.proto.messages import StepPlan, StepResult
from unit.coordinator.test_scheduler_random import ANYTHING


def make_loop(
    *,
    max_in_flight_steps: int = 2,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 32,
    draft_length: DraftLength | None = None,
) -> Loop:
    config = make_config(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_in_flight_steps=max_in_flight_steps,
        max_num_draft_tokens=3,
        drafts_on_device=True,
    )
    return Loop(config, draft_length)


def penalised(request_id: int, max_tokens: int) -> Request:
    return make_request(request_id, max_tokens=max_tokens, seed=request_id, frequency_penalty=0.5)


def bound(request_id: int, max_tokens: int) -> Request:
    """One with a grammar, which the simulated worker does not follow."""
    return replace(make_request(request_id, max_tokens=max_tokens, seed=request_id), grammar=ANYTHING)


def free(request_id: int, max_tokens: int) -> Request:
    return make_request(request_id, max_tokens=max_tokens, seed=request_id)


def run(loop: Loop, *requests: Request) -> tuple[list[StepPlan], list[StepResult]]:
    """Run requests to their end; return plans and results, and check the texts."""
    loop.add(*requests)
    results = []
    while loop.scheduler.has_unfinished or loop.results:
        while loop.plan() is not None:
            pass
        results.append(loop.results[0])
        loop.update()
    for request in requests:
        output = loop.output(request.request_id)
        assert (output.tokens, output.finish) == expected_output(request, 0, loop.config.max_model_len)
    return loop.plans, results


def drafted_by_slot(results: list[StepResult]) -> dict[int, int]:
    total: dict[int, int] = {}
    for result in results:
        for slot, count in zip(result.slots, result.drafted or (0,) * len(result.slots), strict=True):
            total[slot] = total.get(slot, 0) + count
    return total


@pytest.mark.parametrize("max_in_flight_steps", [1, 2, 3])
def test_those_who_may_be_are_drafted_for_beside_those_who_may_not(max_in_flight_steps: int) -> None:
    loop = make_loop(max_in_flight_steps=max_in_flight_steps)
    plans, results = run(loop, free(0, 30), penalised(1, 30), bound(2, 30), free(3, 30))
    added = {add.slot: add for plan in plans for add in plan.added_slots}
    assert {slot: bool(add.max_len) for slot, add in added.items()} == {0: True, 1: False, 2: False, 3: True}
    drafted = drafted_by_slot(results)
    assert drafted[0] > 10
    assert drafted[3] > 10
    assert (drafted[1], drafted[2]) == (0, 0)
    # One token a step: where others drafted, and after they had gone.
    for result in results:
        counts = dict(zip(result.slots, result.counts or (1,) * len(result.slots), strict=True))
        assert counts.get(1, 1) == counts.get(2, 1) == 1


def test_a_step_without_anybody_to_draft_for_is_plain() -> None:
    loop = make_loop()
    plans, _ = run(loop, free(0, 4), penalised(1, 30), bound(2, 30))
    lengths = [plan.num_draft_tokens for plan in plans if not plan.chunks]
    assert lengths[0] == 3
    assert 0 in lengths
    assert lengths == sorted(lengths, reverse=True), "drafts go on for a request that has ended"


def test_drafts_begin_with_the_first_who_may_be_drafted_for() -> None:
    loop = make_loop()
    loop.add(penalised(1, 40))
    for _ in range(4):
        loop.step()
    assert all(plan.num_draft_tokens == 0 for plan in loop.plans)
    loop.add(free(0, 20))
    for _ in range(3):
        loop.step()
    assert loop.plans[-1].num_draft_tokens == 3
    loop.scheduler.abort(0)
    loop.step()
    assert loop.plans[-1].num_draft_tokens == 0
    loop.run()


def test_the_rows_of_those_who_may_not_are_counted() -> None:
    """Three decode: with 11 tokens in a step there are two draft tokens for each, of whoever takes them."""
    loop = make_loop(max_num_seqs=3, max_num_batched_tokens=11)
    plans, _ = run(loop, free(0, 12), penalised(1, 12), penalised(2, 12))
    assert max(plan.num_draft_tokens for plan in plans) == 2


class Rule(FixedLength):
    """Notes what it is asked and told."""

    def __init__(self) -> None:
        super().__init__(2)
        self.asked: list[tuple[int, int]] = []
        self.told: list[tuple[int, int]] = []

    def choose(self, num_decoding: int, num_drafting: int) -> int:
        self.asked.append((num_decoding, num_drafting))
        return super().choose(num_decoding, num_drafting)

    def observe(self, result: StepResult, num_draft_tokens: int, num_drafting: int) -> None:
        self.told.append((num_draft_tokens, num_drafting))


def test_the_rule_is_told_for_how_many_it_drafts() -> None:
    rule = Rule()
    loop = make_loop(draft_length=rule)
    plans, results = run(loop, free(0, 9), penalised(1, 9), free(2, 9))
    assert (3, 2) in rule.asked
    assert all(0 < drafting <= decoding for decoding, drafting in rule.asked)
    # The prompts' step decodes nothing, the next ones three of whom two may be drafted for.
    assert rule.told[:2] == [(0, 0), (2, 2)]
    assert [length for length, _ in rule.told] == [plan.num_draft_tokens for plan in plans]
    assert len(rule.told) == len(results)
