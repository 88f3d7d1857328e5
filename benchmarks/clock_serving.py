"""What the host adds to a device's steps: the real engine, its wire, a rank's door and gateways; the device is a clock.

Regime: the peers' closed loop of C clients and their lengths, one rank in a process of its own, whose steps take what
`prompt_order.py` has of Llama-3-70B fp8 TP=4 on H200s, or `--scale` times that, with a rest of `--between-us` between
two steps, as GPUs have it. `--gateways` 1 or more: over HTTP, with the peers' client in a process of its own; 0:
without HTTP, each client sending its next request `--turnaround-ms` after it has had its last token. Told: TTFT and
TPOT, for how long in a step the device had nothing to do, and the time before their step at which plans are made at
the end. Times on busy cores say nothing: compare in one run on a quiet machine.

Run: python benchmarks/clock_serving.py --client FILE [--plan-lead-ms 1 inf] [--gateways 1 --model FOLDER].
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from multiprocessing.connection import Connection
from pathlib import Path

import grpc.aio

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from benchmarks.gpu_server import SERVED_NAME, load_client
from benchmarks.host_step import commit
from benchmarks.prompt_order import size_times, step_ms

from tpserve.coordinator.active_requests import OutputEvent
from tpserve.coordinator.children import first_words, spawn_child
from tpserve.coordinator.cluster import Cluster, ClusterConfig
from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.engine import Engine, EngineConfig, EngineStatus
from tpserve.coordinator.metrics import Metrics
from tpserve.coordinator.process import bind
from tpserve.coordinator.scheduler import Scheduler
from tpserve.coordinator.service import EngineService
from tpserve.proto.manifest import GPU_STEP_TOKENS
from tpserve.proto.messages import SamplingParams, StepPlan, StepResult
from tpserve.proto.pb import engine_pb2, engine_pb2_grpc
from tpserve.proto.rank import RankAddress, RankConfig, SizeTime

NUM_SEQS, MODEL_LEN, PAGE_SIZE, NUM_PAGES = 64, 8192, 16, 40_000
VOCAB_SIZE = 128_256
RAMP_TOKENS = 190
"""Most of each client's first request, which does not count."""


