"""Measures what metrics and step records cost the coordinator per step, which shall stay within 50 us.

Regime: steady decode of N sequences at TP ranks, every result as a real one (collectives of both kinds on every rank),
no network and no model. The same engine code runs over a stream of results with its metrics, and with their methods
replaced by nothing; the difference is their cost. One CPU core.

Run: python benchmarks/metrics_step.py [--steps N] [--running 1 16 64] [--tp 1 4 8]
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns
from typing import Any
from unittest.mock import patch

from tpserve.coordinator.cluster import Cluster, ClusterConfig
from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.engine import Engine, EngineConfig
from tpserve.coordinator.metric_values import CounterFamily, Histogram
from tpserve.coordinator.metrics import Metrics
from tpserve.coordinator.request import TokenEvent
from tpserve.coordinator.scheduler import Scheduler
from tpserve.coordinator.step_log import StepLog
from tpserve.proto.messages import CollectiveUse, SamplingParams, StepResult
from tpserve.proto.rank import RankConfig

LIMIT_US = 50.0
ROUNDS = 5


def make_engine(num_running: int, tp_size: int) -> tuple[Engine, list[int]]:
    """Return an engine that has accepted requests, and their keys; its group is never started."""
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=num_running,
            max_num_batched_tokens=2048,
            max_model_len=1 << 20,
            page_size=16,
            num_pages=1 << 16,
            max_num_queued_requests=num_running,
        )
    )
    rank = RankConfig(0, tp_size, Path(), Path(), "dummy", 1, num_running, 1, "", 1.0)
    engine = Engine(EngineConfig(), scheduler, Cluster(ClusterConfig(rank, 1.0)), Metrics("m"))
    engine._metrics.make_ranks([str(rank) for rank in range(tp_size)])
    engine._num_model_ranks = tp_size
    engine._step_log = StepLog(tp_size)
    keys = [
        engine.submit(i, lambda _: None, (1, 2, 3), 1, SamplingParams(), 1 << 18, frozenset())
        for i in range(num_running)
    ]
    return engine, keys


def run(engine: Engine, keys: list[int], tp_size: int, num_steps: int) -> list[float]:
    """Return the time of each step in us, from the ranks' results to the events given out."""
    slots = tuple(range(len(keys)))
    uses = (CollectiveUse("all_reduce", 60, 1 << 20, 900), CollectiveUse("all_gather", 1, 1 << 16, 40))
    events = [TokenEvent(key, 0, (7,)) for key in keys]
    times = []
    for step in range(1, num_steps + 1):
        results = [
            StepResult(
                step,
                rank,
                slots if rank == 0 else (),
                (7,) * len(slots) if rank == 0 else (),
                step_us=5000 + rank,
                collective_us=940 + rank,
                collectives=uses,
                started_us=step * 5100,
                num_tokens=len(slots),
                bucket_tokens=64,
                bucket_rows=64,
            )
            for rank in range(tp_size)
        ]
        begin = perf_counter_ns()
        for result in results:
            engine._on_rank_result(result)
        engine._observe(results[0])
        engine._active.publish(events, step)
        times.append((perf_counter_ns() - begin) / 1000)
    return times


def without_metrics(measure: Callable[[], list[float]]) -> list[float]:
    """Run with everything that counts replaced by nothing."""

    def nothing(*_: Any) -> None:
        return None

    with (
        patch.object(Engine, "_on_rank_result", nothing),
        patch.object(Engine, "_observe", nothing),
        patch.object(Histogram, "observe", nothing),
        patch.object(CounterFamily, "inc", nothing),
    ):
        return measure()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 4, 8])
    args = parser.parse_args()
    rows = []
    for tp_size in args.tp:
        for num_running in args.running:
            engine, keys = make_engine(num_running, tp_size)

            def measure(engine: Engine = engine, keys: list[int] = keys, tp_size: int = tp_size) -> list[float]:
                return run(engine, keys, tp_size, args.steps)

            measure()  # warm up
            # In turns, and the best round of each: another process on this core would look like a cost.
            rounds = [(without_metrics(measure), measure()) for _ in range(ROUNDS)]
            bare = min((times for times, _ in rounds), key=statistics.median)
            full = min((times for _, times in rounds), key=statistics.median)
            row = {
                "tp_size": tp_size,
                "num_running": num_running,
                "with_us": statistics.median(full),
                "with_p99_us": sorted(full)[int(0.99 * len(full))],
                "without_us": statistics.median(bare),
                "cost_us": statistics.median(full) - statistics.median(bare),
            }
            rows.append({name: round(value, 2) for name, value in row.items()})
            print(rows[-1])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    report = {
        "benchmark": "metrics_step",
        "commit": commit,
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "arguments": vars(args),
        "limit_us": LIMIT_US,
        "largest_cost_us": max(row["cost_us"] for row in rows),
        "rows": rows,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
