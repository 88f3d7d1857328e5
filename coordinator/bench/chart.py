"""The chart of a run: throughput per GPU over mean time per output token, one line per configuration."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from tpserve.coordinator.bench.advice import MARKS_TOK_S
from tpserve.coordinator.bench.results import Point

_DOTS_PER_INCH = 150
_SIZE_INCHES = (9.0, 5.5)
_LEFT_OUT_BEYOND = 3.0
"""Marks of speed so many times farther left or right than all points are not drawn."""


def has_matplotlib() -> bool:
    """Whether charts can be drawn: matplotlib is an extra."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(points: Sequence[Point], title: str, paths: Sequence[Path]) -> bool:
    """Draw the chart into each path, in the format of its suffix; return whether there was anything to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series: dict[str, list[Point]] = {}
    for point in points:
        if point.mean_tpot_s:
            series.setdefault(point.configuration.label, []).append(point)
    if not series:
        return False
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, own in series.items():
        own.sort(key=lambda point: (point.concurrency or 0, point.request_rate or 0.0))
        x = [point.mean_tpot_s or 0.0 for point in own]
        y = [point.throughput_per_gpu for point in own]
        axes.plot(x, y, marker="o", markersize=4, label=label)
        for point, place in zip(own, zip(x, y, strict=True), strict=True):
            axes.annotate(point.load_label, place, textcoords="offset points", xytext=(5, 4), fontsize=8)
    all_tpot = [point.mean_tpot_s or 0.0 for own in series.values() for point in own]
    for mark in MARKS_TOK_S:
        if min(all_tpot) / _LEFT_OUT_BEYOND < 1 / mark < max(all_tpot) * _LEFT_OUT_BEYOND:
            axes.axvline(1 / mark, color="0.6", linestyle="--", linewidth=0.8)
            axes.annotate(
                f"{mark} tok/s",
                (1 / mark, 1.0),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                xytext=(-3, -3),
                rotation=90,
                ha="right",
                va="top",
                fontsize=8,
                color="0.4",
            )
    axes.set_xlabel("Mean TPOT (s)")
    axes.set_ylabel("Output throughput per GPU (tok/s)")
    axes.set_title(title, fontsize=10)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    for path in paths:
        figure.savefig(path, dpi=_DOTS_PER_INCH)
    return True