class ClockRunner:
    """A rank's runner whose steps take so long, one after the other."""

    def __init__(self, scale: float, between_us: float) -> None:
        from tpserve.worker.batch import Batch

        self._batch = Batch(NUM_SEQS, GPU_STEP_TOKENS, MODEL_LEN // PAGE_SIZE, PAGE_SIZE)
        self._scale = scale
        self._between_s = between_us / 1e6
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
        started = max(self._free_at + self._between_s, time.time())
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


def serve_rank(connection: Connection, scale: float, between_us: float) -> None:
    """Serve the worker's door until told to stop."""
    from tpserve.worker.service import serve

    server, port = serve(ClockRunner(scale, between_us), 0, "127.0.0.1")
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


def run_client(connection: Connection, client: Path, port: int, concurrency: int) -> None:
    """Send what the peers' client says of a point."""
    run_point = load_client(client).run_point
    connection.send(asyncio.run(run_point("127.0.0.1", port, SERVED_NAME, concurrency, limit_s=120.0))[0])


@contextlib.asynccontextmanager
async def gateways(engine: Engine, metrics: Metrics, model: Path, count: int) -> AsyncIterator[int]:
    """Run so many gateways before the engine; give their port."""
    info = engine_pb2.EngineInfo(
        model_dir=str(model), max_model_len=MODEL_LEN, vocab_size=VOCAB_SIZE, max_num_seqs=NUM_SEQS, tp_size=1
    )
    server = grpc.aio.server()
    service = EngineService(engine, metrics, info)
    engine_pb2_grpc.add_EngineServicer_to_server(service, server)  # type: ignore[no-untyped-call]  # generated
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    shared = bind("127.0.0.1", 0)
    config = {
        "engine_address": f"127.0.0.1:{port}",
        "model_dir": str(model),
        "served_model_names": [SERVED_NAME],
        "listen_fd": shared.fileno(),
    }
    with tempfile.TemporaryDirectory() as folder:
        environment = {"PROMETHEUS_MULTIPROC_DIR": folder} if count > 1 else {}
        keep = (shared.fileno(),)
        started = [spawn_child("tpserve.coordinator.gateway", config, environment, keep) for _ in range(count)]
        try:
            for gateway in started:
                await asyncio.to_thread(first_words, "gateway", gateway, "url")
            yield shared.getsockname()[1]
        finally:
            for gateway in started:
                gateway.terminate()
            for gateway in started:
                await asyncio.to_thread(gateway.wait, 30)
            shared.close()
            service.close()
            await server.stop(1)


async def serve_http(
    engine: Engine, metrics: Metrics, model: Path, client: Path, concurrency: int, count: int
) -> dict[str, float]:
    """Run the peers' client against so many gateways."""
    context = multiprocessing.get_context("spawn")
    async with gateways(engine, metrics, model, count) as port:
        here, there = context.Pipe()
        process = context.Process(target=run_client, args=(there, client, port, concurrency))
        process.start()
        there.close()
        said = await asyncio.to_thread(here.recv)
        process.join(10)
    assert said["err"] is None, said["err"]
    return {"ttft_mean_ms": said["ttft_mean"], "tpot_mean_ms": said["tpot_mean"], "itl_p99_ms": said["itl_p99"]}


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


async def serve(
    engine: Engine, lengths: dict[str, list[int]], concurrency: int, turnaround_s: float
) -> dict[str, float]:
    """Run a closed loop of clients in this process."""
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
    several = [each for each in counted if len(each.times) > 1]
    gaps = [after - before for each in several for before, after in pairwise(each.times)]
    tpots = [(each.times[-1] - each.times[0]) / (len(each.times) - 1) for each in several]
    return {
        "ttft_mean_ms": 1e3 * statistics.mean(each.times[0] - each.sent for each in counted),
        "tpot_mean_ms": 1e3 * statistics.mean(tpots),
        "itl_p99_ms": 1e3 * sorted(gaps)[int(0.99 * len(gaps))],
    }


async def measure(args: argparse.Namespace, concurrency: int, lead_ms: float, num_gateways: int) -> dict[str, float]:
    """Return what one point says."""
    scale: float = args.scale
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    rank = context.Process(target=serve_rank, args=(there, scale, args.between_us))
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
        if num_gateways:
            found = await serve_http(engine, metrics, args.model, args.client, concurrency, num_gateways)
        else:
            lengths = json.loads(args.client.with_name("lengths.json").read_text())
            found = await serve(engine, lengths, concurrency, args.turnaround_ms / 1e3)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        here.send(None)
        rank.join(10)
    return found | {
        "idle_mean_us": statistics.mean(metrics.gaps_us),
        "idle_steps": sum(gap > 50 for gap in metrics.gaps_us) / len(metrics.gaps_us),
        "lead_at_end_ms": 1e3 * engine.plan_lead_s(),
    }


def main() -> None:
    """Measure all points and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--client", type=Path, required=True, help="the load client, with its lengths beside it")
    parser.add_argument("--model", type=Path, help="folder with a tokenizer, for gateways")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--gateways", type=int, nargs="+", default=[0])
    parser.add_argument("--plan-lead-ms", type=float, nargs="+", default=[1.0, math.inf])
    parser.add_argument("--turnaround-ms", type=float, default=3.0)
    parser.add_argument("--scale", type=float, default=1.0, help="of a step's time")
    parser.add_argument("--between-us", type=float, default=6.0, help="between two steps that were queued in time")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    points = []
    for concurrency, lead_ms, num_gateways in product(args.concurrency, args.plan_lead_ms, args.gateways):
        point = asyncio.run(measure(args, concurrency, lead_ms, num_gateways))
        lead = lead_ms if math.isfinite(lead_ms) else None
        what = {"concurrency": concurrency, "plan_lead_ms": lead, "gateways": num_gateways}
        points.append(what | {name: round(value, 4) for name, value in point.items()})
        print(points[-1], flush=True)
    if args.output:
        facts = {
            "benchmark": "clock_serving",
            "commit": commit(),
            "device": f"{os.cpu_count()} cores of a {platform.processor() or platform.machine()}",
            "python": platform.python_version(),
            "turnaround_ms": args.turnaround_ms,
            "scale": args.scale,
            "between_us": args.between_us,
        }
        args.output.write_text(json.dumps(facts | {"points": points}, indent=1) + "\n")


if __name__ == "__main__":
    main()
