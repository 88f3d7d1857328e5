"""Measures what the host costs per decode step as the number of running sequences grows.

Regime: steady pure decode, two plans in flight, no model: everything a step costs on the coordinator's core. Parts are
timed one by one: schedule(), plan -> bytes, channel, bytes -> result, update(). The channel is any `Channel`; the one
here hands bytes over inside the process, at no cost worth naming. In each step every running sequence gets a token and
one in `page_size` gets a page.

Run: python benchmarks/host_step.py [--steps N] [--running 1 64 ...]. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import Protocol

from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.request import Request
from tpserve.coordinator.scheduler import Scheduler
from tpserve.proto.messages import SamplingParams, StepPlan, StepResult
from tpserve.proto.pb import worker_pb2

PARTS = ("schedule", "plan_to_bytes", "channel", "bytes_to_result", "update", "total")
TARGETS_MS = {64: 1.0, 1024: 5.0}
PAGE_SIZE = 16
WARMUP_STEPS = 100
PROMPT_TOKENS = 32


class Channel(Protocol):
    """Carries plans to a worker and results back."""

    def send(self, plan: bytes) -> None:
        """Send a plan. Timed."""

    def receive(self) -> bytes:
        """Wait for the next result. Timed."""

    def settle(self) -> None:
        """Do the worker's own work, if it is done in this process. Not timed."""


class InProcessChannel:
    """Ends at a worker in this process, of which every decoding slot samples token 7."""

    def __init__(self) -> None:
        self._slots: list[int] = []
        self._plans: deque[bytes] = deque()
        self._answers: deque[bytes] = deque()

    def send(self, plan: bytes) -> None:
        """Leave a plan for `settle`."""
        self._plans.append(plan)

    def receive(self) -> bytes:
        """Take the oldest answer."""
        return self._answers.popleft()

    def settle(self) -> None:
        """Answer the plans that were sent."""
        while self._plans:
            plan = StepPlan.from_pb(worker_pb2.StepPlan.FromString(self._plans.popleft()))
            if plan.removed_slots:
                self._slots = [slot for slot in self._slots if slot not in plan.removed_slots]
            self._slots += [chunk.slot for chunk in plan.chunks if chunk.sample]
            result = StepResult(plan.step_id, slots=tuple(self._slots), token_ids=(7,) * len(self._slots), step_us=1)
            self._answers.append(result.to_pb().SerializeToString())


def percentile(values: list[int], share: float) -> float:
    """Return the value in ms below which that share of `values`, in ns, lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] / 1e6


def make_scheduler(num_running: int, num_steps: int) -> Scheduler:
    """Return a scheduler with room for `num_running` requests, which are queued, for `num_steps` after warm-up."""
    model_len = PROMPT_TOKENS + num_steps + WARMUP_STEPS + 256
    config = SchedulerConfig(
        max_num_seqs=num_running,
        max_num_batched_tokens=2048 + num_running,
        max_model_len=model_len,
        page_size=PAGE_SIZE,
        num_pages=(num_running + 1) * (model_len // PAGE_SIZE + 2),
        max_num_queued_requests=num_running,
    )
    scheduler = Scheduler(config)
    for index in range(num_running):
        # Prompt lengths differ, so that page borders spread over the steps as they do in service.
        prompt = tuple((index * 31 + i) % 49152 for i in range(PROMPT_TOKENS + index % PAGE_SIZE))
        scheduler.add_request(Request(index, prompt, SamplingParams(), model_len, stop_token_ids=frozenset({2})))
    return scheduler


def fill_batch(scheduler: Scheduler, channel: Channel) -> None:
    """Step until every request decodes and as many plans are in flight as may be."""
    while True:
        plan = scheduler.schedule()
        if plan is None:
            if scheduler.num_waiting == 0 and scheduler.stats().num_steps > WARMUP_STEPS:
                return
            scheduler.update(StepResult.from_pb(worker_pb2.StepResult.FromString(channel.receive())))
        else:
            channel.send(plan.to_pb().SerializeToString())
            channel.settle()


def measure(num_running: int, num_steps: int, channel: Channel) -> dict[str, dict[str, float]]:
    """Return p50 and p99 in ms of each part of a step."""
    scheduler = make_scheduler(num_running, num_steps)
    fill_batch(scheduler, channel)
    times: dict[str, list[int]] = {part: [] for part in PARTS}
    for _ in range(num_steps):
        for part, value in zip(PARTS, run_step(scheduler, channel), strict=True):
            times[part].append(value)
    return {part: {"p50_ms": percentile(v, 0.5), "p99_ms": percentile(v, 0.99)} for part, v in times.items()}


def run_step(scheduler: Scheduler, channel: Channel) -> tuple[int, ...]:
    """Take in one result, send one plan, and return the ns of each of `PARTS`."""
    started = perf_counter_ns()
    answer = channel.receive()
    received = perf_counter_ns()
    result = StepResult.from_pb(worker_pb2.StepResult.FromString(answer))
    parsed = perf_counter_ns()
    events = scheduler.update(result)
    updated = perf_counter_ns()
    plan = scheduler.schedule()
    scheduled = perf_counter_ns()
    assert plan is not None
    assert not plan.chunks
    assert len(events) == scheduler.num_running
    message = plan.to_pb().SerializeToString()
    serialised = perf_counter_ns()
    channel.send(message)
    sent = perf_counter_ns()
    channel.settle()
    return (
        scheduled - updated,
        serialised - scheduled,
        (received - started) + (sent - serialised),
        parsed - received,
        updated - parsed,
        sent - started,
    )


def commit() -> str:
    """Return the commit that is measured."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table and the JSON line; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="timed steps for each number of running sequences")
    parser.add_argument("--running", type=int, nargs="+", default=[1, 64, 256, 1024], help="running sequences")
    args = parser.parse_args(arguments)
    out = sys.stdout
    out.write(f"{'running':>8}" + "".join(f"{part:>22}" for part in PARTS) + "   (p50 / p99 ms)\n")
    results = {}
    for num_running in args.running:
        parts = measure(num_running, args.steps, InProcessChannel())
        results[num_running] = parts
        cells = [f"{value['p50_ms']:.4f} / {value['p99_ms']:.4f}" for value in parts.values()]
        out.write(f"{num_running:>8}" + "".join(f"{cell:>22}" for cell in cells) + "\n")
    missed = [n for n, limit in TARGETS_MS.items() if n in results and results[n]["total"]["p50_ms"] > limit]
    summary = {
        "benchmark": "host_step",
        "commit": commit(),
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "steps": args.steps,
        "page_size": PAGE_SIZE,
        "targets_ms": TARGETS_MS,
        "missed": missed,
        "results": results,
    }
    out.write(json.dumps(summary) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
