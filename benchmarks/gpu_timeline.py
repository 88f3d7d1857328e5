"""Where the time of a decode step on GPUs goes: microseconds of each kernel, and the device's idle time between steps.

Regime: as `gpu_decode.py`, pure decode steps of C sequences with random weights, recorded by torch's profiler on rank
0 (the recording itself makes a step a little longer). Kernels overlap, since each starts while the one before drains;
a kernel is charged the time from the latest end before it to its own end. Idle is the time from a step's last kernel
to the next step's first.

Run on a host with GPUs and torch: python benchmarks/gpu_timeline.py --artifact FOLDER --model FOLDER.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections import defaultdict, deque
from itertools import pairwise
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from benchmarks.gpu_decode import device_name, make_scheduler

from rank_group import RankGroup, RankProcesses
from tpserve.coordinator.request import Request
from tpserve.coordinator.scheduler import Scheduler
from tpserve.proto.manifest import Manifest
from tpserve.proto.messages import SamplingParams

FIRST_KERNEL = "load_last_tokens"
WARM_UP_STEPS, RECORDED_STEPS = 12, 24

Event = tuple[str, float, float]
"""Name, start and end in microseconds."""


def record(ranks: RankGroup, scheduler: Scheduler, concurrency: int, context: int, first_id: int) -> list[Event]:
    """Return what rank 0's device did in some pure decode steps of `concurrency` sequences of `context` tokens."""
    for i in range(concurrency):
        prompt = tuple((first_id + i * 7919 + j * 31) % 32000 for j in range(context))
        count = WARM_UP_STEPS + RECORDED_STEPS + 40 + math.ceil(concurrency * context / 64)
        scheduler.add_request(Request(first_id + i, prompt, SamplingParams(temperature=0.0), count))
    pure = 0
    recording = False
    events: list[Event] = []
    kinds: deque[bool] = deque()
    while scheduler.has_unfinished or kinds:
        while (plan := scheduler.schedule()) is not None:
            ranks.submit(plan)
            kinds.append(bool(plan.chunks))
        finished = scheduler.update(ranks.wait())
        pure = 0 if kinds.popleft() or len(finished) < concurrency else pure + 1
        if pure == WARM_UP_STEPS and not recording and not events:
            ranks.profile()
            recording = True
        if recording and pure == WARM_UP_STEPS + RECORDED_STEPS:
            events = ranks.profiled()
            recording = False
            for i in range(concurrency):
                scheduler.abort(first_id + i)
    return events


def breakdown(events: list[Event]) -> tuple[dict[str, float], float, float]:
    """Return the time charged to each kernel in a step (sum over layers), the step, and the idle time, in us."""
    ordered = sorted(events, key=lambda event: event[1])
    starts = [i for i, event in enumerate(ordered) if FIRST_KERNEL in event[0]]
    charged: defaultdict[str, list[float]] = defaultdict(list)
    steps, idle = [], []
    for begin, end in pairwise(starts[2:-1]):
        latest = max(event[2] for event in ordered[max(0, begin - 6) : begin])
        idle.append(max(0.0, ordered[begin][1] - latest))
        steps.append(ordered[end][1] - ordered[begin][1])
        of_step: defaultdict[str, float] = defaultdict(float)
        for name, _, finish in ordered[begin:end]:
            of_step[short(name)] += max(0.0, finish - latest)
            latest = max(latest, finish)
        for name, value in of_step.items():
            charged[name].append(value)
    medians = {name: statistics.median(values) for name, values in charged.items()}
    return medians, statistics.median(steps), statistics.median(idle)


def short(name: str) -> str:
    """Return a kernel's name with its sizes only."""
    name = re.sub(r"\(tpserve::cuda::.*|\(anonymous namespace\)::|tpserve::cuda::|<unnamed>::|void ", "", name)
    return name.partition("(")[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--context", type=int, default=256, help="prompt tokens of each sequence")
    parser.add_argument("--commit", default="", help="of the tree that is measured")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    manifest = Manifest.load(args.artifact)
    num_pages = max(args.concurrency) * math.ceil((args.context * 3 + 200) / manifest.kv.page_size)
    scheduler = make_scheduler(manifest, num_pages)
    processes = RankProcesses()
    points, next_id = {}, 0
    with processes.group(
        args.model,
        args.artifact,
        manifest.tp_size,
        num_pages=num_pages,
        max_num_seqs=manifest.max_num_seqs,
        load_format="dummy",
        devices=range(manifest.tp_size),
    ) as ranks:
        for concurrency in args.concurrency:
            kernels, step_us, idle_us = breakdown(record(ranks, scheduler, concurrency, args.context, next_id))
            next_id += concurrency
            points[concurrency] = {"step_us": step_us, "idle_us": idle_us, "kernels_us": kernels}
            print(f"C={concurrency}: step {step_us:.0f} us, idle {idle_us:.1f} us ({idle_us / step_us:.2%})")
            for name, value in sorted(kernels.items(), key=lambda item: -item[1])[:14]:
                print(f"   {value:8.1f} us {value / step_us:6.1%}  {name}")
    processes.close()
    result = {
        "benchmark": "gpu_timeline",
        "commit": args.commit,
        "device": device_name(),
        "model": args.model.name,
        "tp": manifest.tp_size,
        "quantization": manifest.quantization,
        "context": args.context,
        "points": points,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
