"""Measures what the host costs per decode step as the number of running sequences grows.

Regime: steady pure decode, two plans in flight, no model: everything a step costs on the coordinator's core. Parts are
timed one by one: schedule(), plan -> bytes, channel, bytes -> result, update(). The channel is any `Channel`; the one
here hands bytes over inside the process, at no cost worth naming. In each step every running sequence gets a token and
one in `page_size` gets a page.

With --grpc the whole step is timed besides over the engine's own wire: `WorkerGroup` to ranks in other processes, each
of which serves the real gRPC door with the real `Batch` and no model. One plan is in flight then, so that a step's time
holds a full round trip; in service two are, and the round trip hides behind the device. With more --ranks than cores,
only the coordinator's CPU time says something.

Run: python benchmarks/host_step.py [--steps N] [--running 1 64 ...] [--grpc [--ranks 1 4 ...]]
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import platform
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter_ns, process_time_ns
from typing import Protocol

from tpserve.coordinator.client import WorkerGroup
from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.request import Request
from tpserve.coordinator.scheduler import Scheduler
from tpserve.proto.messages import SamplingParams, StepPlan, StepResult
from tpserve.proto.pb import worker_pb2
from tpserve.worker.service import DoneStep

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


def make_scheduler(num_running: int, num_steps: int, max_in_flight_steps: int = 2) -> Scheduler:
    """Return a scheduler with room for `num_running` requests, which are queued, for `num_steps` after warm-up."""
    model_len = PROMPT_TOKENS + num_steps + WARMUP_STEPS + 256
    config = SchedulerConfig(
        max_num_seqs=num_running,
        max_num_batched_tokens=2048 + num_running,
        max_model_len=model_len,
        page_size=PAGE_SIZE,
        num_pages=(num_running + 1) * (model_len // PAGE_SIZE + 2),
        max_num_queued_requests=num_running,
        max_in_flight_steps=max_in_flight_steps,
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


class ModelFreeRunner:
    """A rank's runner without a model: the batch is kept as in service, and every row samples token 7."""

    def __init__(self, num_running: int, num_steps: int) -> None:
        from tpserve.worker.batch import Batch

        model_len = PROMPT_TOKENS + num_steps + WARMUP_STEPS + 256
        self._batch = Batch(num_running, 2048 + num_running, model_len // PAGE_SIZE + 2, PAGE_SIZE)

    def submit(self, plan: StepPlan) -> DoneStep:
        """Do what a runner does around the model."""
        self._batch.apply(plan)
        arrays = self._batch.prepare(plan)
        token_ids = arrays.sample_slots * 0 + 7
        self._batch.commit(arrays, token_ids)
        slots = tuple(arrays.sample_slots.tolist())
        return DoneStep(StepResult(plan.step_id, slots=slots, token_ids=tuple(token_ids.tolist()), step_us=1))


def serve_rank(connection: Connection, rank: int, num_running: int, num_steps: int) -> None:
    """Serve the worker's gRPC door until told to stop."""
    from tpserve.worker.service import serve

    server, port = serve(ModelFreeRunner(num_running, num_steps), rank, "127.0.0.1")
    connection.send(port)
    connection.recv()
    server.stop(None)


async def measure_grpc(num_running: int, num_steps: int, num_ranks: int) -> dict[str, float]:
    """Return p50 and p99 in ms of a whole step over gRPC, and the coordinator's CPU time of one."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(num_ranks)]
    ranks = [
        context.Process(target=serve_rank, args=(there, rank, num_running, num_steps))
        for rank, (_, there) in enumerate(pipes)
    ]
    for rank in ranks:
        rank.start()
    group = WorkerGroup([f"127.0.0.1:{here.recv()}" for here, _ in pipes], step_timeout_s=30.0, on_lost=lambda: None)
    try:
        scheduler = make_scheduler(num_running, num_steps, max_in_flight_steps=1)
        while scheduler.num_waiting or scheduler.stats().num_steps < WARMUP_STEPS:
            plan = scheduler.schedule()
            assert plan is not None
            await group.send(plan)
            scheduler.update(await group.next_result())
        times, cpu = [], process_time_ns()
        for _ in range(num_steps):
            started = perf_counter_ns()
            plan = scheduler.schedule()
            assert plan is not None
            await group.send(plan)
            scheduler.update(await group.next_result())
            times.append(perf_counter_ns() - started)
        cpu = process_time_ns() - cpu
    finally:
        await group.close()
        for (here, _), rank in zip(pipes, ranks, strict=True):
            here.send(None)
            rank.join(10)
    return {"p50_ms": percentile(times, 0.5), "p99_ms": percentile(times, 0.99), "cpu_ms": cpu / num_steps / 1e6}


def commit() -> str:
    """Return the commit that is measured."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table and the JSON line; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="timed steps for each number of running sequences")
    parser.add_argument("--running", type=int, nargs="+", default=[1, 64, 256, 1024], help="running sequences")
    parser.add_argument("--grpc", action="store_true", help="time whole steps over the engine's wire too")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="numbers of ranks, with --grpc")
    parser.add_argument("--output", type=Path, help="write the JSON object there too")
    args = parser.parse_args(arguments)
    out = sys.stdout
    out.write(f"{'running':>8}" + "".join(f"{part:>22}" for part in PARTS) + "   (p50 / p99 ms)\n")
    results = {}
    for num_running in args.running:
        parts = measure(num_running, args.steps, InProcessChannel())
        results[num_running] = parts
        cells = [f"{value['p50_ms']:.4f} / {value['p99_ms']:.4f}" for value in parts.values()]
        out.write(f"{num_running:>8}" + "".join(f"{cell:>22}" for cell in cells) + "\n")
    wire: list[dict[str, float]] = []
    for num_running, num_ranks in itertools.product(args.running, args.ranks) if args.grpc else ():
        row = asyncio.run(measure_grpc(num_running, args.steps, num_ranks))
        wire.append({"running": num_running, "ranks": num_ranks, **row})
        out.write(
            f"{num_running:>8} over gRPC to {num_ranks}: {row['p50_ms']:.3f} / {row['p99_ms']:.3f} ms, "
            f"CPU {row['cpu_ms']:.3f} ms\n"
        )
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
        "whole_step_over_grpc": wire,
    }
    if args.output:
        args.output.write_text(json.dumps(summary, indent=1) + "\n")
    out.write(json.dumps(summary) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
