"""A trace of steps loads in a viewer: each rank one track, spans that do not overlap there, times of one clock."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest

from simulated_group import STEP_US, generate, running_engine
from tpserve.coordinator.metrics import Metrics
from tpserve.coordinator.step_log import StepLog, StepTrace
from tpserve.proto.messages import StepResult


def check_chrome_trace(trace: dict[str, Any], num_ranks: int, num_steps: int) -> None:
    """Check what chrome://tracing and Perfetto ask of the format, and that it tells what it should."""
    assert trace["displayTimeUnit"] in ("ms", "ns")
    tracks: dict[tuple[int, int], list[dict[str, Any]]] = {}
    names = {}
    for event in trace["traceEvents"]:
        assert isinstance(event["pid"], int)
        assert isinstance(event["name"], str)
        match event["ph"]:
            case "M":
                assert event["name"] in ("process_name", "thread_name")
                names[event["pid"], event["tid"], event["name"]] = event["args"]["name"]
            case "X":
                assert event["ts"] >= 0
                assert event["dur"] >= 0
                assert isinstance(event["args"], dict)
                tracks.setdefault((event["pid"], event["tid"]), []).append(event)
            case "C":
                assert all(isinstance(value, int | float) for value in event["args"].values())
            case phase:
                pytest.fail(f"phase {phase!r}")
    ranks = {pid: name for (pid, _, kind), name in names.items() if kind == "process_name" and name != "coordinator"}
    assert sorted(ranks.values()) == [f"rank {rank}" for rank in range(num_ranks)]
    for (pid, _), events in tracks.items():
        begun = [event["ts"] for event in events]
        assert begun == sorted(begun)
        if pid in ranks:
            assert len(events) == num_steps
            for before, after in itertools.pairwise(events):
                assert after["ts"] >= before["ts"] + before["dur"] - 100, "steps of one rank overlap"
    assert {names[pid, tid, "thread_name"] for pid, tid in tracks if pid not in ranks} == {"scheduler", "host"}


async def test_steps_are_recorded_as_chrome_trace() -> None:
    async with running_engine(2, Metrics("m")) as engine:
        recording = asyncio.create_task(engine.trace(4, 20.0))
        await asyncio.sleep(0)
        await generate(engine)
        trace = json.loads(await recording)
        check_chrome_trace(trace, num_ranks=2, num_steps=4)
        assert trace["otherData"]["steps"] == 4
        steps = [event for event in trace["traceEvents"] if event.get("cat") == "step"]
        assert {event["dur"] for event in steps} == {STEP_US}
        assert steps[0]["args"]["all_reduce"]["calls"] == 4
        # With nothing to run, what there was is returned in time: nothing.
        assert json.loads(await engine.trace(3, 0.05))["otherData"]["steps"] == 0


async def test_only_one_trace_at_a_time() -> None:
    trace = StepTrace()
    first = asyncio.create_task(trace.record(1, ["0"], 5.0))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="another trace"):
        await trace.record(1, ["0"], 5.0)
    trace.rank(StepResult(1, 0, started_us=2**60, num_tokens=1))
    await asyncio.wait_for(first, 5)


@pytest.mark.parametrize("late_first", [True, False])
async def test_a_step_that_one_rank_began_before_the_trace_is_left_out_on_all(late_first: bool) -> None:
    trace = StepTrace()
    recording = asyncio.create_task(trace.record(2, ["0", "1"], 5.0))
    await asyncio.sleep(0)
    early = StepResult(1, 0, started_us=0, step_us=1, num_tokens=1)
    late = StepResult(1, 1, started_us=2**60, step_us=1, num_tokens=1)
    for result in (late, early) if late_first else (early, late):
        trace.rank(result)
    for step in (2, 3):
        for rank in (0, 1):
            trace.rank(StepResult(step, rank, started_us=2**60 + step, step_us=1, num_tokens=1))
    recorded = json.loads(await asyncio.wait_for(recording, 1))
    steps = [(event["pid"], event["args"]["step"]) for event in recorded["traceEvents"] if event.get("cat") == "step"]
    assert sorted(steps) == [(100, 2), (100, 3), (101, 2), (101, 3)]
    assert recorded["otherData"]["steps"] == 2


def test_a_step_is_complete_with_its_last_rank_and_old_ones_are_forgotten() -> None:
    log = StepLog(2)
    assert log.add(StepResult(1, 0)) is None
    assert not log.is_complete(1)
    complete = log.add(StepResult(1, 1))
    assert complete is not None
    assert [result.rank for result in complete] == [0, 1]
    for step in range(2, 300):
        log.add(StepResult(step, 0))
    assert log.ranks_of(1) == ()
    assert len(log.ranks_of(199)) == 1
