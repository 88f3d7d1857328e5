"""What a run found: points by configuration and load, and their JSON. Knows nothing of how they are shown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tpserve.coordinator.bench.definitions import Metrics, Record, Summary
from tpserve.coordinator.bench.errors import BenchError
from tpserve.coordinator.draft_counts import Drafts

FORMAT_VERSION = 1
_SUMMARIES = ("ttft_s", "tpot_s", "itl_s", "e2el_s", "input_tokens", "output_tokens")


@dataclass(frozen=True, slots=True)
class Configuration:
    """What is measured: one way of starting the server, or one endpoint."""

    label: str
    """In tables and in the chart."""
    num_gpus: int
    """By which throughput is divided."""
    tp: int | None = None
    """None for an endpoint that was not started here."""
    quantization: str | None = None
    serve_args: tuple[str, ...] = ()
    base_url: str | None = None
    floor_tpot_s: float | None = None
    """The least possible time per token of one request, if the user gave it."""


@dataclass(frozen=True, slots=True)
class Point:
    """One measured point."""

    configuration: Configuration
    concurrency: int | None
    """None in an open loop."""
    request_rate: float | None
    """Requests per second; None in a closed loop and for a trace."""
    metrics: Metrics
    complete: bool
    """False if it was cut short; `--resume` measures it again."""
    requests: tuple[tuple[Any, ...], ...] = ()
    """One row per measured request, see REQUEST_COLUMNS."""
    drafts: Drafts | None = None
    """What the server counted of speculation meanwhile, warm-up included; None if it drafted nothing."""

    @property
    def key(self) -> tuple[Configuration, int | None, float | None]:
        """What makes it the same point in another run."""
        return (self.configuration, self.concurrency, self.request_rate)

    @property
    def load_label(self) -> str:
        """The load in a word."""
        if self.concurrency is not None:
            return str(self.concurrency)
        return "trace" if self.request_rate is None else f"{self.request_rate:g}/s"

    @property
    def throughput_per_gpu(self) -> float:
        """Output tokens per second and GPU."""
        return self.metrics.output_throughput / self.configuration.num_gpus

    @property
    def mean_tpot_s(self) -> float | None:
        """Mean of the requests' TPOT."""
        return None if self.metrics.tpot_s is None else self.metrics.tpot_s.mean


REQUEST_COLUMNS = (
    "index",
    "prompt_tokens",
    "output_tokens",
    "first_chunk_tokens",
    "ttft_s",
    "tpot_s",
    "e2el_s",
    "error",
)


def request_rows(records: Sequence[Record]) -> tuple[tuple[Any, ...], ...]:
    """Return the rows of `Point.requests`, in the order of the requests' numbers."""
    measured = sorted((record for record in records if record.role == "measured"), key=lambda record: record.index)

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 7)

    return tuple(
        (
            r.index,
            r.num_prompt_tokens,
            r.num_received_tokens,
            r.num_first_chunk_tokens,
            rounded(r.ttft_s),
            rounded(r.tpot_s),
            rounded(r.e2el_s),
            r.error,
        )
        for r in measured
    )


@dataclass(slots=True)
class Run:
    """Everything of one run."""

    started_at: str
    """ISO 8601, UTC."""
    commit: str | None
    device: str
    """Of the machine that ran this tool."""
    versions: Mapping[str, str]
    arguments: Mapping[str, Any]
    points: list[Point] = field(default_factory=list)

    def add(self, point: Point) -> None:
        """Take a point, in place of an earlier one of the same key."""
        self.points = [other for other in self.points if other.key != point.key] + [point]

    def has(self, configuration: Configuration, concurrency: int | None, request_rate: float | None) -> bool:
        """Whether a point has been measured whole; one at which every request failed has not."""
        key = (configuration, concurrency, request_rate)
        return any(point.key == key and point.complete and point.metrics.num_succeeded for point in self.points)

    def save(self, path: Path) -> None:
        """Write the JSON; an earlier file is there until the new one is whole."""
        parsed = {
            "format_version": FORMAT_VERSION,
            **{name: getattr(self, name) for name in ("started_at", "commit", "device", "versions", "arguments")},
            "request_columns": REQUEST_COLUMNS,
            "points": [dataclasses.asdict(point) for point in self.points],
        }
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(parsed, allow_nan=False) + "\n")
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises
        ------
        BenchError
            If the file is missing, is no such JSON, or is of another format version.
        """
        try:
            parsed = json.loads(path.read_text())
            if parsed.pop("format_version") != FORMAT_VERSION:
                raise BenchError(f"{path} is of another version of this tool")
            parsed.pop("request_columns")
            points = [_point(point) for point in parsed.pop("points")]
            return cls(**parsed, points=points)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BenchError(f"{path}: not the results of a run: {type(error).__name__}: {error}") from None


def _point(parsed: dict[str, Any]) -> Point:
    configuration = parsed.pop("configuration")
    configuration["serve_args"] = tuple(configuration["serve_args"])
    metrics = parsed.pop("metrics")
    for name in _SUMMARIES:
        metrics[name] = None if metrics[name] is None else Summary(**metrics[name])
    requests = tuple(map(tuple, parsed.pop("requests")))
    if (drafts := parsed.pop("drafts", None)) is not None:
        drafts = Drafts(**(drafts | {"accepted_per_position": tuple(drafts["accepted_per_position"])}))
    return Point(Configuration(**configuration), metrics=Metrics(**metrics), requests=requests, drafts=drafts, **parsed)
