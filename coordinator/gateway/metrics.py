"""The gateway's own metrics: HTTP requests. Tokens and latencies of the engine are the coordinator's."""

from __future__ import annotations

import os
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from tpserve.coordinator.metrics_catalogue import BY_NAME, ENGINE_LABELS

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody asked for

MULTIPROCESS_DIR = "PROMETHEUS_MULTIPROC_DIR"
"""Set by `tpserve serve` for several gateways: a folder in which each keeps its counts where all can read them."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Whatever a scraper asks for: in OpenMetrics the colons of `--metrics-compat vllm` would be lost."""


def samples_by_name(text: str) -> dict[str, float]:
    """Return every sample of Prometheus text; labels that tell more than which engine it is follow in braces."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sample.labels.items() if key not in ENGINE_LABELS)
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


class HttpMetrics:
    """Counts HTTP requests by route, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("http_requests")
        self._in_flight = self._gauge("http_requests_in_flight")
        duration = BY_NAME["http_request_duration_seconds"]
        self._duration = Histogram(
            duration.full_name, duration.text, duration.labels, buckets=duration.buckets, registry=self._registry
        )
        self._stream_failures = self._counter("http_stream_failures")
        self._key_requests = self._counter("key_requests")
        self._key_limited = self._counter("key_limited_requests")
        self._key_prompt_tokens = self._counter("key_prompt_tokens")
        self._key_generation_tokens = self._counter("key_generation_tokens")
        self._engine_up = self._gauge("gateway_engine_up", "livemostrecent")

    def _counter(self, name: str) -> Counter:
        spec = BY_NAME[name]
        return Counter(spec.full_name, spec.text, spec.labels, registry=self._registry)

    def _gauge(self, name: str, of_many: Literal["livesum", "livemostrecent"] = "livesum") -> Gauge:
        spec = BY_NAME[name]
        return Gauge(spec.full_name, spec.text, spec.labels, registry=self._registry, multiprocess_mode=of_many)

    def begin(self, route: str) -> None:
        """Note that a request has begun."""
        self._in_flight.labels(route).inc()

    def end(self, route: str, code: int, duration_s: float) -> None:
        """Note that a request has ended."""
        self._in_flight.labels(route).dec()
        self._requests.labels(route, str(code)).inc()
        self._duration.labels(route).observe(duration_s)

    def stream_failed(self, code: int) -> None:
        """Note that a stream whose status was 200 ended with an error."""
        self._stream_failures.labels(str(code)).inc()

    def key_request(self, key_name: str) -> None:
        """Note that a key's request has begun."""
        self._key_requests.labels(key_name).inc()

    def key_limited(self, key_name: str, limit: str) -> None:
        """Note that it was refused by one of the key's limits."""
        self._key_limited.labels(key_name, limit).inc()

    def key_tokens(self, key_name: str, *, prompt: int = 0, generation: int = 0) -> None:
        """Note tokens that a key's requests use."""
        if prompt:
            self._key_prompt_tokens.labels(key_name).inc(prompt)
        if generation:
            self._key_generation_tokens.labels(key_name).inc(generation)

    def render(self, engine_text: str | None) -> str:
        """Return the coordinator's metrics (None: it gave none) and these, in Prometheus text format 0.0.4.

        With several gateway processes, whichever is asked answers for all of them.
        """
        self._engine_up.set(engine_text is not None)
        registry = self._registry
        if MULTIPROCESS_DIR in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        own = generate_latest(registry).decode()
        if not engine_text:
            return own
        return engine_text + ("" if engine_text.endswith("\n") else "\n") + own
