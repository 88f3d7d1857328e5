"""What each rank said of the last steps, put together by step; and, on demand, a trace of steps for a viewer.

Owns times only. The trace is in Chrome's trace event format, which Perfetto and chrome://tracing open: one track for
each rank, one for the scheduler and one for the rest of the host's work.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

from tpserve.proto.messages import StepResult

_KEPT_STEPS = 256
"""More than can be in flight, and than rank 0 is ahead of what the others have reported; a step that a rank has not
reported by then belongs to a lost group."""
MAX_TRACE_STEPS = 10_000
"""Of one trace: some megabytes."""
_COORDINATOR_PID = 1
_FIRST_RANK_PID = 100
_TRACKS = {"schedule": 1, "send": 2, "update": 2, "publish": 2}
"""Thread ids within the coordinator, by what is done."""


class StepLog:
    """The last steps by id, each with the results of the ranks that have reported it."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._steps: dict[int, list[StepResult]] = {}

    def add(self, result: StepResult) -> list[StepResult] | None:
        """Take in a rank's result; return all ranks' if it was the last to come."""
        step = self._steps.setdefault(result.step_id, [])
        step.append(result)
        if len(self._steps) > _KEPT_STEPS:
            del self._steps[next(iter(self._steps))]
        return step if len(step) == self._num_ranks else None

    def is_complete(self, step_id: int) -> bool:
        """Return whether every rank has reported a step."""
        return len(self._steps.get(step_id, ())) == self._num_ranks

    def ranks_of(self, step_id: int) -> Sequence[StepResult]:
        """Return what has been reported of a step so far."""
        return self._steps.get(step_id, ())


class StepTrace:
    """Records steps while somebody asks for it; costs one comparison else."""

    def __init__(self) -> None:
        self.active = False
        self._host_events: list[dict[str, Any]] = []
        self._num_wanted = 0
        self._num_ranks = 0
        self._begin_us = 0
        self._clock_us = 0.0
        """Unix time at perf_counter() = 0."""
        self._steps: dict[int, list[StepResult]] = {}
        """What the ranks have reported, by step."""
        self._first_step_id = 0
        """Steps before it had begun on some rank when the recording began."""
        self._done = asyncio.Event()

    async def record(self, num_steps: int, rank_names: Sequence[str], timeout_s: float) -> str:
        """Record the next steps and return the trace as JSON.

        With fewer steps if no more were run in time; `otherData` says how many there are.

        Parameters
        ----------
        rank_names
            By rank.

        Raises
        ------
        RuntimeError
            If a recording is under way.
        """
        if self.active:
            raise RuntimeError("another trace is being recorded")
        self._host_events = []
        self._steps = {}
        self._first_step_id = 0
        self._num_wanted = num_steps
        self._num_ranks = len(rank_names)
        self._begin_us = time.time_ns() // 1000
        self._clock_us = time.time_ns() / 1000 - time.perf_counter() * 1e6
        self._done.clear()
        self.active = True
        try:
            await asyncio.wait_for(self._done.wait(), timeout_s)
        except TimeoutError:
            pass
        finally:
            self.active = False
        of_ranks = [event for seen in self._steps.values() for result in seen for event in self._events_of(result)]
        return json.dumps(
            {
                "traceEvents": [
                    *_names(rank_names),
                    *sorted([*self._host_events, *of_ranks], key=lambda event: event["ts"]),
                ],
                "displayTimeUnit": "ms",
                "otherData": {"steps_asked": num_steps, "steps": len(self._steps), "begin_unix_us": self._begin_us},
            }
        )

    def host(self, what: str, begun: float, step_id: int | None = None) -> None:
        """Note host work that ends now.

        Parameters
        ----------
        begun
            `perf_counter()` at its begin.
        """
        if not self.active:
            return
        ts = self._clock_us + begun * 1e6 - self._begin_us
        if ts >= 0:
            args = {} if step_id is None else {"step": step_id}
            duration = (time.perf_counter() - begun) * 1e6
            self._host_events.append(_span(what, "host", ts, duration, _COORDINATOR_PID, _TRACKS[what], args))

    def rank(self, result: StepResult) -> None:
        """Note one rank's step; a step that any rank began before the recording is left out on all."""
        if not self.active or result.step_id < self._first_step_id:
            return
        if result.started_us < self._begin_us:
            self._first_step_id = result.step_id + 1
            self._steps = {step_id: seen for step_id, seen in self._steps.items() if step_id > result.step_id}
            return
        if result.step_id not in self._steps and len(self._steps) == self._num_wanted:
            return
        self._steps.setdefault(result.step_id, []).append(result)
        if len(self._steps) == self._num_wanted:
            if all(len(seen) == self._num_ranks for seen in self._steps.values()):
                self._done.set()

    def _events_of(self, result: StepResult) -> list[dict[str, Any]]:
        kind = "step"
        if result.rank == 0 and result.num_tokens == len(result.slots) + sum(result.drafted):
            kind = "verify" if result.drafted else "decode"
        args: dict[str, Any] = {"step": result.step_id, "tokens": result.num_tokens, "rank": result.rank}
        if result.bucket_tokens:
            args["bucket"] = f"{result.bucket_tokens}x{result.bucket_rows}"
        for use in result.collectives:
            args[use.kind] = {"calls": use.num_calls, "bytes": use.num_bytes, "us": use.busy_us}
        ts = result.started_us - self._begin_us
        pid = _FIRST_RANK_PID + result.rank
        events = [_span(f"{kind} {result.step_id}", "step", ts, result.step_us, pid, 1, args)]
        if result.rank == 0:
            counts = {"tokens": result.num_tokens}
            events.append({"name": "tokens", "ph": "C", "ts": ts, "pid": _COORDINATOR_PID, "args": counts})
        return events


def _span(
    name: str, category: str, ts_us: float, duration_us: float, pid: int, tid: int, args: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "ts": round(ts_us, 3),
        "dur": round(duration_us, 3),
        "pid": pid,
        "tid": tid,
        "args": args,
    }


def _names(rank_names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the events that name processes and tracks."""
    names: list[dict[str, Any]] = [
        _name("process_name", _COORDINATOR_PID, 0, "coordinator"),
        _name("thread_name", _COORDINATOR_PID, 1, "scheduler"),
        _name("thread_name", _COORDINATOR_PID, 2, "host"),
    ]
    for rank, label in enumerate(rank_names):
        names.append(_name("process_name", _FIRST_RANK_PID + rank, 0, f"rank {label}"))
        names.append(_name("thread_name", _FIRST_RANK_PID + rank, 1, "steps"))
    return names


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
