"""What speculation gains over plain decoding on GPUs, by draft length, accept rate and concurrency, without a server.

Regime: as `gpu_decode.py`: C equal requests (256 tokens in, 129 out) decode together, greedy, prefix cache off, the
real scheduler over real ranks with two plans in flight. Weights are random, so acceptance is SYNTHETIC: a draft token
is right with a given probability if those before it are (`synthetic_acceptance.py`); the costs of drafting and
verifying are real. TPOT is the time of the steps in which all C decode, by the tokens that they gave for each; plain
decoding is of the same ranks, with the draft loaded and idle, or an EAGLE-3 head at its projections. Times of drafting
and verifying are medians by rank 0's clock on the device; a draft on GPUs of its own has what a round takes beside
verifying, the two letters between them included. `auto` is the engine's rule: TPOT while it learns what this
batch size takes, and in a second wave, when it has. Floors: the draft's and the model's weights once through memory, at
4.70 TB/s on an H200. Prints a line per point and, last, one JSON object.

Run on a host with GPUs: python benchmarks/gpu_speculation.py --artifact FOLDER --model FOLDER --draft-artifact FOLDER
--draft-model FOLDER. The model's library must be compiled with --max-num-draft-tokens; the draft's, of TP=1 or the
model's, with as many tokens in a step as the model's or 4 for each sequence, if they are more. An EAGLE-3 head is a
draft like others; its floor counts the projection of hidden rows, which is part of the model's step.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from benchmarks.gpu_decode import (
    DecodeStep,
    add_arguments,
    circumstances,
    decode,
    make_scheduler,
    pages_for,
    weight_bytes,
)

from rank_group import RankGroup, RankProcesses
from tpserve.coordinator.adaptive_length import AdaptiveLength
from tpserve.coordinator.draft_length import DraftLength
from tpserve.proto.manifest import Manifest
from tpserve.proto.speculation import Speculation

MIN_SEQUENCES = 8
"""Of one point: fewer at once take several runs, for enough draft tokens that are right or wrong."""
SKIPPED_STEPS = 2
"""Of each run: the draft may have to catch up with plain steps of the point before."""
START_TIMEOUT_S = 600.0
"""To load both models and capture a graph for each draft length and batch."""
WAVES = ("learning", "learnt")
"""Of `auto`, with one rule: at first it knows nothing, then what it took from the first wave."""
TOLERANCE = 0.1
"""Of the mean accept length against what the rate gives; else the knob does not do what it says."""


def expected_accept_length(rate: float, num_draft_tokens: int) -> float:
    """Return the mean tokens of a round, the bonus token among them (Leviathan et al. 2023, equation 1)."""
    return sum(rate**index for index in range(num_draft_tokens + 1))


@dataclass(frozen=True, slots=True)
class Floors:
    """Milliseconds in which the weights go once through memory."""

    draft_ms: float
    target_ms: float


class Bench:
    """One loaded pair and what is measured of it.

    Parameters
    ----------
    num_pages
        Of each rank.
    is_apart
        The draft has GPUs of its own.
    """

    def __init__(
        self, ranks: RankGroup, manifest: Manifest, num_pages: int, floors: Floors, *, is_apart: bool = False
    ) -> None:
        self._is_apart = is_apart
        self._ranks = ranks
        self._manifest = manifest
        self._num_pages = num_pages
        self._floors = floors
        self._next_id = 0

    def plain(self, concurrency: int) -> dict[str, float]:
        """Measure decoding without draft tokens."""
        steps = self._run(concurrency, 0, lambda run: None)
        tpot_ms = _tpot_ms(steps, concurrency)
        return {"tpot_ms": tpot_ms, "ratio_to_floor": tpot_ms / self._floors.target_ms}

    def speculate(self, concurrency: int, num_draft_tokens: int, rate: float) -> dict[str, float]:
        """Measure rounds of so many draft tokens, each right with probability `rate` if those before it are.

        Raises
        ------
        RuntimeError
            If not about as many were accepted as the rate says.
        """
        times: list[tuple[float, float]] = []

        def begin(run: int) -> None:
            if run:
                times.extend(self._ranks.call("round_times")[0])
            self._ranks.call("set_acceptance", rate, 1 + run)

        steps = self._run(concurrency, num_draft_tokens, begin, rounds_only=True)
        times.extend(self._ranks.call("round_times")[0])
        drafted = sum(step.num_drafted for step in steps)
        accepted = sum(step.num_accepted for step in steps)
        mean_length = sum(step.num_tokens for step in steps) / (len(steps) * concurrency)
        expected = expected_accept_length(rate, num_draft_tokens)
        if abs(mean_length / expected - 1) > TOLERANCE:
            raise RuntimeError(
                f"C={concurrency}, K={num_draft_tokens}: {mean_length:.2f} tokens a round where a rate of {rate} gives "
                f"{expected:.2f}"
            )
        draft_ms, verify_ms = (statistics.median(part) * 1e3 for part in zip(*times, strict=True))
        round_ms = statistics.median(step.seconds for step in steps) * 1e3
        if self._is_apart:  # rank 0's graph has no part that drafts
            draft_ms = round_ms - verify_ms
        return {
            "tpot_ms": _tpot_ms(steps, concurrency),
            "round_ms": round_ms,
            "accept_rate": accepted / drafted,
            "mean_accept_length": mean_length,
            "expected_accept_length": expected,
            "draft_ms": draft_ms,
            "draft_step_ms": draft_ms / num_draft_tokens,
            "draft_ratio_to_floor": draft_ms / num_draft_tokens / self._floors.draft_ms,
            "verify_ms": verify_ms,
            "verify_ratio_to_floor": verify_ms / self._floors.target_ms,
        }

    def adapt(self, concurrency: int, most: int, rate: float) -> dict[str, float]:
        """Measure the engine's own choice of up to `most` draft tokens: as it learns, and when it has."""
        rule = AdaptiveLength(most)
        found = {}
        for wave, name in enumerate(WAVES):
            first_salt = 1 + wave * MIN_SEQUENCES  # other tokens are right in each run

            def begin(run: int, first_salt: int = first_salt) -> None:
                self._ranks.call("set_acceptance", rate, first_salt + run)

            steps = self._run(concurrency, most, begin, rule=rule)
            found[f"{name}_tpot_ms"] = _tpot_ms(steps, concurrency)
            found[f"{name}_draft_tokens"] = sum(step.num_drafted for step in steps) / (len(steps) * concurrency)
        return found

    def _run(
        self,
        concurrency: int,
        num_draft_tokens: int,
        begin: Callable[[int], None],
        *,
        rounds_only: bool = False,
        rule: DraftLength | None = None,
    ) -> list[DecodeStep]:
        """Return steps in which all sequences decode; `rounds_only`: and as many draft tokens are verified for each."""
        steps: list[DecodeStep] = []
        for run in range(max(1, MIN_SEQUENCES // concurrency)):
            begin(run)
            scheduler = make_scheduler(self._manifest, self._num_pages, num_draft_tokens, draft_length=rule)
            found, _ = decode(self._ranks, scheduler, self._manifest.vocab_size, concurrency, self._next_id)
            self._next_id += concurrency
            self._ranks.clear()
            if rounds_only:  # near a request's end fewer are verified
                found = [step for step in found if step.num_drafted == concurrency * num_draft_tokens]
            steps += found[SKIPPED_STEPS:]
        return steps


def _tpot_ms(steps: list[DecodeStep], concurrency: int) -> float:
    return sum(step.seconds for step in steps) * concurrency / sum(step.num_tokens for step in steps) * 1e3


def measure(bench: Bench, manifest: Manifest, args: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """Return all points by concurrency."""
    points: dict[int, dict[str, Any]] = {}
    bench.plain(args.concurrency[0])  # a warm-up
    for concurrency in args.concurrency:
        plain = bench.plain(concurrency)
        points[concurrency] = {"plain": plain}
        print(f"C={concurrency}: plain {plain['tpot_ms']:.3f} ms", flush=True)
        for length in args.num_speculative_tokens:
            if concurrency * (1 + length) > min(manifest.max_num_rows, manifest.max_num_batched_tokens):
                print(f"C={concurrency} K={length}: more rows than the library's {manifest.max_num_rows}", flush=True)
                continue
            for rate in args.accept_rates:
                point = bench.speculate(concurrency, length, rate)
                point["ratio_to_plain"] = point["tpot_ms"] / plain["tpot_ms"]
                points[concurrency][f"K={length} p={rate}"] = point
                print(
                    f"C={concurrency} K={length} p={rate} (synthetic): TPOT {point['tpot_ms']:.3f} ms, "
                    f"{point['ratio_to_plain']:.2f} of plain; {point['mean_accept_length']:.2f} tokens a round; "
                    f"a draft step {point['draft_step_ms']:.3f} ms ({point['draft_ratio_to_floor']:.2f} x floor), "
                    f"verifying {point['verify_ms']:.3f} ms ({point['verify_ratio_to_floor']:.2f} x)",
                    flush=True,
                )
        for rate in args.accept_rates if args.auto else ():
            point = bench.adapt(concurrency, max(args.num_speculative_tokens), rate)
            point |= {f"{name}_ratio_to_plain": point[f"{name}_tpot_ms"] / plain["tpot_ms"] for name in WAVES}
            points[concurrency][f"auto p={rate}"] = point
            print(
                f"C={concurrency} auto p={rate} (synthetic): TPOT {point['learning_ratio_to_plain']:.3f} of plain, "
                f"then {point['learnt_ratio_to_plain']:.3f} with {point['learnt_draft_tokens']:.2f} draft tokens",
                flush=True,
            )
    return points


def main() -> None:
    """Measure all points and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--draft-artifact", type=Path, required=True)
    parser.add_argument("--draft-model", type=Path, required=True)
    parser.add_argument(
        "--draft-placement", choices=["colocated", "dedicated"], default="colocated", help="as of tpserve serve"
    )
    parser.add_argument("--num-speculative-tokens", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--accept-rates", type=float, nargs="+", default=[0.6, 0.7, 0.8], help="synthetic")
    parser.add_argument("--auto", action="store_true", help="measure the engine's choice of the length, too")
    args = parser.parse_args()
    if not all(0 <= rate <= 1 for rate in args.accept_rates):
        parser.error(f"--accept-rates {args.accept_rates}: probabilities are 0 to 1")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)

    from benchmarks.synthetic_acceptance import SyntheticRunner  # which needs CuPy

    manifest, draft = Manifest.load(args.artifact), Manifest.load(args.draft_artifact)
    most = max(args.num_speculative_tokens)
    num_pages = pages_for(manifest, max(args.concurrency), 16 + 2 * (1 + most))
    speculation = Speculation(
        "draft" if draft.head is None else "eagle3",
        most,
        draft_model_dir=args.draft_model,
        draft_artifact_dir=args.draft_artifact,
        draft_tp_size=draft.tp_size,
        draft_load_format=args.load_format,
        draft_placement=args.draft_placement,
    )
    draft_ms, target_ms = (weight_bytes(one) / (args.bandwidth * 1e12) * 1e3 for one in (draft, manifest))
    processes = RankProcesses(SyntheticRunner)
    try:
        with processes.group(
            args.model,
            args.artifact,
            manifest.tp_size,
            num_pages=num_pages,
            max_num_seqs=manifest.max_num_seqs,
            load_format=args.load_format,
            devices=range(manifest.tp_size + speculation.num_draft_ranks),
            collectives=args.collectives,
            speculation=speculation,
            start_timeout_s=START_TIMEOUT_S,
        ) as ranks:
            bench = Bench(
                ranks, manifest, num_pages, Floors(draft_ms, target_ms), is_apart=speculation.num_draft_ranks > 0
            )
            points = measure(bench, manifest, args)
    finally:
        processes.close()
    result = circumstances("gpu_speculation", args, manifest)
    result |= {
        "acceptance": "synthetic",
        "draft_model": args.draft_model.name,
        "draft_tp": draft.tp_size,
        "draft_placement": args.draft_placement,
        "draft_quantization": draft.quantization,
        "floor_ms": target_ms,
        "draft_floor_ms": draft_ms,
        "points": points,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
