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

STEPS_MS = {32: 6.9, 64: 8.4, 96: 9.3, 128: 10.8, 192: 12.0, 256: 13.9, 384: 18.8, 512: 23.3}
"""About those of 70B on four GPUs."""
DECODES_MS = {1: 5.5, 16: 6.1, 32: 6.6, 64: 8.1}
TIMES = tuple(
    SizeTime(tokens, decode_only, round(1e3 * ms))
    for decode_only, sizes in ((False, STEPS_MS), (True, DECODES_MS))
    for tokens, ms in sizes.items()
)
SMALL = (SizeTime(4, True, 100), *(SizeTime(n, False, 100 + us) for n, us in ((8, 90), (12, 100), (32, 400))))
"""Beside four decodes, a prompt costs them least in steps of 12 tokens."""


def make_share(wait_weight: float = 2.0) -> PromptShare:
    share = PromptShare(512, wait_weight)
    share.learn(TIMES)
    return share


def lost_ms(size: int, num_decoding: int, num_prompts: int, num_waiting: int, wait_weight: float) -> float:
    """What all lose until the prompts are computed, step by step, if each step has that size and the last as needed."""
    alone = next((ms for tokens, ms in DECODES_MS.items() if tokens >= num_decoding), 0.0) if num_decoding else 0.0
    lost = 0.0
    while num_waiting > 0:
        taken = min(num_waiting, size - num_decoding)
        step_ms = next(ms for tokens, ms in STEPS_MS.items() if tokens >= num_decoding + taken)
        lost += num_decoding * (step_ms - alone) + wait_weight * num_prompts * step_ms
        num_waiting -= taken
    return lost


class TestPromptShare:
    @pytest.mark.parametrize("wait_weight", [0.5, 2.0, 8.0])
    @pytest.mark.parametrize("num_decoding", [0, 1, 7, 16, 31, 60, 64])
    def test_all_together_lose_least(self, num_decoding: int, wait_weight: float) -> None:
        share = make_share(wait_weight)
        for num_prompts, num_waiting in ((1, 1), (1, 220), (1, 700), (3, 500), (12, 3000), (40, 9000)):
            size = share.num_tokens(num_decoding, num_prompts, num_waiting)
            least = min(
                lost_ms(each, num_decoding, num_prompts, num_waiting, wait_weight)
                for each in STEPS_MS
                if each > num_decoding
            )
            assert lost_ms(size, num_decoding, num_prompts, num_waiting, wait_weight) == pytest.approx(least, abs=0.01)

    def test_many_decodes_are_spared_and_many_prompts_are_not_kept_waiting(self) -> None:
        share = make_share()
        assert share.num_tokens(64, 1, 384) == 256
        assert share.num_tokens(64, 20, 8000) == 512
        assert share.num_tokens(1, 1, 500) == 512

    def test_without_decodes_nobody_is_delayed_by_a_large_step(self) -> None:
        assert make_share().num_tokens(0, 5, 5000) == 512

    def test_of_nothing_that_is_known_all_that_fits(self) -> None:
        share = PromptShare(512, 2.0)
        assert share.num_tokens(64, 1, 10) == 512
        assert not share.knows_times
        share.learn(TIMES)
        assert share.knows_times
        assert share.num_tokens(64, 1, 10) < 512
        share.learn(())  # the ranks of the next group, say, have nothing to tell
        assert share.num_tokens(64, 1, 10) == 512

    def test_more_decodes_than_any_size_that_is_known(self) -> None:
        share = PromptShare(1024, 2.0)
        share.learn(TIMES)
        assert share.num_tokens(700, 1, 10) == 1024

    def test_always_room_for_a_token_of_a_prompt(self) -> None:
        share = make_share()
        assert all(num_decoding < share.num_tokens(num_decoding, 1, 1) <= 512 for num_decoding in range(512))


def chunk_lengths(loop: Loop) -> list[int]:
    """Tokens of each prompt in the next step, which is run."""
    plan = loop.step()
    assert plan is not None
    return [len(chunk.token_ids) for chunk in plan.chunks]


def beside_four_decodes(max_num_seqs: int = 8) -> Loop:
    loop = Loop(make_config(num_pages=256, max_num_seqs=max_num_seqs))
    loop.scheduler.learn_size_times(SMALL)
    loop.add(*(make_request(i, prompt=2, max_tokens=30) for i in range(1, 5)))
    loop.step()
    return loop


class TestScheduler:
    def test_prompts_come_in_steps_of_the_size_chosen(self) -> None:
        loop = beside_four_decodes()
        request = make_request(5, prompt=21, max_tokens=4)
        loop.add(request)
        assert [chunk_lengths(loop) for _ in range(4)] == [[8], [8], [5], []]
        loop.run()
        output = loop.output(5, 0)
        assert (output.tokens, output.finish) == expected_output(request, 0, loop.config.max_model_len)

    def test_where_many_wait_a_step_takes_all_that_fits(self) -> None:
        loop = beside_four_decodes()
        loop.add(*(make_request(i, prompt=25, max_tokens=2) for i in range(5, 8)))
        assert sum(chunk_lengths(loop)) == 28

    def test_who_has_no_slot_is_no_reason_for_a_larger_step(self) -> None:
        loop = beside_four_decodes(max_num_seqs=5)
        loop.add(*(make_request(i, prompt=24, max_tokens=2) for i in range(5, 12)))
        assert chunk_lengths(loop) == [8]

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
