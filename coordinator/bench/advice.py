"""What the measured points say about which configuration to use. Only measured figures, nothing in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from tpserve.coordinator.bench.results import Configuration, Point

MARKS_TOK_S = (50, 70, 100)
"""Speeds for one user by which services are compared: 20, 14.3 and 10 ms per token."""
_TIE = 1.02
"""Runs differ by so much; within it, fewer GPUs win."""


def advice(points: Sequence[Point]) -> list[str]:
    """Return lines that say which configuration to use up to which concurrency, and where variants stop paying.

    Only whole points of closed loops without failed requests count.
    """
    usable = [
        point
        for point in points
        if point.complete and point.concurrency is not None and not point.metrics.num_failed and point.mean_tpot_s
    ]
    if not usable:
        return []
    lines = [line for mark in MARKS_TOK_S if (line := _at_speed(usable, mark))]
    if len({point.configuration for point in usable}) > 1:
        lines += _by_concurrency("Least time per output token", usable, lambda point: -(point.mean_tpot_s or 0.0))
        lines += _by_concurrency("Most tokens per second and GPU", usable, lambda point: point.throughput_per_gpu)
        lines += _variants(usable)
    return lines


def _concurrency(point: Point) -> int:
    assert point.concurrency is not None
    return point.concurrency


def _at_speed(points: Sequence[Point], mark_tok_s: int) -> str | None:
    """Return how far each configuration keeps a speed, the one with the most throughput per GPU first."""
    best: dict[Configuration, Point] = {}
    for configuration, own in _by_configuration(points):
        for point in sorted(own, key=_concurrency):
            if (point.mean_tpot_s or 0.0) > 1 / mark_tok_s:
                break  # what a higher concurrency happens to reach again is not relied upon
            best[configuration] = point
    if not best:
        return None
    parts = [
        f"{point.configuration.label} up to concurrency {point.concurrency} "
        f"({point.throughput_per_gpu:.0f} tok/s per GPU)"
        for point in sorted(best.values(), key=lambda point: -point.throughput_per_gpu)
    ]
    return f"For {mark_tok_s} tok/s per user (TPOT at most {1e3 / mark_tok_s:.1f} ms): {'; '.join(parts)}."


def _by_concurrency(goal: str, points: Sequence[Point], score: Callable[[Point], float]) -> Iterator[str]:
    """Yield one line: the best configuration in each range of concurrencies that were measured for at least two."""
    choices: list[tuple[int, str]] = []
    for concurrency in sorted({_concurrency(point) for point in points}):
        rivals = [point for point in points if point.concurrency == concurrency]
        if len(rivals) < 2:
            continue
        top = max(map(score, rivals))
        least = top / _TIE if top > 0 else top * _TIE
        close = [point for point in rivals if score(point) >= least]
        best = min(close, key=lambda point: (point.configuration.num_gpus, -score(point)))
        choices.append((concurrency, best.configuration.label))
    if not choices:
        return
    ranges = [(label, [c for c, _ in group]) for label, group in groupby(choices, key=lambda choice: choice[1])]
    parts = [f"{label} at concurrency {_span(concurrencies)}" for label, concurrencies in ranges]
    yield f"{goal}: {', '.join(parts)}."


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _variants(points: Sequence[Point]) -> Iterator[str]:
    """Yield up to where a variant of the server's arguments (speculation, say) is faster than the plain server."""
    plain = {
        (point.configuration.tp, point.configuration.quantization, point.concurrency): point
        for point in points
        if not point.configuration.serve_args and point.configuration.tp is not None
    }
    for configuration, own in _by_configuration(points):
        if not configuration.serve_args:
            continue
        pairs = [
            (point, plain[key])
            for point in sorted(own, key=_concurrency)
            if (key := (configuration.tp, configuration.quantization, point.concurrency)) in plain
        ]
        gains = [((base.mean_tpot_s or 0.0) / (point.mean_tpot_s or 1.0), _concurrency(point)) for point, base in pairs]
        if not gains:
            continue
        paying = [(gain, concurrency) for gain, concurrency in gains if gain > _TIE]
        if not paying:
            yield f"{configuration.label} pays at no measured concurrency."
            continue
        last = paying[-1][1]
        rest = [concurrency for _, concurrency in gains if concurrency > last]
        end = f"; from {rest[0]} on it does not" if rest else ""
        yield (
            f"{configuration.label} pays up to concurrency {last} "
            f"(TPOT {paying[0][0]:.2f} x shorter at {paying[0][1]}, {paying[-1][0]:.2f} x at {last}){end}."
        )


def _by_configuration(points: Sequence[Point]) -> Iterator[tuple[Configuration, list[Point]]]:
    for configuration in dict.fromkeys(point.configuration for point in points):
        yield configuration, [point for point in points if point.configuration == configuration]
