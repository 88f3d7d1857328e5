"""Decoding of the demo model on this CPU, against transformers on the same cores in the same run: how fast.

Regime: small batches, bound by streaming the weights; the floor is the bytes of the weights over the memory bandwidth
that a copy-free read of them reaches here. The engine runs its compiled library with the real scheduler at TP=1, no
server. transformers decodes the same dequantised weights in float32 (its default on a CPU; bfloat16 is measured too),
greedily with a KV cache: one request after another, and as one padded batch.

Prints one line per point and, last, one JSON object. CPU times are ratios within one run; absolute numbers move with
the machine. Needs the `reference` extra.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tpserve.compile.cache import CachePolicy
from tpserve.compile.source import resolve_model
from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.request import Request
from tpserve.coordinator.scheduler import Scheduler
from tpserve.proto.manifest import Manifest
from tpserve.proto.messages import SamplingParams
from tpserve.proto.rank import RankConfig

PROMPT_TOKENS = 32


def prompts(count: int, vocab_size: int) -> list[tuple[int, ...]]:
    """Return seeded random prompts; their content does not change the work."""
    rng = np.random.default_rng(0)
    return [tuple(int(token) for token in rng.integers(17, vocab_size, PROMPT_TOKENS)) for _ in range(count)]


class EngineSide:
    """The compiled library under the real scheduler, in this process."""

    def __init__(self, model: Path, max_num_seqs: int, num_threads: int) -> None:
        # Imported late: it selects TVM's runtime, and compilation above needs the compiler in a process of its own.
        from tpserve.worker.runner import Runner

        artifact = _compile(model, max_num_seqs)
        self.manifest = Manifest.load(artifact)
        self._num_pages = 64 * max_num_seqs
        self._runner = Runner(
            RankConfig(0, 1, model, artifact, "auto", self._num_pages, max_num_seqs, num_threads, "benchmark", 10.0),
            lambda done, total: None,
        )
        self._max_num_seqs = max_num_seqs
        self._scheduler = self._new_scheduler()

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(
            SchedulerConfig(
                max_num_seqs=self._max_num_seqs,
                max_num_batched_tokens=self.manifest.max_num_batched_tokens,
                max_model_len=self.manifest.max_model_len,
                page_size=self.manifest.kv.page_size,
                num_pages=self._num_pages,
                enable_prefix_cache=False,
                max_in_flight_steps=1,
            )
        )

    def decode_tokens_per_s(self, concurrency: int, num_tokens: int) -> float:
        """Return output tokens a second after the first token of every sequence."""
        sampling = SamplingParams(temperature=0.0)
        for i, prompt in enumerate(prompts(concurrency, self.manifest.vocab_size)):
            self._scheduler.add_request(Request(i, prompt, sampling, num_tokens))
        count, started = 0, 0.0
        while self._scheduler.has_unfinished:
            plan = self._scheduler.schedule()
            assert plan is not None
            events = self._scheduler.update(self._runner.execute(plan))
            if started:
                count += len(events)
            elif not plan.chunks:  # every prompt is in; this was the first pure decode step, a warm-up
                started = time.perf_counter()
        return count / (time.perf_counter() - started)


class TransformersSide:
    """The same weights under transformers."""

    def __init__(self, model: Path, dtype: str, num_threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(num_threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    def decode_tokens_per_s(self, concurrency: int, num_tokens: int) -> float:
        """Return output tokens a second of one batch, after its first token."""
        torch = self._torch
        ids = torch.tensor(prompts(concurrency, self._model.config.vocab_size))
        with torch.inference_mode():
            out = self._model(ids, use_cache=True)
            ids = out.logits[:, -1:].argmax(-1)
            started = time.perf_counter()
            for _ in range(num_tokens - 1):
                out = self._model(ids, past_key_values=out.past_key_values, use_cache=True)
                ids = out.logits[:, -1:].argmax(-1)
            return float(concurrency * (num_tokens - 1) / (time.perf_counter() - started))


def _compile(model: Path, max_num_seqs: int) -> Path:
    """Build the artifact in a process of its own: the runtime here must not be the compiler's."""
    command = [sys.executable, "-m", "tpserve.compile", "compile", str(model), "--max-num-seqs", str(max_num_seqs)]
    command += ["--max-model-len", "1024", "--max-num-batched-tokens", "256"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Path(json.loads(output)["artifact_dir"])


def read_bandwidth(num_bytes: int) -> float:
    """Return bytes a second at which numpy reads an array of that size on one core; the floor's yardstick."""
    array = np.ones(num_bytes // 8, np.float64)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        array.sum()
        times.append(time.perf_counter() - started)
    return num_bytes / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="GGUF file or Hugging Face folder")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3, help="sides take turns; medians are reported")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    model = resolve_model(args.model, model_policy=CachePolicy.ON, download_policy=CachePolicy.ON)
    engine = EngineSide(model, max(args.concurrency), args.threads)
    references = {dtype: TransformersSide(model, dtype, args.threads) for dtype in ("float32", "bfloat16")}
    sides: dict[str, Any] = {"tpserve": engine} | {f"transformers {dtype}": ref for dtype, ref in references.items()}
    rates: dict[str, dict[int, list[float]]] = {name: {c: [] for c in args.concurrency} for name in sides}
    for _ in range(args.rounds):
        for concurrency in args.concurrency:
            for name, side in sides.items():
                rates[name][concurrency].append(side.decode_tokens_per_s(concurrency, args.tokens))
    medians = {name: {c: statistics.median(values) for c, values in points.items()} for name, points in rates.items()}
    serial = medians["transformers float32"][min(args.concurrency)]
    for concurrency in args.concurrency:
        ours = medians["tpserve"][concurrency]
        row = ", ".join(f"{name} {points[concurrency]:.1f}" for name, points in medians.items())
        print(f"concurrency {concurrency}: {row} tok/s; {ours / serial:.2f} x transformers one after another")
    weight_bytes = sum(
        int(np.prod(param.shape)) * (2 if param.dtype == "bfloat16" else 4)
        for param in engine.manifest.params
        if param.layout == "panel16"
    )
    bandwidth = read_bandwidth(weight_bytes) * args.threads
    result = {
        "benchmark": "cpu_decode",
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("apache-tvm", "numpy", "torch", "transformers")},
        "arguments": {"concurrency": args.concurrency, "tokens": args.tokens, "threads": args.threads},
        "output_tokens_per_s": medians,
        "ratio_to_transformers_float32_serial": {c: medians["tpserve"][c] / serial for c in args.concurrency},
        "ratio_to_transformers_float32_batched": {
            c: medians["tpserve"][c] / medians["transformers float32"][c] for c in args.concurrency
        },
        "floor": {
            "streamed_weight_bytes": weight_bytes,
            "read_bytes_per_s": bandwidth,
            "tokens_per_s_at_concurrency_1": bandwidth / weight_bytes,
        },
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
