"""How many tokens a step takes beside decodes."""

from __future__ import annotations

import pytest

from builders import Loop, make_config, make_request
from simulated_group import SimulatedCluster, running_engine
from simulated_worker import expected_output
from tpserve.coordinator.metrics import Metrics
from tpserve.coordinator.prompt_share import PromptShare
from tpserve.coordinator.scheduler import Scheduler
from tpserve.proto.rank import SizeTime

STEPS_MS = {32: 6.9, 64: 8.1, 96: 9.0, 128: 11.0, 192: 12.0, 256: 13.9, 384: 18.8, 512: 23.3}
"""About those of 70B on four GPUs. Beside 64 decodes of 8 ms, a token of a prompt costs least in 256."""
DECODES_MS = {1: 5.5, 16: 6.1, 32: 6.6, 64: 8.0}
TIMES = tuple(
    SizeTime(tokens, decode_only, round(1e3 * ms))
    for decode_only, sizes in ((False, STEPS_MS), (True, DECODES_MS))
    for tokens, ms in sizes.items()
)
SMALL = (SizeTime(4, True, 100), *(SizeTime(n, False, 100 + us) for n, us in ((8, 90), (12, 100), (32, 400))))
"""Beside up to 4 decodes, 12 tokens cost least."""


def make_share(catch_up_steps: int = 4) -> PromptShare:
    share = PromptShare(512, catch_up_steps)
    share.learn(TIMES)
    return share


def cost_us(size: int, num_decoding: int) -> float:
    """What a token of a prompt costs in a step of that size."""
    alone = next((ms for tokens, ms in DECODES_MS.items() if tokens >= num_decoding), 0.0) if num_decoding else 0.0
    return 1e3 * (STEPS_MS[size] - alone) / (size - num_decoding)


class TestPromptShare:
    def test_a_step_has_the_size_in_which_a_token_costs_least(self) -> None:
        share = make_share()
        assert share.num_tokens(64, 300) == 256
        for num_decoding in (1, 5, 16, 31, 32, 60, 64):
            size = share.num_tokens(num_decoding, 1)
            assert cost_us(size, num_decoding) == min(
                cost_us(each, num_decoding) for each in STEPS_MS if each > num_decoding
            )

    def test_without_decodes_nobody_is_delayed_by_a_large_step(self) -> None:
        assert make_share().num_tokens(0, 100) == 512

    @pytest.mark.parametrize(
        ("num_waiting", "size"), [(0, 256), (4 * 192, 256), (4 * 192 + 1, 384), (4 * 320, 384), (4 * 321, 512)]
    )
    def test_who_waits_is_computed_within_so_many_steps_while_that_fits(self, num_waiting: int, size: int) -> None:
        assert make_share().num_tokens(64, num_waiting) == size

    def test_no_backlog_asks_for_more_than_a_step_holds(self) -> None:
        assert make_share().num_tokens(64, 1_000_000) == 512

    def test_of_sizes_that_cost_the_same_the_largest(self) -> None:
        share = PromptShare(96, 4)
        share.learn([SizeTime(1, True, 100), *(SizeTime(1 + n, False, 100 + 10 * n) for n in (20, 40, 80))])
        assert share.num_tokens(1, 10) == 81

    @pytest.mark.parametrize("catch_up_steps", [0, 4])
    def test_what_is_not_known_or_not_asked_for_bounds_nothing(self, catch_up_steps: int) -> None:
        share = PromptShare(512, catch_up_steps)
        assert share.num_tokens(64, 10) == 512
        assert not share.is_bounded
        share.learn(TIMES)
        assert share.is_bounded == (catch_up_steps > 0)
        assert (share.num_tokens(64, 10) == 512) == (catch_up_steps == 0)
        share.learn(())  # the ranks of the next group, say, have nothing to tell
        assert share.num_tokens(64, 10) == 512

    def test_more_decodes_than_any_size_that_is_known(self) -> None:
        assert make_share().num_tokens(512, 10) == 512
        share = PromptShare(1024, 4)
        share.learn(TIMES)
        assert share.num_tokens(700, 10) == 1024

    def test_always_room_for_a_token_of_a_prompt(self) -> None:
        share = make_share()
        assert all(num_decoding < share.num_tokens(num_decoding, 1) <= 512 for num_decoding in range(512))


def chunk_lengths(loop: Loop) -> list[int]:
    """Tokens of each prompt in the next step, which is run."""
    plan = loop.step()
    assert plan is not None
    return [len(chunk.token_ids) for chunk in plan.chunks]


class TestScheduler:
    def test_prompts_beside_decodes_come_in_steps_of_the_best_size(self) -> None:
        loop = Loop(make_config(num_pages=128))
        loop.scheduler.learn_size_times(SMALL)
        requests = [make_request(1, prompt=30, max_tokens=30), make_request(2, prompt=30, max_tokens=4)]
        loop.add(requests[0])
        assert chunk_lengths(loop) == [30]  # it delays nobody
        loop.add(requests[1])
        assert [chunk_lengths(loop) for _ in range(4)] == [[11], [11], [8], []]
        loop.run()
        for request in requests:
            output = loop.output(request.request_id, 0)
            assert (output.tokens, output.finish) == expected_output(request, 0, loop.config.max_model_len)

    def test_where_many_wait_a_step_takes_all_that_fits(self) -> None:
        loop = Loop(make_config(num_pages=256))
        loop.scheduler.learn_size_times(SMALL)
        loop.add(make_request(1, prompt=4, max_tokens=30))
        loop.step()
        loop.add(*(make_request(i, prompt=25, max_tokens=2) for i in range(2, 5)))
        assert sum(chunk_lengths(loop)) == 31  # 75 of them within four steps are 19 a step, and a decode

    def test_who_has_no_slot_is_no_reason_for_a_larger_step(self) -> None:
        loop = Loop(make_config(num_pages=256, max_num_seqs=2))
        loop.scheduler.learn_size_times(SMALL)
        loop.add(make_request(1, prompt=4, max_tokens=30))
        loop.step()
        loop.add(*(make_request(i, prompt=25, max_tokens=2) for i in range(2, 9)))
        assert chunk_lengths(loop) == [11]

    def test_steps_in_which_nobody_can_be_drafted_for_are_few(self) -> None:
        loop = Loop(make_config(num_pages=256, max_num_draft_tokens=2, drafts_on_device=True))
        loop.scheduler.learn_size_times(SMALL)
        loop.add(make_request(1, prompt=4, max_tokens=30))
        loop.step()
        loop.add(make_request(2, prompt=25, max_tokens=30))
        assert chunk_lengths(loop) == [25]


async def test_the_scheduler_is_told_what_the_ranks_have_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[SizeTime, ...]] = []
    monkeypatch.setattr(Scheduler, "learn_size_times", lambda self, times: told.append(tuple(times)))
    monkeypatch.setattr(SimulatedCluster, "size_times", SMALL)
    async with running_engine(2, Metrics("m")):
        assert told == [SMALL]
