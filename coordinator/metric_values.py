"""Counters and histograms for one thread, cheap enough for every token of every step.

The client library's own take a lock and walk all buckets for each value; these took a sixth of the time, and count many
equal values at once (benchmarks/README.md). They are read when scraped, in the client library's form.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from tpserve.coordinator.metrics_catalogue import MetricSpec

Labels = tuple[str, ...]


class Histogram:
    """Values by bucket."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count a value, or as many equal ones."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    @property
    def sum(self) -> float:
        """Of all values."""
        return self._sum

    def cumulative(self) -> list[tuple[str, float]]:
        """Return (upper bound as text, values up to it) pairs, `+Inf` last."""
        found, total = [], 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            found.append(("+Inf" if bound == float("inf") else repr(bound), float(total)))
        return found


class HistogramFamily:
    """A histogram for each combination of labels.

    Parameters
    ----------
    base
        Values of the labels that all have.
    """

    def __init__(self, spec: MetricSpec, base: Labels) -> None:
        self._spec = spec
        self._base = base
        self._children: dict[Labels, Histogram] = {}

    def labels(self, *values: str) -> Histogram:
        """Return the histogram of these labels."""
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = Histogram(self._spec.buckets)
        return child

    def collect(self) -> Iterator[Metric]:
        """Return the metric in the client library's form."""
        family = HistogramMetricFamily(self._spec.full_name, self._spec.text, labels=self._spec.all_labels)
        for values, child in self._children.items():
            family.add_metric([*self._base, *values], child.cumulative(), child.sum)
        yield family


class CounterFamily:
    """A counter for each combination of labels; see `HistogramFamily`."""

    def __init__(self, spec: MetricSpec, base: Labels) -> None:
        self._spec = spec
        self._base = base
        self._children: dict[Labels, float] = {}

    def inc(self, amount: float = 1, *values: str) -> None:
        """Add to the counter of these labels; 0 makes it appear."""
        self._children[values] = self._children.get(values, 0.0) + amount

    def collect(self) -> Iterator[Metric]:
        """Return the metric in the client library's form."""
        yield counter_metric(self._spec, self._base, self._children)


def counter_metric(spec: MetricSpec, base: Labels, values: dict[Labels, float]) -> Metric:
    """Return a counter in the client library's form."""
    family = CounterMetricFamily(spec.full_name, spec.text, labels=spec.all_labels)
    for labels, value in values.items():
        family.add_metric([*base, *labels], value)
    return family


def gauge_metric(spec: MetricSpec, base: Labels, values: dict[Labels, float]) -> Metric:
    """Return a gauge in the client library's form."""
    family = GaugeMetricFamily(spec.full_name, spec.text, labels=spec.all_labels)
    for labels, value in values.items():
        family.add_metric([*base, *labels], value)
    return family
