"""What the user sees while it runs: progress bars, a live table of the points, and the text of each point."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tpserve.coordinator.bench.definitions import Record, Summary
from tpserve.coordinator.bench.report import text_block
from tpserve.coordinator.bench.results import Point

_COLUMNS = ("configuration", "load", "TPOT ms", "p99", "TTFT ms", "p99", "ITL p99", "tok/s", "tok/s/GPU", "failed")
_REFRESH_PER_S = 4
"""Drawing takes time from the client: seldom is enough."""


class View:
    """Shows one run.

    Parameters
    ----------
    num_points
        To be measured, those of an earlier run left out.
    points
        Measured earlier.
    """

    def __init__(self, console: Console, num_points: int, points: Sequence[Point]) -> None:
        self._console = console
        self._points = list(points)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        )
        self._all = self._progress.add_task("points", total=num_points)
        self._now = self._progress.add_task("", total=None, visible=False)
        self._num_ended = -1
        self._live = Live(
            get_renderable=self._render, console=console, refresh_per_second=_REFRESH_PER_S, transient=False
        )

    def __enter__(self) -> View:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.update(self._now, visible=False)
        self._live.stop()
        if not self._console.is_terminal:
            self._console.print()  # a live display leaves its last line open in a file

    def say(self, text: str, style: str | None = None) -> None:
        """Write lines that stay."""
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def wait_for(self, what: str) -> None:
        """Show that something takes its time."""
        self._progress.reset(self._now, total=None, description=what, visible=True)

    def begin(self, what: str, num_requests: int) -> None:
        """Show that a point is being measured."""
        self._num_ended = 0
        self._progress.reset(self._now, total=num_requests, description=what, visible=True)

    def records_changed(self, records: Sequence[Record]) -> None:
        """Show how far it is."""
        num_ended = sum(record.role == "measured" and record.end_s is not None for record in records)
        if num_ended != self._num_ended:
            self._num_ended = num_ended
            self._progress.update(self._now, completed=num_ended)

    def point_done(self, point: Point) -> None:
        """Write a point's figures and put it into the table."""
        self._points = [other for other in self._points if other.key != point.key] + [point]
        self._progress.advance(self._all)
        self.say(text_block(point) + "\n")

    def _render(self) -> Group:
        return Group(points_table(self._points), self._progress) if self._points else Group(self._progress)


def points_table(points: Sequence[Point]) -> Table:
    """Return one row per point."""
    table = Table()
    for number, name in enumerate(_COLUMNS):
        table.add_column(name, justify="left" if number == 0 else "right")
    for point in points:
        metrics = point.metrics
        table.add_row(
            point.configuration.label,
            point.load_label + ("" if point.complete else " (cut short)"),
            _ms(metrics.tpot_s, "mean"),
            _ms(metrics.tpot_s, "p99"),
            _ms(metrics.ttft_s, "mean"),
            _ms(metrics.ttft_s, "p99"),
            _ms(metrics.itl_s, "p99"),
            f"{metrics.output_throughput:.1f}",
            f"{point.throughput_per_gpu:.1f}",
            str(metrics.num_failed),
            style="red" if metrics.num_failed else None,
        )
    return table


def _ms(summary: Summary | None, name: str) -> str:
    return "-" if summary is None else f"{getattr(summary, name) * 1e3:.2f}"
