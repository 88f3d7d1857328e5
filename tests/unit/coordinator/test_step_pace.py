"""When the next step is planned: late, but in time. Clocks here are numbers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import pytest

import simulated_group
from simulated_group import PROMPT, SimulatedCluster, running_engine
from tpserve.coordinator.active_requests import OutputEvent
from tpserve.coordinator.metrics import Metrics
from tpserve.coordinator.step_pace import StepPace, StepSize
from tpserve.proto.messages import SamplingParams
from tpserve.proto.rank import SizeTime

TIMES = (SizeTime(8, True, 6200), SizeTime(64, True, 9200), SizeTime(128, False, 12_200))
LEAD_S = 0.003
DECODES, PROMPTS = StepSize(8, has_prompts=False), StepSize(100, has_prompts=True)


def make_pace(lead_s: float = LEAD_S) -> StepPace:
    pace = StepPace(lead_s)
    pace.begin_group(TIMES)
    return pace


def test_a_plan_waits_until_what_is_in_flight_is_about_to_end() -> None:
    pace = make_pace()
    assert pace.wait_s(10.0) == 0.0  # nothing runs
    pace.planned(DECODES, 10.0)
    assert pace.wait_s(10.0) == 0.003  # whole milliseconds, since timers round up
    assert pace.wait_s(10.0015) == 0.001
    assert pace.wait_s(10.0025) == 0.0
    pace.planned(PROMPTS, 10.003)
    assert pace.wait_s(10.003) == 0.012  # for both
    pace.ended(6000, None, 10.006)
    assert pace.wait_s(10.006) == 0.009  # the second runs since then
    pace.ended(12_000, 0, 10.018)
    assert pace.wait_s(10.018) == 0.0


def test_the_shortest_of_the_last_steps_of_a_size_is_expected() -> None:
    pace = make_pace()
    now = 0.0
    waited = []
    for step_us in (7500, 9600, 8500, 9600, 9600, 9600, 9600, 9600, 9600, 9600, 9600):
        pace.planned(StepSize(5, has_prompts=False), now)
        waited.append(pace.wait_s(now))
        now += step_us / 1e6
        pace.ended(step_us, 0, now)
    assert waited == [0.003, *[0.004] * 8, *[0.005] * 2]
    pace.planned(StepSize(9, has_prompts=False), now)  # of another captured size
    assert pace.wait_s(now) == 0.006


class Steps:
    """Decodes, one after the other, each planned when `pace` says."""

    def __init__(self, lead_s: float = LEAD_S) -> None:
        self.pace = make_pace(lead_s)
        self._now = 0.0

    def step(self, gap_us: int | None, *, arrives: bool = False) -> float:
        """Return for how long the step's plan had to wait behind the one that ran."""
        if not self.pace._in_flight:
            self.pace.planned(DECODES, self._now)
        waited = self.pace.wait_s(self._now)
        self.pace.planned(DECODES, self._now + waited)
        if arrives:
            self.pace.arrived()
        self._now += 0.0062
        self.pace.ended(6200, gap_us, self._now)
        return waited


def test_plans_are_made_earlier_where_devices_had_to_wait_and_later_where_somebody_comes() -> None:
    steps = Steps()
    steps.step(gap_us=None)
    assert steps.step(gap_us=310) == 0.003
    assert steps.step(gap_us=0) == 0.002  # by what the device had to wait
    steps.pace._in_flight.clear()
    steps.pace.arrived()  # while nothing runs
    for _ in range(100):
        assert steps.step(gap_us=None) == 0.002
    steps.step(gap_us=0, arrives=True)
    for _ in range(40):
        steps.step(gap_us=0)
    assert steps.step(gap_us=90_000) == 0.003
    assert steps.step(gap_us=0) == 0.002  # by half a millisecond at most
    for _ in range(100):
        assert steps.step(gap_us=13, arrives=True) == 0.002  # as long a wait as is aimed at, and less


