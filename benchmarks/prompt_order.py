"""Which prompts a step should take, how much of them, and when: simulated serving, the real scheduler and pace.

Regime: the peers' closed loop of C clients with their lengths (`--lengths`), two plans in flight, one GPU group whose
steps take what Llama-3-70B fp8 TP=4 takes on H200s, measured but for attention beside prompts: decodes by their number,
steps with prompts by the size that they are padded to. No model runs, so only times are simulated;
`gpu_server_70b_tp4.json` says what they were. `--patience-steps`: how long shorter prompts pass one. `--wait-weight`:
of who waits over who decodes, by which a step's size is chosen; 0: a step takes all that fits. `--plan-lead-ms`: before
a step's end, when the next one is planned; inf: as soon as it may be.

Run: python benchmarks/prompt_order.py --lengths FILE [--output FILE].
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import statistics
import sys
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]

from simulated_worker import SimulatedWorker
from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.request import Request
from tpserve.coordinator.scheduler import Scheduler
from tpserve.coordinator.step_pace import StepPace
from tpserve.proto.manifest import GPU_STEP_TOKENS
from tpserve.proto.messages import SamplingParams, StepResult
from tpserve.proto.rank import SizeTime

DECODE_MS = [(0, 5.4), (1, 5.41), (8, 5.65), (16, 6.07), (32, 6.6), (64, 8.0)]
"""Steps of decodes by their number, near the median gaps of `gpu_server_70b_tp4.json`; of 64 a bit more than one rank
took (`gpu_timeline_shard_70b.json`, contexts of several lengths)."""
WITHOUT_ATTENTION_MS = [
    *((80, 7.65), (96, 8.11), (112, 8.99), (128, 9.23), (144, 10.13), (160, 10.29), (176, 10.75), (192, 11.01)),
    *((224, 12.27), (256, 12.92), (288, 15.16), (320, 15.48), (352, 17.24), (384, 17.71), (416, 20.9), (448, 21.37)),
    *((480, 22.11), (512, 22.66), (768, 33.5), (1024, 42.74)),
]
"""Steps with prompts by size, as the ranks of TP=4 timed them when they started, on H200s."""
ATTENTION_MS = 1.5
"""What is missing there; estimated."""
MIXED_MS = [(size, ms + ATTENTION_MS) for size, ms in WITHOUT_ATTENTION_MS]
ALONE_MS = 0.3
"""What a prompt adds to a step of up to 64 tokens; estimated."""
HOST_MS = 3.0
"""From a client to a plan and from a result back, together; estimated."""
MEASURED_EACH, LEAST_MEASURED = 3, 8
"""Requests of each client that count, after a first shorter one."""


@dataclass(slots=True)
class Served:
    """One request; times in ms."""

    client: int
    num_tokens: int
    counts: bool
    sent: float
    times: list[float] = field(default_factory=list)


def between(points: list[tuple[int, float]], at: int) -> float:
    """Return the piecewise linear value; after the last point, the last."""
    for (left, low), (right, high) in pairwise(points):
        if at <= right:
            return low + (high - low) * (at - left) / (right - left)
    return points[-1][1]


def step_ms(num_decodes: int, num_prompt_tokens: int) -> float:
    """Return what a step takes."""
    total = num_decodes + num_prompt_tokens
    if total <= DECODE_MS[-1][0]:
        return between(DECODE_MS, total) + (ALONE_MS if num_prompt_tokens else 0.0)
    return next(ms for tokens, ms in MIXED_MS if tokens >= total)


def size_times() -> list[SizeTime]:
    """Return what ranks would say of their steps."""
    decodes = [SizeTime(size, True, round(1e3 * step_ms(size, 0))) for size in (1, 2, 4, *range(8, 65, 8))]
    mixed = [SizeTime(size, False, round(1e3 * step_ms(size - 1, 1))) for size in (32, 64)]
    return decodes + mixed + [SizeTime(tokens, False, round(1e3 * ms)) for tokens, ms in MIXED_MS]


class Simulation:
    """A closed loop of clients before one scheduler."""

    def __init__(
        self,
        lengths: dict[str, list[int]],
        concurrency: int,
        patience_steps: int,
        wait_weight: float,
        plan_lead_ms: float,
    ) -> None:
        self._prompts, self._outputs = lengths["prompt_len"], lengths["output_len"]
        self._num_measured = max(LEAST_MEASURED, MEASURED_EACH * concurrency)
        config = SchedulerConfig(
            max_num_seqs=64,
            max_num_batched_tokens=GPU_STEP_TOKENS,
            max_model_len=8192,
            page_size=16,
            num_pages=40_000,
            enable_prefix_cache=False,
            patience_steps=patience_steps,
            wait_weight=wait_weight or 1.0,
        )
        self._scheduler, self._worker = Scheduler(config), SimulatedWorker(config, next_step=1)
        self._scheduler.learn_size_times(size_times() if wait_weight else [])
        self._pace = StepPace(plan_lead_ms / 1e3)
        self._pace.begin_group(size_times())
        self.served: list[Served] = []
        self._next = 0
        self._arrivals: list[tuple[float, int, int]] = []
        """Time, index in `served`, prompt tokens."""
        for client in range(concurrency):  # each begins with a request of its own length, so that they end one by one
            place = len(self._prompts) - 1 - client
            share = (client + 0.5) / concurrency
            num_tokens = max(2, int(min(self._outputs[place], 190) * share)) if concurrency > 1 else 16
            self._send(Served(client, num_tokens, False, 0.0), self._prompts[place])

    def _send(self, request: Served, num_prompt_tokens: int) -> None:
        self.served.append(request)
        heapq.heappush(self._arrivals, (request.sent + HOST_MS / 2, len(self.served) - 1, num_prompt_tokens))

    def _take_in(self, now: float) -> None:
        while self._arrivals and self._arrivals[0][0] <= now:
            _, index, length = heapq.heappop(self._arrivals)
            prompt = tuple((index * 31 + i) % 997 for i in range(length))
            sampling = SamplingParams(temperature=0.0)
            self._scheduler.add_request(Request(index, prompt, sampling, self.served[index].num_tokens))

    def run(self) -> None:
        """Serve until all that count have ended."""
        now, free_at = 0.0, 0.0
        in_flight: deque[tuple[float, float, StepResult]] = deque()
        while sum(len(each.times) == each.num_tokens for each in self.served if each.counts) < self._num_measured:
            self._take_in(now)
            while not (wait_s := self._pace.wait_s(now / 1e3, may_plan=not self._scheduler.is_full)):
                if (plan := self._scheduler.schedule()) is None:
                    break
                result = self._worker.execute(plan)
                num_decodes = len(result.slots) - sum(chunk.sample for chunk in plan.chunks)
                took = step_ms(num_decodes, sum(len(chunk.token_ids) for chunk in plan.chunks))
                free_at = max(free_at, now) + took
                in_flight.append((free_at, took, result))
                self._pace.planned(self._scheduler.latest_size, now / 1e3)
            coming = [now + wait_s * 1e3] if wait_s else []
            if self._arrivals and len(in_flight) < 2:
                coming.append(self._arrivals[0][0])
            if coming and (not in_flight or min(coming) < in_flight[0][0]):
                now = min(coming)
                continue
            now, took, result = in_flight.popleft()
            self._pace.ended(round(took * 1e3), 0, now / 1e3)
            self._take_in(now)
            for event in self._scheduler.update(result):
                request = self.served[event.request_id]
                request.times += [now + HOST_MS / 2] * len(event.token_ids)
                if event.finish is not None:
                    place, self._next = self._next, self._next + 1
                    follower = Served(
                        request.client,
                        self._outputs[place % len(self._outputs)],
                        place < self._num_measured,
                        request.times[-1],
                    )
                    self._send(follower, self._prompts[place % len(self._prompts)])

    def summary(self) -> dict[str, float]:
        """Return means and percentiles in ms, as the peers' client defines them."""
        done = [each for each in self.served if each.counts and len(each.times) > 1]
        ttft = sorted(each.times[0] - each.sent for each in done)
        gaps = sorted(after - before for each in done for before, after in pairwise(each.times))
        return {
            "tpot_mean_ms": statistics.mean((each.times[-1] - each.times[0]) / (len(each.times) - 1) for each in done),
            "itl_p99_ms": gaps[int(len(gaps) * 0.99)],
            "ttft_mean_ms": statistics.mean(ttft),
            "ttft_p50_ms": ttft[len(ttft) // 2],
            "ttft_p99_ms": ttft[int(len(ttft) * 0.99)],
            "ttft_max_ms": ttft[-1],
        }


def main() -> None:
    """Simulate all points and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=Path, required=True, help="the peers' file of prompt_len and output_len")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--patience-steps", type=int, nargs="+", default=[32])
    parser.add_argument("--wait-weight", type=float, nargs="+", default=[6.0])
    parser.add_argument("--plan-lead-ms", type=float, nargs="+", default=[1.0, math.inf])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    lengths = json.loads(args.lengths.read_text())
    points = []
    for each in itertools.product(args.concurrency, args.patience_steps, args.wait_weight, args.plan_lead_ms):
        simulation = Simulation(lengths, *each)
        simulation.run()
        *what, lead_ms = each
        point = dict(zip(("concurrency", "patience_steps", "wait_weight"), what, strict=True))
        point["plan_lead_ms"] = lead_ms if math.isfinite(lead_ms) else None
        points.append(point | {name: round(value, 2) for name, value in simulation.summary().items()})
        print(points[-1], flush=True)
    if args.output:
        step_times = {"decode_ms": DECODE_MS, "mixed_ms": MIXED_MS, "alone_ms": ALONE_MS, "host_ms": HOST_MS}
        text = json.dumps({"benchmark": "prompt_order", "simulated": True, **step_times, "points": points}, indent=1)
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
