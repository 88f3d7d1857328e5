"""The coordinator's metrics: what events feed, and what is read from its owner when scraped.

Names, labels and buckets are the catalogue's. Everything here runs on the event loop's thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, Protocol

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.samples import Sample

from tpserve.coordinator.client import RankState
from tpserve.coordinator.metric_values import CounterFamily, Histogram, HistogramFamily, counter_metric, gauge_metric
from tpserve.coordinator.metrics_catalogue import BY_NAME, CATALOGUE, VLLM_PREFIX, MetricSpec
from tpserve.coordinator.scheduler_stats import SchedulerStats
from tpserve.proto.messages import StepResult

Compat = Literal["none", "vllm"]
"""Whether a scrape also holds the metrics that vLLM has, under vLLM's names."""

STRAGGLER_SHARE = 0.1
"""Of a step: a rank for which another waits longer is a straggler."""
_FINISHED_REASONS = {"stop": "stop", "length": "length", "aborted": "abort", "failed": "error"}
"""Ours, and vLLM's word for it, which the label has."""


class EngineGauges(Protocol):
    """What is read when scraped; the engine gives it."""

    def scheduler_stats(self) -> SchedulerStats:
        """Return the scheduler's gauges and counters."""

    def states(self) -> Iterable[tuple[str, bool]]:
        """Return every state's name and whether it is the present one."""

    def collectives(self) -> str:
        """Return by which the ranks exchange activations."""

    def ranks(self) -> Sequence[RankState]:
        """Return what is known of the ranks; empty while the group is down."""

    def plan_lead_s(self) -> float:
        """Return the time before a step's expected end, when the next one is planned; 0 if plans wait for nothing."""