def test_a_wait_that_is_there_whatever_is_done_changes_nothing() -> None:
    steps = Steps()
    for _ in range(5000):
        assert steps.step(gap_us=9) == 0.003  # between any two steps
    lead_s = steps.pace.lead_s
    steps.step(gap_us=None)
    for _ in range(100):
        steps.step(gap_us=3000)
    assert steps.step(gap_us=0) == 0.0
    most_s = steps.pace.lead_s
    assert lead_s < most_s <= 0.0062, "plans that were not held back had no part in it"
    for _ in range(1000):
        steps.step(gap_us=3000)
    assert steps.pace.lead_s == most_s
    for _ in range(1000):
        steps.step(gap_us=9, arrives=True)
    assert steps.pace.lead_s == pytest.approx(lead_s)


def test_a_plan_is_held_back_from_when_it_could_be_made() -> None:
    """Not before, while as many are in flight as may be."""
    pace = make_pace()
    lead_s = pace.lead_s
    for _ in range(100):
        pace.planned(DECODES, 0.0)
        pace.planned(DECODES, 0.0)
        assert pace.wait_s(0.0, may_plan=False) > 0.005
        pace.ended(6200, 0, 0.0062)
        assert pace.wait_s(0.0062 + 0.0025) == 0.0  # since the loop was late
        pace.planned(DECODES, 0.0087)
        pace.ended(6200, 0, 0.0124)
        pace.ended(6200, 2000, 0.0206)
    assert pace.lead_s == lead_s
    pace.planned(DECODES, 0.0)
    assert pace.wait_s(0.0) == 0.003
    pace.planned(DECODES, 0.003)
    pace.ended(6200, 0, 0.0062)
    pace.ended(6200, 2000, 0.0144)
    assert pace.lead_s == pytest.approx(lead_s + 0.0005)


@pytest.mark.parametrize("pace", [StepPace(LEAD_S), make_pace(math.inf)], ids=["unknown times", "no end of a lead"])
def test_a_plan_waits_for_nothing_where(pace: StepPace) -> None:
    for _ in range(3):
        pace.planned(PROMPTS, 0.0)
        assert pace.wait_s(0.0) == 0.0
        pace.ended(20_000, 0, 0.02)


def test_the_first_plans_are_made_early() -> None:
    pace = make_pace(lead_s=0.001)
    assert pace.lead_s == 0.003
    pace.planned(DECODES, 0.0)
    for number in range(600):
        pace.arrived()
        pace.planned(DECODES, number * 0.0062)
        pace.ended(6200, 0, number * 0.0062)
    assert pace.lead_s == 0.001


def test_steps_that_verify_drafts_are_known_by_their_own_kind() -> None:
    pace = make_pace()
    verifying = StepSize(8 * 4, has_prompts=False, num_draft_tokens=3)
    pace.planned(verifying, 0.0)
    assert pace.wait_s(0.0) == 0.0  # never seen
    pace.ended(9200, None, 0.009)
    pace.planned(verifying, 0.009)
    assert pace.wait_s(0.009) == 0.006
    pace.begin_group(TIMES)
    pace.planned(verifying, 0.0)
    assert pace.wait_s(0.0) == 0.0  # other ranks


@pytest.mark.parametrize(("knows_times", "step"), [(True, 3), (False, 4)])
async def test_who_comes_while_a_step_runs_is_in_the_next(
    monkeypatch: pytest.MonkeyPatch, knows_times: bool, step: int
) -> None:
    """A request that comes when the first step has ended, so that the second runs."""
    step_us = 300_000
    monkeypatch.setattr(simulated_group, "STEP_US", step_us)
    times = (SizeTime(64, True, step_us), SizeTime(64, False, step_us))
    monkeypatch.setattr(SimulatedCluster, "size_times", times if knows_times else ())
    arguments = (PROMPT, 1, SamplingParams(), 6, frozenset[int]())
    came: dict[int, int] = {}
    num_steps = 0
    done = asyncio.Event()
    async with running_engine(1, Metrics("m")) as engine:

        def sink(outputs: Sequence[OutputEvent]) -> None:
            nonlocal num_steps
            num_steps += 1
            for output in outputs:
                came.setdefault(output.client_id, num_steps)
            if num_steps == 1:
                engine.submit(2, sink, *arguments)
            if 2 in came:
                done.set()

        engine.submit(1, sink, *arguments)
        await asyncio.wait_for(done.wait(), 20)
    assert came == {1: 1, 2: step}
