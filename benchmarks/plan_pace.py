"""What it brings to plan late, and what it costs: the real engine, its wire and a rank's door; the device is a clock.

Regime: the peers' closed loop of C clients (`--lengths`), each of which sends its next request `--turnaround-ms` after
it has had its last token; no gateway. One rank in a process of its own, whose steps take what `prompt_order.py` has of
Llama-3-70B fp8 TP=4 on H200s, or `--scale` times that. Told: TTFT and TPOT, for how long in a step the device had
nothing to do, and the lead at the end. Times on busy cores say nothing: compare leads in one run on a quiet machine.

Run: python benchmarks/plan_pace.py --lengths FILE [--plan-lead-ms 1 inf] [--output FILE].
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from multiprocessing.connection import Connection
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from benchmarks.host_step import commit
from benchmarks.prompt_order import size_times, step_ms

from tpserve.coordinator.active_requests import OutputEvent
from tpserve.coordinator.cluster import Cluster, ClusterConfig
from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.engine import Engine, EngineConfig, EngineStatus
from tpserve.coordinator.metrics import Metrics
from tpserve.coordinator.scheduler import Scheduler
from tpserve.proto.manifest import GPU_STEP_TOKENS
from tpserve.proto.messages import SamplingParams, StepPlan, StepResult
from tpserve.proto.rank import RankAddress, RankConfig, SizeTime

NUM_SEQS, MODEL_LEN, PAGE_SIZE, NUM_PAGES = 64, 8192, 16, 40_000
RAMP_TOKENS = 190
"""Most of each client's first request, which does not count."""