class Metrics:
    """Counters and histograms that events feed.

    Parameters
    ----------
    model_name, engine
        Labels of every metric: the served model's name and the replica's number.
    cache_dtype
        Of the KV pages.
    compat
        `vllm` adds vLLM's metrics under vLLM's names, which have a colon.
    """

    def __init__(
        self, model_name: str, engine: str = "0", cache_dtype: str = "float32", compat: Compat = "none"
    ) -> None:
        self._base = (model_name, engine)
        self._cache_dtype = cache_dtype
        self._compat = compat
        self._source: EngineGauges | None = None
        self._counters: dict[str, CounterFamily] = {}
        self._histograms: dict[str, HistogramFamily] = {}
        for spec in CATALOGUE:
            if spec.source != "coordinator" or spec.name in _SCRAPED:
                continue
            if spec.kind == "histogram":
                self._histograms[spec.name] = HistogramFamily(spec, self._base)
            else:
                self._counters[spec.name] = CounterFamily(spec, self._base)
        self.prompt_tokens = self._counters["prompt_tokens"]
        self.prompt_tokens_cached = self._counters["prompt_tokens_cached"]
        self.generation_tokens = self._counters["generation_tokens"]
        self.grammar_mask_seconds = self._counters["grammar_mask_seconds"]
        self.rebuilds = self._counters["group_rebuilds"]
        self.ttft = self._histogram("time_to_first_token_seconds")
        self.itl = self._histogram("inter_token_latency_seconds")
        self.tpot = self._histogram("request_time_per_output_token_seconds")
        self.e2e = self._histogram("e2e_request_latency_seconds")
        self.queue_time = self._histogram("request_queue_time_seconds")
        self.prefill_time = self._histogram("request_prefill_time_seconds")
        self.decode_time = self._histogram("request_decode_time_seconds")
        self.inference_time = self._histogram("request_inference_time_seconds")
        self.request_prompt_tokens = self._histogram("request_prompt_tokens")
        self.request_generation_tokens = self._histogram("request_generation_tokens")
        self.request_n = self._histogram("request_params_n")
        self.request_max_tokens = self._histogram("request_params_max_tokens")
        self.iteration_tokens = self._histogram("iteration_tokens")
        self.host_gap = self._histogram("host_gap_seconds")
        self._step_kinds = {kind: self._histogram("step_seconds", kind) for kind in ("decode", "verify", "mixed")}
        self._rank_names: Sequence[str] = ()
        self._rank_steps: dict[int, Histogram] = {}
        # Counters without labels stand at zero from the start, and so do those whose labels are known.
        for name, counter in self._counters.items():
            if not BY_NAME[name].labels:
                counter.inc(0)
        for reason in _FINISHED_REASONS.values():
            self._counters["request_success"].inc(0, reason)
        for reason in ("queue_full", "invalid", "unavailable"):
            self._counters["admission_rejections"].inc(0, reason)
        for source in ("local_compute", "local_cache_hit"):
            self._counters["prompt_tokens_by_source"].inc(0, source)
        self._counters["spec_decode_num_accepted_tokens_per_pos"].inc(0, "0")
        self._counters["spec_decode_steps"].inc(0, "0")

    def _histogram(self, name: str, *labels: str) -> Histogram:
        return self._histograms[name].labels(*labels)

    # ---- events

    def count_finish(self, reason: str) -> None:
        """Count one ended choice: `stop`, `length`, `aborted` or `failed`."""
        self._counters["request_success"].inc(1, _FINISHED_REASONS[reason])

    def count_rejection(self, reason: str) -> None:
        """Count one request that was not accepted."""
        self._counters["admission_rejections"].inc(1, reason)

    def count_lost_rank(self, name: str) -> None:
        """Count the loss of a rank."""
        self._counters["ranks_lost"].inc(1, name)

    def count_prompt(self, num_tokens: int, num_cached: int) -> None:
        """Count where the prompt of a choice that has started to answer came from."""
        sources = self._counters["prompt_tokens_by_source"]
        sources.inc(num_cached, "local_cache_hit")
        sources.inc(num_tokens - num_cached, "local_compute")
        self.prompt_tokens_cached.inc(num_cached)

    def make_ranks(self, names: Sequence[str]) -> None:
        """Make the metrics of each rank appear, at zero; names are by rank."""
        self._rank_names = tuple(names)
        for rank, label in enumerate(names):
            self._rank_steps[rank] = self._histogram("rank_step_seconds", label)
            for name in ("straggler_steps", "straggler_wait_seconds", "ranks_lost"):
                self._counters[name].inc(0, label)

    def observe_rank(self, result: StepResult) -> None:
        """Take in what one rank says of one step that ran tokens."""
        rank = self._rank_names[result.rank]
        self._rank_steps[result.rank].observe(result.step_us / 1e6)
        for use in result.collectives:
            self._counters["collective_seconds"].inc(use.busy_us / 1e6, rank, use.kind)
            self._counters["collective_bytes"].inc(use.num_bytes, rank, use.kind)
            self._counters["collective_calls"].inc(use.num_calls, rank, use.kind)

    def observe_step(self, result: StepResult, gap_us: int | None) -> None:
        """Take in rank 0's result of a step that ran tokens.

        Parameters
        ----------
        gap_us
            Since the end of the step before; None if there was nothing to run meanwhile.
        """
        step_s = result.step_us / 1e6
        num_drafted = sum(result.drafted)
        kind = "verify" if num_drafted else "decode"
        if result.num_tokens > len(result.slots) + num_drafted:
            kind = "mixed"
        self._step_kinds[kind].observe(step_s)
        if num_drafted:
            self._count_drafts(result, num_drafted)
        self.iteration_tokens.observe(result.num_tokens)
        bucket = str(result.bucket_tokens) if result.bucket_tokens else "exact"
        self._counters["graph_bucket_steps"].inc(1, bucket)
        self._counters["graph_bucket_seconds"].inc(step_s, bucket)
        if result.bucket_tokens:
            self._counters["step_padding_tokens"].inc(result.bucket_tokens - result.num_tokens)
        if gap_us is not None:
            self.host_gap.observe(gap_us / 1e6)

    def _count_drafts(self, result: StepResult, num_drafted: int) -> None:
        accepted = Counter(count - 1 for count, drafted in zip(result.counts, result.drafted, strict=True) if drafted)
        self._counters["spec_decode_num_drafts"].inc(accepted.total())
        self._counters["spec_decode_num_draft_tokens"].inc(num_drafted)
        self._counters["spec_decode_num_accepted_tokens"].inc(sum(num * count for num, count in accepted.items()))
        self._counters["spec_decode_draft_seconds"].inc(result.draft_us / 1e6)
        by_position = self._counters["spec_decode_num_accepted_tokens_per_pos"]
        for position in range(max(accepted)):
            by_position.inc(sum(count for num, count in accepted.items() if num > position), str(position))

    def count_drafting(self, num_draft_tokens: int, num_given_up: int) -> None:
        """Count a plan by the draft tokens that it asks for, and who gets none any more; where there is a proposer."""
        self._counters["spec_decode_steps"].inc(1, str(num_draft_tokens))
        self._counters["spec_decode_given_up"].inc(num_given_up)

    def observe_group(self, results: Sequence[StepResult]) -> None:
        """Compare the ranks in a step that all have finished.

        In a collective all wait for the last to come, so that one has spent the least time there.
        """
        times = [result.collective_us for result in results]
        waited_us = max(times) - min(times)
        if waited_us:
            last = results[times.index(min(times))]
            self._counters["straggler_wait_seconds"].inc(waited_us / 1e6, str(last.rank))
            if waited_us > STRAGGLER_SHARE * last.step_us:
                self._counters["straggler_steps"].inc(1, str(last.rank))

    # ---- scraping

    def read_from(self, source: EngineGauges) -> None:
        """Say where gauges are read when scraped, so that steps do not pay for them."""
        self._source = source

    def collect(self) -> Iterator[Metric]:
        """Return every metric, in the catalogue's order; the client library calls this."""
        scraped = {} if self._source is None else _read(self._source, self._cache_dtype)
        for spec in CATALOGUE:
            if spec.name in scraped:
                make = counter_metric if spec.kind == "counter" else gauge_metric
                yield make(spec, self._base, scraped[spec.name])
            elif spec.name in self._histograms:
                yield from self._histograms[spec.name].collect()
            elif spec.name in self._counters:
                yield from self._counters[spec.name].collect()

    def text(self) -> str:
        """Return everything in Prometheus text format."""
        found = generate_latest(self).decode()
        if self._compat == "vllm":
            found += generate_latest(_VllmNames(self)).decode()
        return found


