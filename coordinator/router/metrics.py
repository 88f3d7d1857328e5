"""What a router counts, and how it shows the metrics of its replicas beside its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tpserve.coordinator.metrics_catalogue import ROUTER_BY_NAME

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody asked for

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Reading:
    """A gauge as it is when scraped."""

    name: str
    labels: tuple[str, ...]
    value: float


class RouterMetrics:
    """The router's own metrics, in a registry of their own.

    Parameters
    ----------
    read
        Returns the gauges.
    """

    def __init__(self, read: Callable[[], Iterable[Reading]]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Gauges(read))
        self._requests = self._counter("router_requests")
        self._duration = self._histogram("router_request_duration_seconds")
        self._queue_time = self._histogram("router_queue_seconds")
        self._rejections = self._counter("router_rejections")
        self._backend_requests = self._counter("router_backend_requests")
        self._moves = self._counter("router_moves")
        self._breaker_changes = self._counter("router_breaker_changes")
        self._prompt_blocks = self._counter("router_prompt_blocks")
        self._matched_blocks = self._counter("router_matched_blocks")
        for reason in ("queue_full", "queue_timeout", "no_backend"):
            self._rejections.labels(reason)
        for outcome in ("moved", "failed"):
            self._moves.labels(outcome)

    def _counter(self, name: str) -> Counter:
        spec = ROUTER_BY_NAME[name]
        return Counter(spec.full_name, spec.text, spec.labels, registry=self._registry)

    def _histogram(self, name: str) -> Histogram:
        spec = ROUTER_BY_NAME[name]
        return Histogram(spec.full_name, spec.text, spec.labels, buckets=spec.buckets, registry=self._registry)

    def make_backend(self, name: str) -> None:
        """Make a replica's counters appear, at zero."""
        for outcome in ("answered", "refused", "lost", "left"):
            self._backend_requests.labels(name, outcome)
        for state in ("closed", "open", "half_open"):
            self._breaker_changes.labels(name, state)

    def end(self, route: str, code: int, duration_s: float) -> None:
        """Note that a client's request has ended."""
        self._requests.labels(route, str(code)).inc()
        self._duration.labels(route).observe(duration_s)

    def wait(self, duration_s: float) -> None:
        """Note how long a request waited for a replica."""
        self._queue_time.observe(duration_s)

    def reject(self, reason: str) -> None:
        """Note a request that no replica took: `queue_full`, `queue_timeout`, `no_backend`."""
        self._rejections.labels(reason).inc()

    def backend_request(self, name: str, outcome: str) -> None:
        """Note what became of a request at a replica: `answered`, `refused`, `lost`, or its client has `left`."""
        self._backend_requests.labels(name, outcome).inc()

    def move(self, outcome: str) -> None:
        """Note a stream whose replica was lost: `moved` to another one, or `failed`."""
        self._moves.labels(outcome).inc()

    def breaker_change(self, name: str, state: str) -> None:
        """Note that a breaker has a new state."""
        self._breaker_changes.labels(name, state).inc()

    def match(self, num_blocks: int, num_matched: int) -> None:
        """Note how much of a prompt the chosen replica had seen."""
        self._prompt_blocks.inc(num_blocks)
        self._matched_blocks.inc(num_matched)

    def render(self, replicas: Mapping[str, str] | None = None) -> str:
        """Return the metrics in Prometheus text format, and those of the replicas by their number."""
        own = generate_latest(self._registry).decode()
        return own if replicas is None else own + merge(replicas)


class _Gauges(Collector):
    def __init__(self, read: Callable[[], Iterable[Reading]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        families: dict[str, GaugeMetricFamily] = {}
        for reading in self._read():
            spec = ROUTER_BY_NAME[reading.name]
            if reading.name not in families:
                families[reading.name] = GaugeMetricFamily(spec.full_name, spec.text, labels=spec.labels)
            families[reading.name].add_metric(reading.labels, reading.value)
        return families.values()


_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (.*)$")


def merge(texts: Mapping[str, str]) -> str:
    """Return the samples of several scrapes as one, each with the label `replica`; each family stands once."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, text in texts.items():
        family = ""
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                lines = heads.setdefault(family, [])
                if not any(known.split(" ", 3)[1] == line.split(" ", 3)[1] for known in lines):
                    lines.append(line)
            elif found := _SAMPLE.match(line):
                name, labels, rest = found.groups()
                label = f'replica="{replica}"' + (f",{labels}" if labels else "")
                samples.setdefault(family, []).append(f"{name}{{{label}}} {rest}")
    return "".join(f"{line}\n" for family in samples for line in (*heads.get(family, ()), *samples[family]))
