"""How a run is written down: vLLM's block of text per point, and a CSV with the columns of MLC's benchmark."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tpserve.coordinator.bench.definitions import Metrics, Summary
from tpserve.coordinator.bench.results import Point

_WIDTH = 50


def text_block(point: Point) -> str:
    """Return the result of one point as `vllm bench serve` shows it, with p90 and E2EL; what is ours comes last."""
    return "\n".join(_lines(point))


def _lines(point: Point) -> Iterator[str]:
    metrics = point.metrics
    yield " Serving Benchmark Result ".center(_WIDTH, "=")
    yield _row("Successful requests:", metrics.num_succeeded)
    yield _row("Failed requests:", metrics.num_failed)
    if point.concurrency is not None:
        yield _row("Maximum request concurrency:", point.concurrency)
    if point.request_rate is not None:
        yield _row("Request rate configured (RPS):", point.request_rate)
    yield _row("Benchmark duration (s):", metrics.duration_s)
    yield _row("Total input tokens:", metrics.num_input_tokens)
    yield _row("Total generated tokens:", metrics.num_output_tokens)
    yield _row("Request throughput (req/s):", metrics.request_throughput)
    if metrics.goodput is not None:
        yield _row("Request goodput (req/s):", metrics.goodput)
    yield _row("Output token throughput (tok/s):", metrics.output_throughput)
    yield _row("Peak output token throughput (tok/s):", metrics.peak_output_throughput)
    yield _row("Peak concurrent requests:", metrics.peak_concurrency)
    yield _row("Total token throughput (tok/s):", metrics.total_throughput)
    yield from _latency("Time to First Token", "TTFT", metrics.ttft_s)
    yield from _latency("Time per Output Token (excl. 1st token)", "TPOT", metrics.tpot_s)
    yield from _latency("Inter-token Latency", "ITL", metrics.itl_s)
    yield from _latency("End-to-end Latency", "E2EL", metrics.e2el_s)
    if (drafts := point.drafts) is not None:
        yield "Speculative Decoding".center(_WIDTH, "-")
        yield _row("Acceptance rate (%):", 100 * drafts.accept_rate)
        yield _row("Acceptance length:", drafts.accept_length)
        yield _row("Drafts:", drafts.num_drafts)
        yield _row("Draft tokens:", drafts.num_draft_tokens)
        yield _row("Accepted tokens:", drafts.num_accepted_tokens)
        yield "Per-position acceptance (%):"
        for position, count in enumerate(drafts.accepted_per_position):
            yield _row(f"  Position {position}:", 100 * count / drafts.num_drafts)
    yield point.configuration.label.center(_WIDTH, "-")
    if metrics.num_unfinished:
        yield _row("Unfinished requests:", metrics.num_unfinished)
    yield _row("Number of GPUs:", point.configuration.num_gpus)
    yield _row("Output token throughput per GPU (tok/s):", point.throughput_per_gpu)
    if metrics.tpot_pooled_s:
        yield _row("Pooled TPOT (ms):", metrics.tpot_pooled_s * 1e3)
    if point.mean_tpot_s:
        yield _row("Output speed per user (tok/s):", 1 / point.mean_tpot_s)
    if (ratio := floor_ratio(point)) is not None:
        yield _row("Mean TPOT over floor:", ratio)
    yield "=" * _WIDTH
    yield from warnings(point)


def _row(name: str, value: float | str) -> str:
    return f"{name:<40} {value:<10.2f}" if isinstance(value, float) else f"{name:<40} {value:<10}"


def _latency(title: str, name: str, summary: Summary | None) -> Iterator[str]:
    yield title.center(_WIDTH, "-")
    if summary is None:
        yield _row(f"Mean {name} (ms):", "-")
        return
    for kind, value in (
        ("Mean", summary.mean),
        ("Median", summary.median),
        ("P90", summary.p90),
        ("P99", summary.p99),
    ):
        yield _row(f"{kind} {name} (ms):", value * 1e3)


def warnings(point: Point) -> Iterator[str]:
    """Say what a reader of the figures must know."""
    metrics = point.metrics
    for error, count in sorted(metrics.errors.items(), key=lambda item: -item[1]):
        yield f"{count} requests failed: {error}"
    if not point.complete:
        yield "This point was cut short."
    if metrics.num_first_chunk_assumed:
        yield (
            f"The server does not say how many tokens the first chunk of {metrics.num_first_chunk_assumed} requests "
            "had; TPOT takes it as 1."
        )
    if metrics.num_cached_tokens:
        yield f"{metrics.num_cached_tokens} prompt tokens came from the server's prefix cache."


def floor_ratio(point: Point) -> float | None:
    """Return mean TPOT as a multiple of the floor, if both are known."""
    floor_s = point.configuration.floor_tpot_s
    return None if floor_s is None or point.mean_tpot_s is None else point.mean_tpot_s / floor_s


def csv_row(point: Point) -> dict[str, Any]:
    """Return one row: what was measured, then MLC's columns, nested names joined with dots."""
    metrics, configuration = point.metrics, point.configuration
    row: dict[str, Any] = {
        "label": configuration.label,
        "tp": configuration.tp,
        "quantization": configuration.quantization,
        "serve_args": " ".join(configuration.serve_args),
        "base_url": configuration.base_url,
        "num_concurrent_requests": point.concurrency,
        "request_rate": point.request_rate,
        "complete": point.complete,
    }
    for name, summary in (
        ("end_to_end_latency_s", metrics.e2el_s),
        ("input_tokens", metrics.input_tokens),
        ("output_tokens", metrics.output_tokens),
        ("inter_token_latency_s", metrics.itl_s),
        ("time_per_output_token_s", metrics.tpot_s),
        ("time_to_first_token_s", metrics.ttft_s),
    ):
        row.update(_flat(name, summary))
    num_gpus = configuration.num_gpus
    return row | {
        "num_gpus": num_gpus,
        "duration": metrics.duration_s,
        "num_total_requests": metrics.num_requests,
        "num_completed_requests": metrics.num_succeeded,
        "num_failed_requests": metrics.num_failed,
        "request_throughput": metrics.request_throughput,
        "request_goodput": metrics.goodput,
        "total_input_tokens": metrics.num_input_tokens,
        "total_output_tokens": metrics.num_output_tokens,
        "input_token_throughput": _input_throughput(metrics),
        "input_token_throughput_per_gpu": _input_throughput(metrics) / num_gpus,
        "output_token_throughput": metrics.output_throughput,
        "output_token_throughput_per_gpu": point.throughput_per_gpu,
        "pooled_time_per_output_token_s": metrics.tpot_pooled_s,
        "floor_time_per_output_token_s": configuration.floor_tpot_s,
        "spec_decode_accept_rate": None if point.drafts is None else point.drafts.accept_rate,
        "spec_decode_accept_length": None if point.drafts is None else point.drafts.accept_length,
    }


def _input_throughput(metrics: Metrics) -> float:
    return metrics.num_input_tokens / metrics.duration_s


def _flat(name: str, summary: Summary | None) -> dict[str, float | None]:
    values: dict[str, float | None] = dict.fromkeys(field.name for field in dataclasses.fields(Summary))
    if summary is not None:
        values |= dataclasses.asdict(summary)
    quantiles = {f"p{percent}": values[f"p{percent}"] for percent in (25, 75, 90, 95, 99)}
    quantiles = {"p25": quantiles.pop("p25"), "p50": values["median"], **quantiles}
    return {f"{name}.quantiles.{key}": value for key, value in quantiles.items()} | {
        f"{name}.{key}": values[key] for key in ("mean", "min", "max", "stddev")
    }


def write_csv(points: Sequence[Point], path: Path) -> None:
    """Write one row per point."""
    rows = [csv_row(point) for point in points]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
