"""Where the time of a step on GPUs goes: microseconds of each kernel, and the device's idle time between steps.

Regime: as `gpu_decode.py`, pure decode steps of C sequences with random weights, recorded by torch's profiler on rank
0 (the recording itself makes a step a little longer). With `--mixed` also steps of so many tokens, `--mixed-decodes` of
them decodes, behind `--context` tokens like the others, and the rest whole prompts of up to 220 tokens, other ones with
each step. Kernels overlap, since each starts while the one before drains; a kernel is charged the time from the latest
end before it to its own end. Idle is the time from a step's last kernel to the next step's first.

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
from collections.abc import Callable, Iterator
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
PROMPT_TOKENS = 220

Event = tuple[str, float, float]
"""Name, start and end in microseconds."""


def steps_of(
    ranks: RankGroup, scheduler: Scheduler, before_plan: Callable[[], None] | None = None
) -> Iterator[tuple[int, int]]:
    """Run until nothing is left; yield each step's prompt tokens and the tokens that it gave."""
    prompts: deque[int] = deque()
    while scheduler.has_unfinished or prompts:
        while not scheduler.is_full:
            if before_plan is not None:
                before_plan()
            if (plan := scheduler.schedule()) is None:
                break
            ranks.submit(plan)
            prompts.append(sum(len(chunk.token_ids) for chunk in plan.chunks))
        finished = scheduler.update(ranks.wait())
        yield prompts.popleft(), len(finished)


def add_requests(scheduler: Scheduler, ids: range, num_prompt_tokens: int, num_tokens: int) -> None:
    """Queue greedy requests with prompts of their own."""
    for i in ids:
        prompt = tuple((i * 7919 + j * 31) % 32000 for j in range(num_prompt_tokens))
        scheduler.add_request(Request(i, prompt, SamplingParams(temperature=0.0), num_tokens))


def record(
    ranks: RankGroup,
    scheduler: Scheduler,
    ids: range,
    wanted: Callable[[int, int], bool],
    before_plan: Callable[[], None] | None = None,
) -> list[Event]:
    """Return what rank 0's device did in some successive steps that are `wanted`; then end the requests `ids`."""
    count = 0
    events: list[Event] = []
    for prompt_tokens, num_tokens in steps_of(ranks, scheduler, before_plan):
        count = count + 1 if wanted(prompt_tokens, num_tokens) else 0
        if count == WARM_UP_STEPS:
            ranks.profile()
        if count == WARM_UP_STEPS + RECORDED_STEPS:
            events = ranks.profiled()
            for i in ids:
                scheduler.abort(i)
    if not events:
        raise RuntimeError(
            f"fewer than {WARM_UP_STEPS + RECORDED_STEPS} steps of {len(ids)} decodes followed each other"
        )
    return events


def add_decodes(scheduler: Scheduler, ids: range, contexts: list[int]) -> None:
    """Queue sequences of so many tokens, in turn, that decode for long enough."""
    lengths = [contexts[i % len(contexts)] for i in range(len(ids))]
    num_tokens = 2 * WARM_UP_STEPS + RECORDED_STEPS + 40 + math.ceil(sum(lengths) / 64)
    for i, length in zip(ids, lengths, strict=True):
        add_requests(scheduler, range(i, i + 1), length, num_tokens)


def record_decodes(ranks: RankGroup, scheduler: Scheduler, ids: range, contexts: list[int]) -> list[Event]:
    """Record pure decode steps."""
    add_decodes(scheduler, ids, contexts)
    return record(ranks, scheduler, ids, lambda prompt_tokens, num_tokens: not prompt_tokens and num_tokens == len(ids))


def record_mixed(
    ranks: RankGroup, scheduler: Scheduler, ids: range, contexts: list[int], num_prompt_tokens: int
) -> list[Event]:
    """Record steps in which `ids` decode and prompts of so many tokens are computed."""
    add_decodes(scheduler, ids, contexts)
    next_id = ids.stop
    all_decode = False

    def before_plan() -> None:
        nonlocal next_id
        # Until the decodes have ended, which is when the steps have been recorded.
        left = num_prompt_tokens if all_decode and scheduler.num_running >= len(ids) else 0
        while left > 0:
            add_requests(scheduler, range(next_id, next_id + 1), min(left, PROMPT_TOKENS), 1)
            next_id, left = next_id + 1, left - PROMPT_TOKENS

    def wanted(prompt_tokens: int, num_tokens: int) -> bool:
        nonlocal all_decode
        all_decode = all_decode or (not prompt_tokens and num_tokens == len(ids))
        return prompt_tokens == num_prompt_tokens

    return record(ranks, scheduler, ids, wanted, before_plan)


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


ENUMERATORS = {
    "Ring": ("whole", "half"),
    "End": ("memory", "silu", "residual", "peers"),
    "Mode": ("plain", "norm", "quantize"),
    "Out": ("bf16", "grouped"),
}
"""Names of template arguments that a kernel's name has as numbers."""


def short(name: str) -> str:
    """Return a kernel's name with its template arguments only."""
    name = re.sub(r"\(anonymous namespace\)::|tpserve::cuda::|<unnamed>::|void |__nv_", "", name)
    for enumeration, enumerators in ENUMERATORS.items():
        for number, enumerator in enumerate(enumerators):
            name = name.replace(f"({enumeration}){number}", enumerator)
    return name.partition("(")[0].replace("> >", ">>").strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--mixed", type=int, nargs="*", default=[], help="tokens of mixed steps")
    parser.add_argument("--mixed-decodes", type=int, default=32, help="tokens of these that are decodes")
    parser.add_argument("--context", type=int, nargs="+", default=[256], help="prompt tokens of sequences, in turn")
    parser.add_argument("--commit", default="", help="of the tree that is measured")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    manifest = Manifest.load(args.artifact)
    for size in args.mixed:
        num_prompts = 2 * math.ceil((size - args.mixed_decodes) / PROMPT_TOKENS)  # of two steps in flight
        if not 0 < num_prompts <= manifest.max_num_seqs - args.mixed_decodes:
            parser.error(
                f"--mixed {size}: {args.mixed_decodes} decodes and {num_prompts} prompts in two steps, of at most "
                f"{manifest.max_num_seqs} sequences: change --mixed-decodes"
            )
    num_pages = max([*args.concurrency, args.mixed_decodes + 8]) * math.ceil(
        (max(args.context) * 3 + 200) / manifest.kv.page_size
    )
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
        for size, is_mixed in [*((c, False) for c in args.concurrency), *((m, True) for m in args.mixed)]:
            scheduler = make_scheduler(manifest, num_pages)
            ids = range(next_id, next_id + (args.mixed_decodes if is_mixed else size))
            if is_mixed:
                events = record_mixed(ranks, scheduler, ids, args.context, size - len(ids))
            else:
                events = record_decodes(ranks, scheduler, ids, args.context)
            ranks.clear()
            next_id += 1 << 16
            kernels, step_us, idle_us = breakdown(events)
            name = f"{size} tokens, {args.mixed_decodes} of them decodes" if is_mixed else f"C={size}"
            points[name] = {"step_us": step_us, "idle_us": idle_us, "kernels_us": kernels}
            print(f"{name}: step {step_us:.0f} us, idle {idle_us:.1f} us ({idle_us / step_us:.2%})")
            for kernel, value in sorted(kernels.items(), key=lambda item: -item[1])[:14]:
                print(f"   {value:8.1f} us {value / step_us:6.1%}  {kernel}")
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
