"""What speculation gains on this CPU: draft lengths against plain decoding, in turns within one run.

Three regimes, all at TP=1 under the real scheduler, no server; plain decoding is a replica without a proposer.
pair: a seeded random Llama whose draft is its first layers, with the later layers' output scaled by a knob. The cost of
draft and target is real, the acceptance is synthetic: the knob sets it, and what was measured stands beside each point.
heads: a seeded random Llama with an EAGLE-3 head, also random, of which hardly any token is accepted; and a Llama made
so that its next token hangs on the last one alone, with a head that knows it. Both acceptances are synthetic.
lookup: a real model on real text, by prompt lookup (ngram) and by suffixes.

CPU times are ratios to plain decoding in the same round; absolute numbers move with the machine. The floor of a round
of K draft tokens is its bytes of weights, K of the draft and one of the target, over those of a plain step, for each
token that it gives.
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
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))
GOLDENS = TESTS / "goldens/smollm2.json"
"""Prompts of the demo model, as tokens."""

from eagle_models import MarkovHead, MarkovTarget, TinyHead
from tiny_models import TinyModel, knob_pair
from tpserve.compile.cache import CachePolicy
from tpserve.compile.source import resolve_model
from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.request import Request
from tpserve.coordinator.scheduler import Scheduler
from tpserve.proto.manifest import Manifest
from tpserve.proto.messages import SamplingParams, StepPlan
from tpserve.proto.rank import RankConfig
from tpserve.proto.speculation import SPARSE_METHODS, DraftLengthRule, Method, Speculation

MOST = 5
PAIR = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
}
HEADS_CHANGE = {"num_key_value_heads": 12}
"""In the targets of heads."""
NUM_LAYERS, NUM_DRAFT_LAYERS = 16, 2
_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Way:
    """How tokens are drafted."""

    name: str
    draft_length: DraftLengthRule = "fixed"
    num_draft_tokens: int = 0
    waves: int = 1
    """How often the prompts are sent, one set after the other; the last counts."""


WAYS = [
    Way("plain"),
    Way("K=0"),  # plain decoding again, in the replica that has a proposer: what two replicas differ by anyway
    *(Way(f"K={k}", "fixed", k) for k in range(1, MOST + 1)),
    Way("auto", "auto", MOST),
    # As in a server that has run for a while: what steps cost is known, what these requests accept is not.
    Way("auto, second wave", "auto", MOST, waves=2),
    # At concurrency 8 the 17th sequence is among these: it is drafted for even where drafts do not pay (`drafting.py`).
    Way("auto, third wave", "auto", MOST, waves=3),
]


@dataclass(slots=True)
class Outcome:
    """What one run of one way gave."""

    tpot_s: float
    drafted: int
    accepted: int
    drafts: int
    step_s: float = 0.0
    """In steps that only decode."""
    proposer_s: float = 0.0
    """Of it, in calls of the proposer."""


class Stopwatch:
    """In place of an object: adds up the time in its methods."""

    def __init__(self, inner: object) -> None:
        self._inner = inner
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            out = value(*args)
            self.seconds += time.perf_counter() - started
            return out

        return timed


class Engine:
    """One rank in this process, with or without a proposer."""

    def __init__(self, config: RankConfig) -> None:
        from tpserve.worker.runner import Runner  # which chooses TVM's runtime: not before the compiler is imported

        self._config = config
        self.manifest = Manifest.load(config.artifact_dir)
        self._runner = Runner(config, lambda done, total: None)
        self._next_step = 1
        self._stopwatch = Stopwatch(self._runner._speculator)
        if self._runner._speculator is not None:
            cast("Any", self._runner)._speculator = self._stopwatch

    def run(self, way: Way, prompts: Sequence[Sequence[int]], num_tokens: int, sampling: SamplingParams) -> Outcome:
        """Decode every prompt at once; TPOT is the mean over sequences, from its first token to its last."""
        method = self._config.speculation and self._config.speculation.method
        scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=self._config.max_num_seqs,
                max_num_batched_tokens=self.manifest.max_num_batched_tokens,
                max_model_len=self.manifest.max_model_len,
                page_size=self.manifest.kv.page_size,
                num_pages=self._config.num_pages,
                enable_prefix_cache=False,
                max_in_flight_steps=1,
                max_num_draft_tokens=way.num_draft_tokens,
                draft_length=way.draft_length,
                drafts_are_sparse=method in SPARSE_METHODS,
                drafts_cost_upkeep=method == "eagle3",
            )
        )
        seated: set[int] = set()
        for wave in range(way.waves):
            numbers = range(wave * len(prompts), (wave + 1) * len(prompts))
            for seed, (number, prompt) in enumerate(zip(numbers, prompts, strict=True)):
                scheduler.add_request(Request(number, tuple(prompt), replace(sampling, seed=seed), num_tokens))
            first: dict[int, float] = {}
            last: dict[int, float] = {}
            outcome = Outcome(0.0, 0, 0, 0)
            while scheduler.has_unfinished:
                plan = scheduler.schedule()
                assert plan is not None
                seated = (seated - set(plan.removed_slots)) | {added.slot for added in plan.added_slots}
                started, proposer_s = time.perf_counter(), self._stopwatch.seconds
                result = self._runner.execute(replace(plan, step_id=self._next_step))
                if not plan.chunks:
                    outcome.step_s += time.perf_counter() - started
                    outcome.proposer_s += self._stopwatch.seconds - proposer_s
                self._next_step += 1
                events = scheduler.update(replace(result, step_id=plan.step_id))
                now = time.perf_counter()
                for event in events:
                    first.setdefault(event.request_id, now)
                    last[event.request_id] = now
                for count, drafted in zip(result.counts, result.drafted, strict=True) if result.drafted else ():
                    outcome.drafted += drafted
                    outcome.accepted += count - 1 if drafted else 0
                    outcome.drafts += drafted > 0
            outcome.tpot_s = statistics.mean((last[n] - first[n]) / (num_tokens - 1) for n in numbers)
        # Who ended last would be removed by the next plan, which another scheduler makes.
        self._runner.execute(StepPlan(self._next_step, removed_slots=tuple(seated)))
        self._next_step += 1
        return outcome


def _compile(model: Path, *flags: str) -> Path:
    """Build an artifact in a process of its own: the runtime here must not be the compiler's."""
    command = [sys.executable, "-m", "tpserve.compile", "compile", str(model), "--max-model-len", "1024", *flags]
    command += ["--quantization", "q0bf16", "--max-num-batched-tokens", "256"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Path(json.loads(output)["artifact_dir"])


def _config(model: Path, artifact: Path, max_num_seqs: int, speculation: Speculation | None) -> RankConfig:
    threads = os.cpu_count() or 1
    pages = 64 * max_num_seqs
    config = RankConfig(0, 1, model, artifact, "auto", pages, max_num_seqs, threads, "benchmark", 10.0)
    return replace(config, speculation=speculation)


def compare(
    engines: dict[str, Engine],
    ways: Sequence[Way],
    prompts: Sequence[Sequence[int]],
    args: argparse.Namespace,
    sampling: SamplingParams,
) -> list[dict[str, Any]]:
    """Measure every way at every concurrency, in turns; return one row for each."""
    rows = []
    for concurrency in args.concurrency:
        found: dict[str, list[Outcome]] = {way.name: [] for way in ways}
        for _ in range(args.rounds):
            for way in ways:
                engine = engines["plain" if way.name == "plain" else "speculating"]
                found[way.name].append(engine.run(way, prompts[:concurrency], args.tokens, sampling))
        for way in ways:
            ratios = [own.tpot_s / base.tpot_s for own, base in zip(found[way.name], found["plain"], strict=True)]
            drafted = sum(outcome.drafted for outcome in found[way.name])
            accepted = sum(outcome.accepted for outcome in found[way.name])
            drafts = sum(outcome.drafts for outcome in found[way.name])
            row = {
                "concurrency": concurrency,
                "way": way.name,
                "tpot_ratio_to_plain": round(statistics.median(ratios), 4),
                "tpot_ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
                "tpot_ms": round(1e3 * statistics.median(outcome.tpot_s for outcome in found[way.name]), 3),
                "accept_rate": round(accepted / drafted, 4) if drafted else None,
                "proposer_share": round(statistics.median(out.proposer_s / out.step_s for out in found[way.name]), 4),
                "accept_length": round(1 + accepted / drafts, 4) if drafts else None,
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def pair(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Compare draft lengths at each place of the knob."""
    seqs = max(args.concurrency)
    out = []
    for knob in args.knob:
        target, draft = knob_pair(knob, num_layers=NUM_LAYERS, num_draft_layers=NUM_DRAFT_LAYERS, **PAIR)
        models = {name: folder / f"{name}-{knob}" for name in ("target", "draft")}
        target.write(models["target"])
        draft.write(models["draft"])
        flags = ("--max-num-seqs", str(seqs))
        large = _compile(models["target"], *flags, "--max-num-draft-tokens", str(MOST))
        small = _compile(models["draft"], *flags)
        speculation = Speculation("draft", MOST, draft_model_dir=models["draft"], draft_artifact_dir=small)
        engines = {
            "plain": Engine(_config(models["target"], large, seqs, None)),
            "speculating": Engine(_config(models["target"], large, seqs, speculation)),
        }
        rng = np.random.default_rng(0)
        prompts = rng.integers(0, PAIR["vocab_size"], (seqs, 32)).tolist()
        for temperature in args.temperature:
            print(f"knob {knob}, temperature {temperature}", flush=True)
            ways = [way for way in WAYS if way.name in args.ways]
            rows = compare(engines, ways, prompts, args, SamplingParams(temperature=temperature))
            out.append({"knob": knob, "temperature": temperature, "points": rows, "floor": _floor(large, small)})
    return out


def heads(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Compare draft lengths of a head that guesses and of one that knows."""
    seqs = max(args.concurrency)
    # Each head of the one that knows carries its own dimensions, so there are as many of keys as of queries.
    config = knob_pair(0.0, num_layers=NUM_LAYERS, **PAIR)[0].config | HEADS_CHANGE
    vocab_size = PAIR["vocab_size"] // 2
    out = []
    for kind, head in {
        "guesses": TinyHead(TinyModel("guesses", config), vocab_size),
        "knows": MarkovHead(MarkovTarget("knows", config), PAIR["vocab_size"] - 20),
    }.items():
        target_dir, head_dir = folder / f"target-{kind}", folder / f"head-{kind}"
        head.target.write(target_dir)
        head.write(head_dir)
        flags = ("--max-num-seqs", str(seqs))
        large = _compile(target_dir, *flags, "--max-num-draft-tokens", str(MOST), "--draft-model", str(head_dir))
        small = _compile(head_dir, *flags, "--target-model", str(target_dir))
        speculation = Speculation("eagle3", MOST, draft_model_dir=head_dir, draft_artifact_dir=small)
        engines = {
            "plain": Engine(_config(target_dir, _compile(target_dir, *flags), seqs, None)),
            "speculating": Engine(_config(target_dir, large, seqs, speculation)),
        }
        prompts = np.random.default_rng(0).integers(3, PAIR["vocab_size"], (seqs, 32)).tolist()
        print(f"a head that {kind}", flush=True)
        ways = [way for way in WAYS if way.name in args.ways]
        rows = compare(engines, ways, prompts, args, SamplingParams(temperature=0.0))
        out.append({"head": kind, "points": rows, "floor": _floor(large, small)})
    return out


def _floor(target: Path, draft: Path) -> dict[str, Any]:
    bytes_of = [
        sum(
            int(np.prod(spec.shape)) * _BYTES[spec.dtype]
            for spec in Manifest.load(folder).params
            if "panel" in spec.layout
        )
        for folder in (target, draft)
    ]
    return {
        "target_weight_bytes": bytes_of[0],
        "draft_weight_bytes": bytes_of[1],
        "round_over_plain_step": {k: round(1 + k * bytes_of[1] / bytes_of[0], 4) for k in range(1, MOST + 1)},
    }


def lookup(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare proposers that look tokens up, on a real model."""
    model = resolve_model(str(args.model), model_policy=CachePolicy.ON, download_policy=CachePolicy.ON)
    seqs = max(args.concurrency)
    artifact = _compile(model, "--max-num-seqs", str(seqs), "--max-num-draft-tokens", str(MOST))
    golden = json.loads(GOLDENS.read_text())["prompts"]
    prompts = [each["prompt_token_ids"] for each in golden if 8 <= len(each["prompt_token_ids"]) <= 600]
    plain = Engine(_config(model, artifact, seqs, None))
    out = []
    methods: tuple[Method, ...] = ("ngram", "suffix")
    for method in methods:
        print(method, flush=True)
        engines = {"plain": plain, "speculating": Engine(_config(model, artifact, seqs, Speculation(method, MOST)))}
        ways = [way for way in WAYS if way.name in ("plain", "K=1", "K=3", "K=5", "auto")]
        out.append({"method": method, "points": compare(engines, ways, prompts, args, SamplingParams(temperature=0.0))})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="for lookup: GGUF file or Hugging Face folder")
    parser.add_argument("--knob", type=float, nargs="*", default=[0.1, 0.2, 0.3])
    parser.add_argument("--heads", action="store_true", help="also EAGLE-3 heads")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--ways", nargs="+", default=[way.name for way in WAYS], help="of pair and heads; plain is needed"
    )
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    result: dict[str, Any] = {
        "benchmark": "speculation",
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("apache-tvm", "numpy")},
        "arguments": {key: value for key, value in vars(args).items() if key not in ("output", "model")},
        "pair_shape": PAIR | {"num_layers": NUM_LAYERS, "num_draft_layers": NUM_DRAFT_LAYERS, "weights": "bfloat16"},
    }
    with tempfile.TemporaryDirectory() as folder:
        if args.knob:
            result["pair"] = pair(args, Path(folder))
        if args.heads:
            result["heads_change"] = HEADS_CHANGE
            result["heads"] = heads(args, Path(folder))
    if args.model is not None:
        result["lookup"] = lookup(args)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