class _VllmNames:
    """The metrics that vLLM has, under its names."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        for metric in self._metrics.collect():
            spec = _by_family(metric.name)
            if spec.vllm is None:
                continue
            name = VLLM_PREFIX + spec.vllm
            renamed = Metric(name, metric.documentation, metric.type)
            renamed.samples = [
                Sample(name + sample.name.removeprefix(spec.full_name), sample.labels, sample.value)
                for sample in metric.samples
            ]
            yield renamed


def _by_family(name: str) -> MetricSpec:
    return BY_NAME[name.removeprefix("tpserve_")]


_SCRAPED = frozenset(
    {
        *("num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason", "kv_cache_usage_perc"),
        *("cache_config_info", "kv_pages", "kv_pages_evictable", "prefix_cache_queries", "prefix_cache_hits"),
        *("num_preemptions", "steps", "engine_state", "rank_last_step", "collectives_info"),
        "plan_lead_seconds",
    }
)
"""Read from the engine."""


def _read(source: EngineGauges, cache_dtype: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Return what is read when scraped: by name, by the labels' values."""
    stats = source.scheduler_stats()
    cache = (str(stats.page_size), str(stats.num_pages), str(stats.has_prefix_cache), cache_dtype)
    found: dict[str, dict[tuple[str, ...], float]] = {
        "num_requests_running": {(): stats.num_running},
        "num_requests_waiting": {(): stats.num_waiting},
        "num_requests_waiting_by_reason": {
            ("capacity",): stats.num_waiting - stats.num_deferred,
            ("deferred",): stats.num_deferred,
        },
        "kv_cache_usage_perc": {(): stats.num_held_pages / stats.num_pages},
        "cache_config_info": {cache: 1},
        "kv_pages": {(): stats.num_pages},
        "kv_pages_evictable": {(): stats.num_evictable_pages},
        "prefix_cache_queries": {(): stats.num_prefix_query_tokens},
        "prefix_cache_hits": {(): stats.num_prefix_hit_tokens},
        "num_preemptions": {(): stats.num_preemptions},
        "steps": {(): stats.num_steps},
        "engine_state": {(name,): float(active) for name, active in source.states()},
        "collectives_info": {(source.collectives(),): 1},
        "rank_last_step": {(rank.name,): rank.last_step for rank in source.ranks()},
        "plan_lead_seconds": {(): source.plan_lead_s()},
    }
    assert found.keys() == _SCRAPED
    return found