class ClockRunner:
    """A rank's runner whose steps take so long, one after the other."""

    def __init__(self, scale: float) -> None:
        from tpserve.worker.batch import Batch

        self._batch = Batch(NUM_SEQS, GPU_STEP_TOKENS, MODEL_LEN // PAGE_SIZE, PAGE_SIZE)
        self._scale = scale
        self._free_at = 0.0

    def submit(self, plan: StepPlan) -> ClockStep:
        """Queue a step behind those before it."""
        self._batch.apply(plan)
        arrays = self._batch.prepare(plan)
        self._batch.commit(arrays, arrays.sample_slots * 0 + 7)
        slots = tuple(arrays.sample_slots.tolist())
        num_decodes = len(slots) - sum(chunk.sample for chunk in plan.chunks)
        num_prompt_tokens = sum(len(chunk.token_ids) for chunk in plan.chunks)
        took_s = step_ms(num_decodes, num_prompt_tokens) * self._scale / 1e3
        started = max(self._free_at, time.time())
        self._free_at = started + took_s
        step_us, started_us = round(took_s * 1e6), round(started * 1e6)
        return ClockStep(
            self._free_at,
            StepResult(
                plan.step_id,
                slots=slots,
                token_ids=(7,) * len(slots),
                step_us=step_us,
                started_us=started_us,
                num_tokens=num_decodes + num_prompt_tokens,
            ),
        )


@dataclass(frozen=True, slots=True)
class ClockStep:
    """A step that is on its way until that time."""

    ends_at: float
    result: StepResult

    def wait(self) -> StepResult:
        """Sleep until it is done."""
        time.sleep(max(0.0, self.ends_at - time.time()))
        return self.result


def serve_rank(connection: Connection, scale: float) -> None:
    """Serve the worker's door until told to stop."""
    from tpserve.worker.service import serve

    server, port = serve(ClockRunner(scale), 0, "127.0.0.1")
    connection.send(port)
    connection.recv()
    server.stop(None)


class FoundCluster(Cluster):
    """Finds its rank running."""

    def __init__(self, port: int, times: Sequence[SizeTime]) -> None:
        rank = RankConfig(0, 1, Path(), Path(), "dummy", NUM_PAGES, NUM_SEQS, 1, "", 1.0)
        super().__init__(ClusterConfig(rank, 60.0))
        self._address = RankAddress(0, "127.0.0.1", port, 0, "elsewhere", size_times=tuple(times))

    async def start_ranks(self) -> Sequence[RankAddress]:
        """Return it."""
        return [self._address]


@dataclass(slots=True)
class Served:
    """One request; times in seconds."""

    sent: float
    times: list[float] = field(default_factory=list)


class Idle(Metrics):
    """Keeps the times between steps."""

    gaps_us: list[int]

    def observe_step(self, result: StepResult, gap_us: int | None) -> None:
        """See Metrics."""
        super().observe_step(result, gap_us)
        if gap_us is not None:
            self.gaps_us.append(gap_us)


async def serve(engine: Engine, lengths: dict[str, list[int]], concurrency: int, turnaround_s: float) -> list[Served]:
    """Run a closed loop of clients; return the requests that count."""
    prompts, outputs = lengths["prompt_len"], lengths["output_len"]
    num_measured = max(8, 3 * concurrency)
    next_request = iter(range(num_measured + concurrency))
    counted: list[Served] = []

    async def ask(place: int, num_tokens: int) -> Served:
        served, done = Served(time.perf_counter()), asyncio.Event()

        def sink(events: Sequence[OutputEvent]) -> None:
            for output in events:
                served.times += [time.perf_counter()] * len(output.event.token_ids)
                if output.event.finish is not None:
                    done.set()

        prompt = tuple((place * 31 + i) % 997 for i in range(prompts[place % len(prompts)]))
        engine.submit(place, sink, prompt, 1, SamplingParams(temperature=0.0), num_tokens, frozenset())
        await done.wait()
        return served

    async def client(number: int) -> None:
        share = (number + 0.5) / concurrency
        place = len(prompts) - 1 - number
        await ask(place, max(2, int(min(outputs[place], RAMP_TOKENS) * share)))
        while (place := next(next_request, num_measured)) < num_measured:
            await asyncio.sleep(turnaround_s)
            counted.append(await ask(place, outputs[place % len(outputs)]))

    await asyncio.wait_for(asyncio.gather(*map(client, range(concurrency))), 300)
    return counted


async def measure(
    lengths: dict[str, list[int]], concurrency: int, lead_ms: float, turnaround_ms: float, scale: float
) -> dict[str, float]:
    """Return what one point says."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    rank = context.Process(target=serve_rank, args=(there, scale))
    rank.start()
    scheduler = Scheduler(
        SchedulerConfig(NUM_SEQS, GPU_STEP_TOKENS, MODEL_LEN, PAGE_SIZE, NUM_PAGES, enable_prefix_cache=False)
    )
    metrics = Idle("benchmark")
    metrics.gaps_us = []
    times = [SizeTime(each.num_tokens, each.decode_only, round(each.step_us * scale)) for each in size_times()]
    cluster = FoundCluster(here.recv(), times)
    engine = Engine(EngineConfig(plan_lead_s=lead_ms / 1e3), scheduler, cluster, metrics)
    ready = asyncio.Event()
    engine.watch_status(lambda: ready.set() if engine.status[0] is EngineStatus.READY else None)
    serving = asyncio.create_task(engine.run())
    try:
        await asyncio.wait_for(ready.wait(), 30)
        served = await serve(engine, lengths, concurrency, turnaround_ms / 1e3)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        here.send(None)
        rank.join(10)
    several = [each for each in served if len(each.times) > 1]
    gaps = [after - before for each in several for before, after in pairwise(each.times)]
    return {
        "ttft_mean_ms": 1e3 * statistics.mean(each.times[0] - each.sent for each in served),
        "tpot_mean_ms": 1e3
        * statistics.mean((each.times[-1] - each.times[0]) / (len(each.times) - 1) for each in several),
        "itl_p99_ms": 1e3 * sorted(gaps)[int(0.99 * len(gaps))],
        "idle_mean_us": statistics.mean(metrics.gaps_us),
        "idle_steps": sum(gap > 50 for gap in metrics.gaps_us) / len(metrics.gaps_us),
        "lead_at_end_ms": 1e3 * engine.plan_lead_s(),
    }


def main() -> None:
    """Measure all points and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, required=True, help="the peers' file of prompt_len and output_len")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--plan-lead-ms", type=float, nargs="+", default=[1.0, math.inf])
    parser.add_argument("--turnaround-ms", type=float, default=3.0)
    parser.add_argument("--scale", type=float, default=1.0, help="of a step's time")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    lengths = json.loads(args.lengths.read_text())
    points = []
    for concurrency, lead_ms in product(args.concurrency, args.plan_lead_ms):
        point = asyncio.run(measure(lengths, concurrency, lead_ms, args.turnaround_ms, args.scale))
        rounded = {name: round(value, 4) for name, value in point.items()}
        points.append({"concurrency": concurrency, "plan_lead_ms": lead_ms, **rounded})
        print(points[-1], flush=True)
    if args.output:
        facts = {"benchmark": "plan_pace", "commit": commit(), "turnaround_ms": args.turnaround_ms, "scale": args.scale}
        args.output.write_text(json.dumps(facts | {"points": points}, indent=1) + "\n")


if __name__ == "__main__":
    main()
