"""The gateway's own metrics: HTTP requests. Tokens and latencies of the engine are the coordinator's."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

DURATION_BUCKETS_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0),
)


class HttpMetrics:
    """Counts HTTP requests by route, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "tpserve_http_requests_total",
            "HTTP requests answered, by route and status code.",
            ["route", "code"],
            registry=self._registry,
        )
        self._in_flight = Gauge(
            "tpserve_http_requests_in_flight", "HTTP requests being answered.", ["route"], registry=self._registry
        )
        self._duration = Histogram(
            "tpserve_http_request_duration_seconds",
            "Time from the request's headers to the end of the answer.",
            ["route"],
            buckets=DURATION_BUCKETS_S,
            registry=self._registry,
        )
        self._stream_failures = Counter(
            "tpserve_http_stream_failures_total",
            "Streams that ended before their last token, by the code of the error; 499 is a client that left.",
            ["code"],
            registry=self._registry,
        )
        self._engine_up = Gauge(
            "tpserve_gateway_engine_up",
            "1 if the coordinator gave its metrics for this scrape.",
            registry=self._registry,
        )

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

    def render(self, engine_text: str | None) -> str:
        """Return the coordinator's metrics (None: it gave none) and these, in Prometheus text format 0.0.4."""
        self._engine_up.set(engine_text is not None)
        own = generate_latest(self._registry).decode()
        if not engine_text:
            return own
        return engine_text + ("" if engine_text.endswith("\n") else "\n") + own
