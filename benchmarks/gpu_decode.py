"""Decode steps of a model on one GPU or a group of GPUs, without a server: the device's side of TPOT.

Regime: C equal requests (256 tokens in, 129 out) decoding together, greedy, prefix cache off: the `step` column of the
peer's table. The real scheduler drives the real device runner with two plans in flight; weights are random. Floor:
weights once through memory, 4.70 TB/s on an H200. Prints one line per point and, last, one JSON object.

Run on a host with GPUs: python benchmarks/gpu_decode.py --artifact FOLDER --model FOLDER [--concurrency 1 8 ...].
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from rank_group import RankGroup, RankProcesses
from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.draft_length import DraftLength
from tpserve.coordinator.request import Request
from tpserve.coordinator.scheduler import Scheduler
from tpserve.proto.manifest import Manifest
from tpserve.proto.messages import SamplingParams

BYTES_PER_S = 4.70e12
PROMPT_TOKENS, OUTPUT_TOKENS = 256, 129


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """A step in which all requests decoded, and nothing else ran."""

    seconds: float
    """Since the result before it."""
    num_tokens: int
    """That it gave."""
    num_drafted: int
    """Draft tokens that it verified."""
    num_accepted: int


def make_scheduler(
    manifest: Manifest,
    num_pages: int,
    num_draft_tokens: int = 0,
    max_num_batched_tokens: int | None = None,
    draft_length: DraftLength | None = None,
) -> Scheduler:
    """Return a scheduler whose steps verify so many draft tokens for each sequence, or up to so many, by a rule."""
    return Scheduler(
        SchedulerConfig(
            max_num_seqs=manifest.max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens or manifest.max_num_batched_tokens,
            max_model_len=manifest.max_model_len,
            page_size=manifest.kv.page_size,
            num_pages=num_pages,
            enable_prefix_cache=False,
            max_num_draft_tokens=num_draft_tokens,
            drafts_on_device=True,
        ),
        draft_length,
    )


def decode(
    ranks: RankGroup, scheduler: Scheduler, vocab_size: int, concurrency: int, first_id: int
) -> tuple[list[DecodeStep], float]:
    """Return the steps in which all requests decoded, and the whole time in seconds."""
    for i in range(concurrency):
        prompt = tuple((first_id + i * 7919 + j * 31) % vocab_size for j in range(PROMPT_TOKENS))
        scheduler.add_request(Request(first_id + i, prompt, SamplingParams(temperature=0.0), OUTPUT_TOKENS))
    mixed: deque[bool] = deque()
    steps, started, last = [], time.perf_counter(), 0.0
    while scheduler.has_unfinished or mixed:
        while (plan := scheduler.schedule()) is not None:
            ranks.submit(plan)
            mixed.append(bool(plan.chunks))
        result = ranks.wait()
        events = scheduler.update(result)
        now = time.perf_counter()
        if not mixed.popleft() and last and len(events) == concurrency:
            num_tokens = sum(len(event.token_ids) for event in events)
            accepted = sum(count - 1 for count, drafted in zip(result.counts, result.drafted, strict=True) if drafted)
            steps.append(DecodeStep(now - last, num_tokens, sum(result.drafted), accepted))
        last = now
    return steps, time.perf_counter() - started


def weight_bytes(manifest: Manifest) -> int:
    """Return the bytes of weights that one rank reads in a step."""
    sizes = {"bfloat16": 2, "float8_e4m3fn": 1}
    packed = (param for param in manifest.params if param.layout == "wgmma64x256g132")
    return sum(sizes[param.dtype] * math.prod(param.shape) for param in packed)


def pages_for(manifest: Manifest, concurrency: int, num_ahead: int = 16) -> int:
    """Return the KV pages of so many requests, each with room for tokens that plans in flight may write."""
    return concurrency * math.ceil((PROMPT_TOKENS + OUTPUT_TOKENS + num_ahead) / manifest.kv.page_size)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a benchmark of decode steps is told."""
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="dummy")
    parser.add_argument("--collectives", choices=["auto", "push", "nccl"], default="auto")
    parser.add_argument("--bandwidth", type=float, default=4.70, help="TB/s that one kernel reaches on this device")
    parser.add_argument("--commit", default="", help="of the tree that is measured")
    parser.add_argument("--output", type=Path)


def circumstances(benchmark: str, args: argparse.Namespace, manifest: Manifest) -> dict[str, object]:
    """Return what a result says beside its figures."""
    return {
        "benchmark": benchmark,
        "commit": args.commit,
        "device": device_name(),
        "compiler": manifest.compiler,
        "arguments": {name: str(value) for name, value in vars(args).items() if name != "output"},
        "model": args.model.name,
        "tp": manifest.tp_size,
        "quantization": manifest.quantization,
        "weights": "random" if args.load_format == "dummy" else "real",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    manifest = Manifest.load(args.artifact)
    num_pages = pages_for(manifest, max(args.concurrency))
    floor_ms = weight_bytes(manifest) / (args.bandwidth * 1e12) * 1e3
    points, next_id = {}, 0
    scheduler = make_scheduler(manifest, num_pages)
    processes = RankProcesses()
    loading = time.perf_counter()
    with processes.group(
        args.model,
        args.artifact,
        manifest.tp_size,
        num_pages=num_pages,
        max_num_seqs=manifest.max_num_seqs,
        load_format=args.load_format,
        devices=range(manifest.tp_size),
        collectives=args.collectives,
    ) as ranks:
        ready_s = time.perf_counter() - loading
        for concurrency in [args.concurrency[0], *args.concurrency]:  # the first once more: a warm-up
            steps, total_s = decode(ranks, scheduler, manifest.vocab_size, concurrency, next_id)
            next_id += concurrency
            gaps = [step.seconds for step in steps]
            step_ms = statistics.median(gaps) * 1e3
            points[concurrency] = {
                "step_ms": step_ms,
                "step_p99_ms": sorted(gaps)[int(0.99 * len(gaps))] * 1e3,
                "tokens_per_s": concurrency * OUTPUT_TOKENS / total_s,
                "ratio_to_floor": step_ms / floor_ms,
            }
            ratio = step_ms / floor_ms
            print(f"C={concurrency}: step {step_ms:.3f} ms, {ratio:.2f} x the floor of {floor_ms:.2f} ms", flush=True)
    processes.close()
    result = circumstances("gpu_decode", args, manifest)
    result |= {"ready_s": ready_s, "floor_ms": floor_ms, "points": points}
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def device_name() -> str:
    """Return the first GPU's name, by the driver's own tool."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]


if __name__ == "__main__":
    main()
