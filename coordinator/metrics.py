"""Every Prometheus metric of the coordinator, with its unit in the name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tpserve.coordinator.client import RankState
from tpserve.coordinator.scheduler import SchedulerStats

# vLLM's buckets, with the range of 1 to 20 ms made fine: a token of a fast engine falls there.
_TTFT_BUCKETS: tuple[float, ...] = (
    0.001,
    0.0025,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.03,
    0.04,
    0.06,
    0.08,
    0.1,
    0.15,
    0.25,
    0.5,
)
_TTFT_BUCKETS += (0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_TPOT_BUCKETS: tuple[float, ...] = tuple(
    ms / 1000 for ms in (*range(1, 11), 12, 14, 16, 18, 20, 25, 30, 40, 50, 75, 100, 150, 200, 300)
)
_TPOT_BUCKETS += (0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_E2E_BUCKETS = (
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
)
_STEP_BUCKETS = tuple(
    ms / 1000 for ms in (0.5, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50, 75, 100, 200, 500, 1000, 5000)
)
_TOKENS_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Metrics:
    """Counters and histograms that events feed; gauges are read from their owners when scraped.

    Parameters
    ----------
    model_name
        Label of every metric.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"tpserve_{name}", text, ["model_name", *labels], registry=self.registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            metric = Histogram(f"tpserve_{name}", text, ["model_name"], buckets=buckets, registry=self.registry)
            labelled: Histogram = metric.labels(model_name)
            return labelled

        self._model_name = model_name
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of accepted requests.").labels(model_name)
        self.generation_tokens = counter("generation_tokens", "Output tokens sent to clients.").labels(model_name)
        self._requests = counter("requests", "Choices ended, by reason.", ["finish_reason"])
        self._rejections = counter("request_rejections", "Requests not accepted, by reason.", ["reason"])
        self.rebuilds = counter("group_rebuilds", "Times that the TP group was rebuilt after a loss.").labels(
            model_name
        )
        self._ranks_lost = counter("ranks_lost", "Ranks that died, failed or missed their deadline.", ["rank"])
        self.ttft = histogram("time_to_first_token_seconds", "From acceptance to the first token.", _TTFT_BUCKETS)
        self.tpot = histogram(
            "request_time_per_output_token_seconds",
            "(last token - first token) / (tokens - 1), one value for each choice of two tokens or more.",
            _TPOT_BUCKETS,
        )
        self.e2e = histogram(
            "e2e_request_latency_seconds", "From acceptance to the last token of a choice.", _E2E_BUCKETS
        )
        self.step = histogram("step_seconds", "Wall time of one step on rank 0.", _STEP_BUCKETS)
        self.step_tokens = histogram("step_sampled_tokens", "Tokens sampled in one step.", _TOKENS_BUCKETS)
        self.grammar_mask_seconds = counter(
            "grammar_mask_seconds", "Rank 0's time on grammar masks, most of it while the forward pass runs."
        ).labels(model_name)
        self.request_prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS_BUCKETS)
        self.request_generation_tokens = histogram(
            "request_generation_tokens", "Output tokens of a choice.", _TOKENS_BUCKETS
        )
        for reason in ("stop", "length", "aborted", "failed"):
            self._requests.labels(model_name, reason)

    def count_finish(self, reason: str) -> None:
        """Count one ended choice."""
        self._requests.labels(self._model_name, reason).inc()

    def count_rejection(self, reason: str) -> None:
        """Count one request that was not accepted."""
        self._rejections.labels(self._model_name, reason).inc()

    def count_lost_rank(self, rank: int) -> None:
        """Count the loss of a rank."""
        self._ranks_lost.labels(self._model_name, str(rank)).inc()

    def text(self) -> str:
        """Return everything in Prometheus text format."""
        return generate_latest(self.registry).decode()


class EngineGauges(Protocol):
    """What the collector reads; the engine gives it."""

    def scheduler_stats(self) -> SchedulerStats:
        """Return the scheduler's gauges and counters."""

    def states(self) -> Iterable[tuple[str, bool]]:
        """Return every state's name and whether it is the present one."""

    def ranks(self) -> Sequence[RankState]:
        """Return what is known of the ranks; empty while the group is down."""


class EngineCollector(Collector):
    """Gauges of the scheduler and the ranks, read when scraped so that steps do not pay for them."""

    def __init__(self, model_name: str, source: EngineGauges) -> None:
        self._model_name = model_name
        self._source = source

    def collect(self) -> Iterable[Metric]:
        """Read the gauges."""
        stats = self._source.scheduler_stats()
        used = stats.num_held_pages / stats.num_pages
        yield self._gauge("num_requests_running", "Sequences in the batch.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Sequences that wait for a slot or pages.", stats.num_waiting)
        yield self._gauge("kv_cache_usage_ratio", "Share of KV pages that running sequences hold.", used)
        yield self._gauge("kv_pages", "KV pages of each rank.", stats.num_pages)
        yield self._gauge("kv_pages_evictable", "Pages kept for their prefix only.", stats.num_evictable_pages)
        yield self._counter("prefix_cache_query_tokens", "Prompt tokens looked up.", stats.num_prefix_query_tokens)
        yield self._counter("prefix_cache_hit_tokens", "Prompt tokens found.", stats.num_prefix_hit_tokens)
        yield self._counter("preemptions", "Sequences preempted for lack of pages.", stats.num_preemptions)
        yield self._counter("steps", "Steps planned.", stats.num_steps)
        status = GaugeMetricFamily("tpserve_engine_state", "1 for the engine's state.", labels=["model_name", "state"])
        for name, active in self._source.states():
            status.add_metric([self._model_name, name], float(active))
        yield status
        last = GaugeMetricFamily("tpserve_rank_last_step", "Latest step finished.", labels=["model_name", "rank"])
        step = GaugeMetricFamily("tpserve_rank_step_seconds", "Wall time of it.", labels=["model_name", "rank"])
        busy = GaugeMetricFamily(
            "tpserve_rank_collective_seconds",
            "Time inside collectives in the latest step, waiting included.",
            labels=["model_name", "rank"],
        )
        for rank in self._source.ranks():
            labels = [self._model_name, str(rank.rank)]
            last.add_metric(labels, rank.last_step)
            step.add_metric(labels, rank.step_us / 1e6)
            busy.add_metric(labels, rank.collective_us / 1e6)
        yield from (last, step, busy)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"tpserve_{name}", text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"tpserve_{name}", text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family
