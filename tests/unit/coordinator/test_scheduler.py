"""Each rule of the scheduler by a small example. The simulated worker behind `Loop` checks every plan as well."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from builders import Loop, make_config, make_request
from simulated_worker import expected_output
from tpserve.coordinator.config import ConfigError, SchedulerConfig
from tpserve.coordinator.draft_length import FixedLength
from tpserve.coordinator.request import QueueFull, Request, RequestGroup, RequestInvalid, Sequence, choice_seed
from tpserve.coordinator.slot_table import ResultMismatch
from tpserve.proto.messages import FinishReason, PromptChunk, StepPlan, StepResult


def plan_of(loop: Loop) -> StepPlan:
    plan = loop.plan()
    assert plan is not None
    return plan


class RuleAtHand(FixedLength):
    """Drafts a token each until it is told that this does not pay."""

    def __init__(self) -> None:
        super().__init__(1)
        self.has_had_enough = False

    def gives_up(self, num_decoding: int) -> bool:
        return self.has_had_enough


def chunk_lengths(loop: Loop) -> list[int]:
    """Tokens of each prompt in the next step, which is run."""
    plan = plan_of(loop)
    loop.update()
    return [len(chunk.token_ids) for chunk in plan.chunks]


def first_stop(request: Request, position: int) -> int:
    """Token that the request samples at an output position, and not before."""
    tokens, _ = expected_output(request, 0, 64)
    assert tokens[position] not in tokens[:position]
    return tokens[position]


def check_texts(loop: Loop, *requests: Request) -> None:
    for request in requests:
        for choice in range(request.n):
            output = loop.output(request.request_id, choice)
            assert (output.tokens, output.finish) == expected_output(request, choice, loop.config.max_model_len)


class TestConfig:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"max_num_batched_tokens": 4}, "max_num_batched_tokens is 4, less than max_num_seqs 8.*raise the former"),
            ({"num_pages": 0}, "num_pages is 0; set it to 1 or more"),
            ({"max_model_len": 1}, "max_model_len is 1; set it to 2"),
            ({"wait_weight": 0.0}, "wait_weight is 0; set it above 0"),
            ({"aging_steps": -1}, "aging_steps is -1; set it to 0"),
        ],
    )
    def test_a_value_that_cannot_work_is_named_with_the_remedy(self, values: dict[str, Any], message: str) -> None:
        good = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "max_model_len": 64, "page_size": 4, "num_pages": 64}
        with pytest.raises(ConfigError, match=message):
            SchedulerConfig(**{**good, **values})


class TestRequests:
    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            (make_request(1, prompt=0), "no tokens"),
            (make_request(1, n=0), "n is 0"),
            (make_request(1, max_tokens=0), "max_tokens is 0"),
            (make_request(1, prompt=64), "prompt has 64 tokens.*64 tokens, so shorten it to 63"),
            (make_request(1, prompt=30, max_tokens=20), "30 prompt tokens and up to 20 .*13 KV pages of 4.*are 12"),
        ],
    )
    def test_what_can_never_run_is_refused_with_numbers(self, request_: Request, message: str) -> None:
        loop = Loop(make_config(num_pages=12))
        with pytest.raises(RequestInvalid, match=message):
            loop.add(request_)
        assert not loop.scheduler.has_unfinished

    def test_what_just_fits_runs(self) -> None:
        loop = Loop(make_config(num_pages=12))
        request = make_request(1, prompt=30, max_tokens=19)  # token 49 is sampled, but its KV is never needed
        loop.add(request)
        loop.run()
        check_texts(loop, request)

    def test_a_prompt_that_fills_every_page_runs_alone(self) -> None:
        loop = Loop(make_config(num_pages=12))
        requests = [make_request(i, prompt=48, max_tokens=1) for i in (1, 2)]
        loop.add(*requests)
        loop.run()
        check_texts(loop, *requests)

    def test_the_queue_is_bounded_beyond_what_free_slots_can_take(self) -> None:
        loop = Loop(make_config(max_num_seqs=2, max_num_queued_requests=2))
        loop.add(*(make_request(i) for i in range(1, 5)))  # a burst of free slots + queue
        with pytest.raises(QueueFull, match="4 requests wait"):
            loop.add(make_request(5))
        loop.step()
        with pytest.raises(QueueFull, match="2 requests wait"):
            loop.add(make_request(5))
        loop.scheduler.abort(4)
        loop.add(make_request(5))

    def test_an_id_in_use_is_refused(self) -> None:
        loop = Loop(make_config())
        loop.add(make_request(1))
        with pytest.raises(ValueError, match="request id 1 is in use"):
            loop.add(make_request(1))

    def test_the_first_choice_keeps_the_seed_and_the_others_get_their_own(self) -> None:
        assert choice_seed(5, 0) == 5
        seeds = {choice_seed(seed, choice) for seed in (0, 1, 2**64 - 1) for choice in range(50)}
        assert len(seeds) == 150
        assert all(0 <= seed < 2**64 for seed in seeds)


class TestSteps:
    def test_nothing_to_do_is_no_plan(self) -> None:
        loop = Loop(make_config())
        assert loop.plan() is None
        loop.add(make_request(1, max_tokens=1))
        assert plan_of(loop).step_id == 1
        assert loop.plan() is None  # all its tokens are scheduled
        assert [event.finish for event in loop.update()] == [FinishReason.LENGTH]
        assert loop.plan() is None
        assert not loop.scheduler.has_unfinished

    def test_who_has_ended_is_gone_at_once(self) -> None:
        """Nothing that ends may wait for a collection of cycles, which comes once in hours."""
        loop = Loop(make_config())
        loop.add(make_request(1, max_tokens=3), make_request(2, max_tokens=5, n=3), make_request(3, max_tokens=30))
        gc.collect()
        gc.disable()
        try:
            for _ in range(8):
                loop.step()
            loop.scheduler.abort(3)
            loop.run()
            left = [found for found in gc.get_objects() if isinstance(found, (RequestGroup, Sequence))]
        finally:
            gc.enable()
        assert left == []

    def test_a_long_prompt_runs_in_chunks_within_the_budget(self) -> None:
        loop = Loop(make_config())
        loop.add(make_request(1, prompt=50, max_tokens=2))
        first, second = plan_of(loop), plan_of(loop)
        tokens = make_request(1, prompt=50).prompt_token_ids
        assert first.chunks == (PromptChunk(0, 0, tokens[:32], sample=False),)
        assert second.chunks == (PromptChunk(0, 32, tokens[32:], sample=True),)
        assert len(first.added_slots[0].page_ids) == 13

    def test_decoding_goes_first_then_running_prompts_then_waiting_ones(self) -> None:
        loop = Loop(make_config())
        loop.add(make_request(1, prompt=4, max_tokens=30))
        loop.step()
        loop.add(make_request(2, prompt=40), make_request(3, prompt=40))
        assert [(c.slot, c.start, len(c.token_ids)) for c in plan_of(loop).chunks] == [(1, 0, 31)]
        assert [(c.slot, c.start, len(c.token_ids)) for c in plan_of(loop).chunks] == [(1, 31, 9), (2, 0, 22)]

    def test_drafts_go_on_while_requests_wait_for_a_slot(self) -> None:
        """A device drafts in steps without prompts; who cannot come in anyway must not keep it from that."""
        loop = Loop(make_config(max_num_seqs=2, max_num_draft_tokens=3, drafts_on_device=True))
        loop.add(*(make_request(i, prompt=5, max_tokens=20) for i in range(3)))
        loop.step()
        plan = plan_of(loop)
        assert (plan.chunks, plan.num_draft_tokens) == ((), 3)

    def test_sequences_whose_drafts_do_not_pay_are_given_up_but_for_one(self) -> None:
        rule = RuleAtHand()
        loop = Loop(make_config(max_num_draft_tokens=3, drafts_cost_upkeep=True, max_num_batched_tokens=96), rule)
        loop.add(*(make_request(i, prompt=5, max_tokens=40) for i in range(8)))
        loop.step()
        assert plan_of(loop).undrafted_slots == ()
        rule.has_had_enough = True
        assert plan_of(loop).undrafted_slots == tuple(range(1, 8))
        assert loop.plan() is None  # two are in flight
        loop.update()
        loop.update()
        loop.lose_group()
        rule.has_had_enough = False
        loop.step()
        assert all(added.max_len for added in loop.plans[-1].added_slots)  # they start again with drafts
        rule.has_had_enough = True
        assert len(plan_of(loop).undrafted_slots) == 7

    def test_nobody_is_given_up_where_that_saves_nothing(self) -> None:
        rule = RuleAtHand()
        rule.has_had_enough = True
        loop = Loop(make_config(max_num_draft_tokens=3), rule)
        loop.add(make_request(1, prompt=5, max_tokens=40), make_request(2, prompt=5, max_tokens=40))
        loop.run()
        assert not any(plan.undrafted_slots for plan in loop.plans)

    def test_a_pure_decode_step_is_a_few_bytes(self) -> None:
        loop = Loop(make_config(max_num_seqs=32, max_num_batched_tokens=512, num_pages=512))
        loop.add(*(make_request(i, prompt=5, max_tokens=30) for i in range(32)))
        loop.step()
        plan = plan_of(loop)
        assert plan == StepPlan(2)
        assert len(plan.to_pb().SerializeToString()) == 2

    def test_no_more_plans_are_in_flight_than_allowed(self) -> None:
        for depth in (1, 2, 3):
            loop = Loop(make_config(max_in_flight_steps=depth))
            loop.add(make_request(1, max_tokens=20))
            for _ in range(depth):
                plan_of(loop)
            assert loop.plan() is None
            loop.update()
            plan_of(loop)

    def test_a_page_is_appended_in_the_step_that_writes_to_it(self) -> None:
        loop = Loop(make_config())
        loop.add(make_request(1, prompt=3, max_tokens=8))
        loop.run()
        # Steps 2, 3, ... write positions 3, 4, ...; the second page starts at position 4, the third at 8.
        assert [plan.step_id for plan in loop.plans if plan.appended_pages] == [3, 7]

    def test_the_last_step_of_a_length_is_known_and_not_overrun(self) -> None:
        loop = Loop(make_config())
        loop.add(make_request(1, max_tokens=3), make_request(2, max_tokens=20))
        for step_id in (1, 2, 3, 4):
            assert plan_of(loop).step_id == step_id
            if step_id > 1:
                loop.update()
        assert [plan.removed_slots for plan in loop.plans] == [(), (), (), (0,)]
        assert loop.output(1).finish is FinishReason.LENGTH

    def test_the_model_length_ends_a_sequence(self) -> None:
        loop = Loop(make_config())
        request = make_request(1, prompt=60, max_tokens=100)
        loop.add(request)
        loop.run()
        assert len(loop.output(1).tokens) == 4
        check_texts(loop, request)

    def test_a_stop_token_is_reported_and_the_overrun_dropped(self) -> None:
        loop = Loop(make_config())
        probe = make_request(1, max_tokens=20, seed=3)
        stopping = make_request(1, max_tokens=20, seed=3, stop=[first_stop(probe, 2)])
        other = make_request(2, max_tokens=20)
        loop.add(stopping, other)
        plan_of(loop)
        for _ in range(2):  # results of steps 1 and 2
            plan_of(loop)
            assert [event.request_id for event in loop.update()] == [1, 2]
        plan_of(loop)
        finished = {event.request_id: event.finish for event in loop.update()}  # step 3, while step 4 is in flight
        assert finished == {1: FinishReason.STOP, 2: None}
        assert [event.request_id for event in loop.update()] == [2]  # step 4 sampled for both
        assert plan_of(loop).removed_slots == (0,)
        loop.run()
        check_texts(loop, stopping, other)

    def test_a_reused_slot_does_not_get_its_former_owner_s_tokens(self) -> None:
        loop = Loop(make_config(max_num_seqs=1, max_in_flight_steps=3))
        loop.add(make_request(1, max_tokens=20), make_request(2, max_tokens=5))
        plan_of(loop)
        plan_of(loop)
        loop.scheduler.abort(1)
        plan = plan_of(loop)
        assert (plan.removed_slots, [added.slot for added in plan.added_slots]) == ((0,), [0])
        assert loop.update() == []
        assert loop.update() == []
        assert [event.request_id for event in loop.update()] == [2]
        loop.run()
        check_texts(loop, make_request(2, max_tokens=5))

    def test_logprobs_come_with_the_tokens_that_asked(self) -> None:
        loop = Loop(make_config())
        loop.add(make_request(1, num_logprobs=2), make_request(2))
        plan_of(loop)
        with_logprobs, without = loop.update()
        assert [value.logprob for value in with_logprobs.logprobs] == [-float(with_logprobs.token_ids[0])]
        assert without.logprobs == ()

    @pytest.mark.parametrize(
        ("result", "message"),
        [
            (StepResult(2, slots=(0,), token_ids=(1,)), "result of step 2, expected that of 1"),
            (StepResult(1), "samples 1 slots, its result has 0"),
            (StepResult(1, slots=(0,), token_ids=()), "1 slots and 0 tokens"),
            (StepResult(1, slots=(3,), token_ids=(1,)), r"empty slots \[3\]"),
            (StepResult(1, slots=(99,), token_ids=(1,)), "past 8"),
        ],
    )
    def test_a_result_that_is_not_due_is_refused(self, result: StepResult, message: str) -> None:
        loop = Loop(make_config())
        loop.add(make_request(1))
        plan_of(loop)
        with pytest.raises(ResultMismatch, match=message):
            loop.scheduler.update(result)


class TestPrefixCache:
    def test_a_second_request_finds_the_full_pages_before_its_last_token(self) -> None:
        loop = Loop(make_config())
        loop.add(make_request(1, prompt=range(12)))
        loop.run()
        loop.add(make_request(2, prompt=range(12)), make_request(3, prompt=[*range(8), 20]))
        plan = plan_of(loop)
        assert [(chunk.start, len(chunk.token_ids)) for chunk in plan.chunks] == [(8, 1), (8, 4)]
        assert plan.added_slots[0].page_ids[:2] == loop.plans[0].added_slots[0].page_ids[:2]
        assert {event.request_id: event.num_cached_tokens for event in loop.update()} == {2: 8, 3: 8}
        plan_of(loop)
        assert {event.num_cached_tokens for event in loop.update()} == {0}
        stats = loop.scheduler.stats()
        assert (stats.num_prefix_query_tokens, stats.num_prefix_hit_tokens) == (33, 16)

    def test_output_is_found_by_the_next_turn(self) -> None:
        loop = Loop(make_config())
        loop.add(make_request(1, prompt=range(6), max_tokens=8))
        loop.run()
        loop.add(make_request(2, prompt=[*range(6), *loop.output(1).tokens, 1, 2]))
        assert plan_of(loop).chunks[0].start == 12

    def test_pages_computed_in_a_step_are_not_read_in_the_same_step(self) -> None:
        loop = Loop(make_config())
        loop.add(make_request(1, prompt=range(9)), make_request(2, prompt=range(9)))
        assert [chunk.start for chunk in plan_of(loop).chunks] == [0, 0]

    def test_off_means_off(self) -> None:
        loop = Loop(make_config(enable_prefix_cache=False))
        for request_id in (1, 2):
            loop.add(make_request(request_id, prompt=range(12)))
            loop.run()
        assert loop.scheduler.stats().num_prefix_hit_tokens == 0
        assert loop.scheduler.stats().num_evictable_pages == 0


@pytest.mark.parametrize("enable_prefix_cache", [True, False])
class TestChoices:
    def test_the_others_wait_for_the_first_and_compute_only_the_tail(self, enable_prefix_cache: bool) -> None:
        loop = Loop(make_config(enable_prefix_cache=enable_prefix_cache))
        request = make_request(1, prompt=38, n=3)
        loop.add(request)
        first, second = plan_of(loop), plan_of(loop)
        assert [len(plan.chunks) for plan in (first, second)] == [1, 1]
        loop.update()
        third = plan_of(loop)
        assert [(chunk.start, len(chunk.token_ids)) for chunk in third.chunks] == [(36, 2), (36, 2)]
        tables = [added.page_ids for plan in (first, third) for added in plan.added_slots]
        assert len({table[:9] for table in tables}) == 1
        assert len({table[9] for table in tables}) == 3
        loop.run()
        check_texts(loop, request)

    def test_more_choices_than_slots_run_in_turns(self, enable_prefix_cache: bool) -> None:
        loop = Loop(make_config(max_num_seqs=2, enable_prefix_cache=enable_prefix_cache))
        request = make_request(1, prompt=10, n=7, max_tokens=6)
        loop.add(request)
        loop.run()
        check_texts(loop, request)
        assert len({tuple(loop.output(1, choice).tokens) for choice in range(7)}) == 7

    def test_the_prompt_is_computed_by_another_if_the_first_is_aborted(self, enable_prefix_cache: bool) -> None:
        loop = Loop(make_config(enable_prefix_cache=enable_prefix_cache))
        request = make_request(1, prompt=40, n=3)
        loop.add(request)
        plan_of(loop)
        loop.scheduler.abort(1, choice=0)
        plan = plan_of(loop)
        assert (plan.removed_slots, len(plan.chunks)) == ((0,), 1)
        loop.run()
        for choice in (1, 2):
            assert loop.output(1, choice).tokens == expected_output(request, choice, 64)[0]
        assert loop.output(1, 0).tokens == []


class TestPreemption:
    def test_the_latest_arrival_makes_room_and_loses_nothing(self) -> None:
        loop = Loop(make_config(num_pages=12))
        requests = [make_request(i, prompt=8, max_tokens=32, seed=i) for i in (1, 2)]
        loop.add(*requests)
        loop.run()
        assert loop.scheduler.stats().num_preemptions > 0
        slots_of_first = next(added.slot for plan in loop.plans for added in plan.added_slots)
        assert all(slots_of_first not in plan.removed_slots for plan in loop.plans[:32])
        check_texts(loop, *requests)

    def test_output_history_is_sent_again_only_to_samplers_that_count_it(self) -> None:
        for penalty in (0.0, 0.5):
            loop = Loop(make_config(num_pages=12))
            requests = [make_request(i, prompt=8, max_tokens=32, frequency_penalty=penalty) for i in (1, 2)]
            loop.add(*requests)
            loop.run()
            again = [added for plan in loop.plans for added in plan.added_slots][2:]
            assert again
            assert all(bool(added.output_token_ids) == (penalty > 0) for added in again)
            check_texts(loop, *requests)

    def test_a_preempted_sequence_waits_for_its_tokens_in_flight(self) -> None:
        loop = Loop(make_config(num_pages=8, max_in_flight_steps=4))
        loop.add(make_request(1, prompt=9, max_tokens=20), make_request(2, prompt=9, max_tokens=20))
        while loop.scheduler.stats().num_preemptions == 0:
            if loop.plan() is None:
                loop.update()
        loop.scheduler.abort(1)
        assert loop.plan() is None  # room enough, but what request 2 has got is not known yet
        num_plans = len(loop.plans)
        loop.run()
        known = loop.plans[num_plans].chunks[0]
        assert known.start + len(known.token_ids) > 9
        check_texts(loop, make_request(2, prompt=9, max_tokens=20))

    def test_a_preempted_sequence_is_not_passed_on_its_way_back(self) -> None:
        loop = Loop(make_config(num_pages=12))
        loop.add(make_request(1, prompt=8, max_tokens=32), make_request(2, prompt=8, max_tokens=32))
        while loop.scheduler.stats().num_preemptions == 0:
            loop.step()
        small = make_request(3, prompt=1, max_tokens=1)
        loop.add(small)
        while loop.output(1).finish is None:
            loop.step()
            assert loop.output(3).tokens == [] or loop.scheduler.num_waiting == 0
        loop.run()
        check_texts(loop, small)

    def test_a_request_is_not_admitted_if_running_ones_will_need_the_pages(self) -> None:
        loop = Loop(make_config(num_pages=6))
        loop.add(make_request(1, prompt=8, max_tokens=9), make_request(2, prompt=16, max_tokens=2))
        loop.step()
        assert (loop.scheduler.num_running, loop.scheduler.num_waiting) == (1, 1)
        loop.run()
        assert loop.scheduler.stats().num_preemptions == 0


class TestFairness:
    def test_shorter_prompts_pass_a_longer_one_that_has_begun(self) -> None:
        loop = Loop(make_config(max_num_batched_tokens=16, num_pages=128))
        requests = [make_request(i, prompt=n, max_tokens=2) for i, n in ((1, 50), (2, 20), (3, 6))]
        loop.add(requests[0])
        assert chunk_lengths(loop) == [16]
        loop.add(*requests[1:])
        assert chunk_lengths(loop) == [6, 10]
        assert chunk_lengths(loop) == [10, 5]  # one token of the budget is a decode's
        loop.run()
        check_texts(loop, *requests)

    def test_who_has_waited_long_goes_before_shorter_ones(self) -> None:
        """One arrives in each step that would fill it."""
        loop = Loop(make_config(max_num_batched_tokens=8, num_pages=128, patience_steps=4))
        long = make_request(1, prompt=30, max_tokens=1)
        loop.add(long)
        firsts = []
        for request_id in range(2, 10):
            loop.add(make_request(request_id, prompt=8, max_tokens=1))
            firsts.append(plan_of(loop).chunks[0].token_ids)
            loop.update()
        assert firsts[:4] == [make_request(i, prompt=8).prompt_token_ids for i in (2, 3, 4, 5)]
        assert [token for tokens in firsts[4:] for token in tokens] == list(long.prompt_token_ids)

    @pytest.mark.parametrize("patience_steps", [0, 3, 32])
    def test_texts_do_not_hang_on_whose_turn_it_was(self, patience_steps: int) -> None:
        loop = Loop(make_config(max_num_batched_tokens=9, patience_steps=patience_steps))
        requests = [make_request(i, prompt=1 + i * 11 % 37, max_tokens=4) for i in range(1, 9)]
        for request in requests:
            loop.add(request)
            loop.step()
        loop.run()
        check_texts(loop, *requests)

    def test_a_small_request_passes_one_that_has_no_room(self) -> None:
        loop = Loop(make_config(num_pages=16))
        loop.add(make_request(1, prompt=20, max_tokens=20))
        loop.step()
        loop.add(make_request(2, prompt=55), make_request(3, prompt=4, max_tokens=2))
        loop.step()
        assert loop.scheduler.num_waiting == 1
        loop.run()
        assert loop.output(3).finish is FinishReason.LENGTH

    def test_nobody_passes_one_that_has_waited_long(self) -> None:
        """Small requests keep coming; the large one runs once those that run have ended."""
        loop = Loop(make_config(num_pages=16, aging_steps=10))
        loop.add(make_request(0, prompt=4, max_tokens=20))
        loop.step()
        large = make_request(1000, prompt=55, max_tokens=2)
        loop.add(large)
        for request_id in range(1, 100):
            loop.add(make_request(request_id, prompt=4, max_tokens=8))
            loop.step()
            if loop.output(1000).finish is not None:
                break
        assert loop.output(1000).finish is FinishReason.LENGTH
        assert len(loop.plans) < 10 + 20 + 5
        assert loop.output(1).finish is FinishReason.LENGTH  # it passed

    def test_the_way_is_free_again_once_who_barred_it_has_gone(self) -> None:
        loop = Loop(make_config(num_pages=16, aging_steps=0))
        loop.add(make_request(1, prompt=20, max_tokens=20))
        loop.step()
        loop.add(make_request(2, prompt=55), make_request(3, prompt=4, max_tokens=2))
        loop.step()
        assert loop.scheduler.num_waiting == 2
        loop.scheduler.abort(2)
        assert [len(chunk.token_ids) for chunk in plan_of(loop).chunks] == [4]

    def test_the_search_for_smaller_requests_is_bounded(self) -> None:
        loop = Loop(make_config(num_pages=16, max_passed_sequences=2, patience_steps=0))
        loop.add(make_request(1, prompt=20, max_tokens=20))
        loop.step()
        loop.add(*(make_request(i, prompt=55) for i in (2, 3, 4)), make_request(5, prompt=4))
        loop.step()
        assert loop.scheduler.num_waiting == 4


class TestAbort:
    def test_pages_are_free_at_once_and_the_slot_leaves_with_the_next_plan(self) -> None:
        loop = Loop(make_config(enable_prefix_cache=False))
        loop.add(make_request(1, max_tokens=20), make_request(2, max_tokens=20))
        plan_of(loop)
        held = loop.scheduler.stats().num_held_pages
        loop.scheduler.abort(1)
        assert loop.scheduler.stats().num_held_pages == held // 2
        assert plan_of(loop).removed_slots == (0,)
        loop.run()
        assert loop.output(1).tokens == []
        check_texts(loop, make_request(2, max_tokens=20))

    def test_waiting_draining_and_unknown_requests_can_be_aborted(self) -> None:
        loop = Loop(make_config(max_num_seqs=1))
        loop.add(make_request(1, max_tokens=1), make_request(2))
        plan_of(loop)
        for request_id in (1, 2, 3, 1):
            loop.scheduler.abort(request_id)
            loop.scheduler.check_integrity()
        assert not loop.scheduler.has_unfinished
        assert loop.update() == []
        assert loop.plan() is None

    def test_one_choice_can_be_aborted(self) -> None:
        loop = Loop(make_config())
        request = make_request(1, n=2, max_tokens=6)
        loop.add(request)
        loop.step()
        loop.scheduler.abort(1, choice=1)
        loop.run()
        assert loop.output(1, 0).tokens == expected_output(request, 0, 64)[0]
        assert loop.output(1, 1).finish is None


class TestGroupLoss:
    def test_texts_go_on_where_they_were(self) -> None:
        loop = Loop(make_config())
        requests = [make_request(i, prompt=6, max_tokens=12, seed=i, n=2) for i in (1, 2)]
        loop.add(*requests)
        for _ in range(5):
            loop.step()
        plan_of(loop)
        plan_of(loop)
        emitted = len(loop.output(1).tokens)
        assert emitted > 0
        loop.lose_group()
        assert loop.scheduler.stats().num_evictable_pages == 0
        assert (loop.scheduler.num_running, loop.scheduler.num_in_flight_steps) == (0, 0)
        plan = plan_of(loop)
        assert plan.step_id == 8
        assert len(plan.chunks[0].token_ids) == 6 + emitted
        loop.run()
        check_texts(loop, *requests)

    def test_a_preempted_sequence_does_not_wait_for_results_that_are_lost(self) -> None:
        loop = Loop(make_config(num_pages=8, max_in_flight_steps=4))
        loop.add(make_request(1, prompt=9, max_tokens=20), make_request(2, prompt=9, max_tokens=20))
        while loop.scheduler.stats().num_preemptions == 0:
            if loop.plan() is None:
                loop.update()
        loop.scheduler.abort(1)
        loop.lose_group()
        plan_of(loop)
        loop.run()
        check_texts(loop, make_request(2, prompt=9, max_tokens=20))

    def test_a_sequence_whose_last_tokens_were_in_flight_runs_again(self) -> None:
        loop = Loop(make_config())
        request = make_request(1, max_tokens=2)
        loop.add(request)
        plan_of(loop)
        plan_of(loop)
        loop.lose_group()
        loop.run()
        check_texts(loop, request)
