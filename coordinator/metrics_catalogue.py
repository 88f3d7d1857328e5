"""Every metric that a replica or a router exports, in one list each: its name, what it counts, and its name in vLLM.

Coordinator, gateway and router make their metrics from it; so do docs/metrics.md, the recording rules and the tests of
dashboards. Owns names, labels and buckets. Knows nothing of how a value comes about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PREFIX = "tpserve_"
"""Underscores only: a scrape that negotiates OpenMetrics would turn the colon of `vllm:` into one."""
VLLM_PREFIX = "vllm:"
ENGINE_LABELS = ("model_name", "engine")
"""Of each of the coordinator's metrics; `engine` is the number of the replica."""

# vLLM's buckets, so that its dashboards fit, made finer where a fast engine's values fall: 1 to 20 ms for one token.
TTFT_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TPOT_BUCKETS = (
    *(0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.007, 0.008, 0.009, 0.01, 0.012, 0.014, 0.016, 0.018, 0.02, 0.025),
    *(0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
LATENCY_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_BUCKETS = tuple(
    ms / 1000 for ms in (0.5, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50, 75, 100, 200, 500, 1000, 5000)
)
GAP_BUCKETS = tuple(us / 1e6 for us in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 50_000, 500_000))
ITERATION_BUCKETS = (1.0, *(float(2**power) for power in range(3, 15)))
TOKENS_BUCKETS = (
    *(1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0),
    *(50_000.0, 100_000.0),
)
CHOICES_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)
HTTP_BUCKETS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0),
)

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric."""

    name: str
    """Without prefix, and without the `_total` that a counter's sample has."""
    kind: Kind
    text: str
    """What HELP says."""
    labels: tuple[str, ...] = ()
    """Besides `ENGINE_LABELS`, which only the coordinator's metrics have."""
    buckets: tuple[float, ...] = ()
    vllm: str | None = None
    """vLLM's name for it without prefix; None where vLLM has none."""
    source: Literal["coordinator", "gateway", "router"] = "coordinator"

    @property
    def full_name(self) -> str:
        """The family's name."""
        return PREFIX + self.name

    @property
    def all_labels(self) -> tuple[str, ...]:
        """Label names in order, except a histogram's `le`."""
        return (*ENGINE_LABELS, *self.labels) if self.source == "coordinator" else self.labels

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What follows the family's name in the names of its samples."""
        return {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}[self.kind]


def _same(kind: Kind, name: str, text: str, labels: Sequence[str] = (), buckets: tuple[float, ...] = ()) -> MetricSpec:
    """Return a metric that vLLM knows by the same name."""
    return MetricSpec(name, kind, text, tuple(labels), buckets, vllm=name)


def _own(kind: Kind, name: str, text: str, labels: Sequence[str] = (), buckets: tuple[float, ...] = ()) -> MetricSpec:
    return MetricSpec(name, kind, text, tuple(labels), buckets)


def _http(kind: Kind, name: str, text: str, labels: Sequence[str] = (), buckets: tuple[float, ...] = ()) -> MetricSpec:
    return MetricSpec(name, kind, text, tuple(labels), buckets, source="gateway")


CATALOGUE: tuple[MetricSpec, ...] = (
    # ---- requests
    _same("gauge", "num_requests_running", "Sequences in the batch."),
    _same("gauge", "num_requests_waiting", "Sequences that wait for a slot or for pages."),
    _same(
        "gauge",
        "num_requests_waiting_by_reason",
        "Of those, for room (capacity), or for the prompt of another choice of their request (deferred).",
        ["reason"],
    ),
    _same("counter", "request_success", "Choices ended, by reason: stop, length, abort, error.", ["finished_reason"]),
    _same(
        "counter",
        "admission_rejections",
        "Requests not accepted, by reason: queue_full, invalid, unavailable.",
        ["reason"],
    ),
    _same("counter", "prompt_tokens", "Prompt tokens of accepted requests."),
    _same("counter", "prompt_tokens_cached", "Prompt tokens that earlier requests had left in the prefix cache."),
    _same(
        "counter",
        "prompt_tokens_by_source",
        "Prompt tokens of choices that gave a token: computed here (local_compute) or cached (local_cache_hit).",
        ["source"],
    ),
    _same("counter", "generation_tokens", "Output tokens sent to clients."),
    # ---- latencies
    _same("histogram", "time_to_first_token_seconds", "From acceptance to the first token.", (), TTFT_BUCKETS),
    _same(
        "histogram",
        "inter_token_latency_seconds",
        "Between two tokens of one choice as the coordinator sends them.",
        (),
        TPOT_BUCKETS,
    ),
    _same(
        "histogram",
        "request_time_per_output_token_seconds",
        "(last token - first token) / (tokens - 1), one value for each choice of two tokens or more.",
        (),
        TPOT_BUCKETS,
    ),
    _same(
        "histogram",
        "e2e_request_latency_seconds",
        "From acceptance to the last token of a choice.",
        (),
        LATENCY_BUCKETS,
    ),
    _same("histogram", "request_queue_time_seconds", "From acceptance to the first step.", (), LATENCY_BUCKETS),
    _same(
        "histogram",
        "request_prefill_time_seconds",
        "From a choice's first step to its first token.",
        (),
        LATENCY_BUCKETS,
    ),
    _same(
        "histogram",
        "request_decode_time_seconds",
        "From a choice's first token to its last.",
        (),
        LATENCY_BUCKETS,
    ),
    _same(
        "histogram",
        "request_inference_time_seconds",
        "From a choice's first step to its last token.",
        (),
        LATENCY_BUCKETS,
    ),
    _same("histogram", "request_prompt_tokens", "Prompt tokens of a request.", (), TOKENS_BUCKETS),
    _same("histogram", "request_generation_tokens", "Output tokens of a choice.", (), TOKENS_BUCKETS),
    _same("histogram", "request_params_n", "Choices that a request asks for.", (), CHOICES_BUCKETS),
    _same("histogram", "request_params_max_tokens", "Most output tokens that a request allows.", (), TOKENS_BUCKETS),
    # ---- scheduler and KV cache
    _same("gauge", "kv_cache_usage_perc", "Share of KV pages that running sequences hold, 0 to 1."),
    _same(
        "gauge",
        "cache_config_info",
        "1; the labels say the KV cache's page size in tokens, its pages, whether prefixes are kept, and its type.",
        ["block_size", "num_gpu_blocks", "enable_prefix_caching", "cache_dtype"],
    ),
    _own("gauge", "kv_pages", "KV pages of each rank."),
    _own("gauge", "kv_pages_evictable", "Pages kept for their prefix only."),
    _same("counter", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    _same("counter", "prefix_cache_hits", "Prompt tokens found computed."),
    _same("counter", "num_preemptions", "Sequences preempted for lack of pages."),
    # ---- steps
    _own("counter", "steps", "Steps planned."),
    _own(
        "histogram",
        "step_seconds",
        "Wall time of one step on rank 0: decode has one token for each sequence, verify drafts, mixed prompts too.",
        ["kind"],
        STEP_BUCKETS,
    ),
    MetricSpec(
        "iteration_tokens",
        "histogram",
        "Tokens run in one step.",
        buckets=ITERATION_BUCKETS,
        vllm="iteration_tokens_total",  # a histogram of that name fails `promtool check metrics`
    ),
    _own(
        "histogram",
        "host_gap_seconds",
        "Between the end of a step and the begin of the next on rank 0, while there was work: the host was late.",
        (),
        GAP_BUCKETS,
    ),
    _own(
        "gauge",
        "plan_lead_seconds",
        "Before a step's expected end, when the next one is planned; longer after a gap. 0: plans wait for nothing.",
    ),
    _own(
        "counter",
        "graph_bucket_steps",
        "Steps by the tokens of the captured graph they ran in; exact: without a graph, at their own size.",
        ["bucket"],
    ),
    _own("counter", "graph_bucket_seconds", "Wall time of these steps on rank 0.", ["bucket"]),
    _own("counter", "step_padding_tokens", "Tokens run for nothing, to fill a bucket."),
    _own("counter", "grammar_mask_seconds", "Rank 0's time on grammar masks, most of it while the forward pass runs."),
    # ---- ranks and collectives
    _own("histogram", "rank_step_seconds", "Wall time of one step on each rank.", ["rank"], STEP_BUCKETS),
    _own("gauge", "rank_last_step", "Latest step that a rank has finished.", ["rank"]),
    _own(
        "counter",
        "collective_seconds",
        "Time inside collectives, waiting for other ranks included. Not known inside captured graphs.",
        ["rank", "kind"],
    ),
    _own("counter", "collective_bytes", "Bytes that a rank put into collectives.", ["rank", "kind"]),
    _own("counter", "collective_calls", "Calls of collectives.", ["rank", "kind"]),
    _own(
        "gauge",
        "collectives_info",
        "1; the label says by which ranks exchange activations: push (peer memory) or nccl between GPUs, shared_memory "
        "or tcp between CPUs, none for one rank.",
        ["backend"],
    ),
    _own(
        "counter",
        "straggler_steps",
        "Steps for whose collectives this rank came last while another waited a tenth of the step or longer.",
        ["rank"],
    ),
    _own(
        "counter",
        "straggler_wait_seconds",
        "Time that the first rank in collectives waited for this one, which came last.",
        ["rank"],
    ),
    _own("counter", "ranks_lost", "Ranks that died, failed or missed their deadline.", ["rank"]),
    _own("counter", "group_rebuilds", "Times that the TP group was rebuilt after a loss."),
    _own("gauge", "engine_state", "1 for the engine's present state, 0 for the others.", ["state"]),
    # ---- speculation: these stand at zero where nothing is drafted
    _same("counter", "spec_decode_num_drafts", "Drafts verified."),
    _same("counter", "spec_decode_num_draft_tokens", "Tokens in them."),
    _same("counter", "spec_decode_num_accepted_tokens", "Of those, accepted."),
    _same(
        "counter",
        "spec_decode_num_accepted_tokens_per_pos",
        "Accepted, by position in the draft.",
        ["position"],
    ),
    _own("counter", "spec_decode_draft_seconds", "Of rank 0's steps, the time spent on drafting."),
    _own(
        "counter",
        "spec_decode_steps",
        "Steps by the most draft tokens that they might verify for a sequence; 0 is plain decoding.",
        ["length"],
    ),
    _own("counter", "spec_decode_given_up", "Sequences that got no more drafts, since these pay for none at present."),
    # ---- the gateway
    _http("counter", "http_requests", "HTTP requests answered, by route and status code.", ["route", "code"]),
    _http("gauge", "http_requests_in_flight", "HTTP requests being answered.", ["route"]),
    _http(
        "histogram",
        "http_request_duration_seconds",
        "Time from the request's headers to the end of the answer.",
        ["route"],
        HTTP_BUCKETS,
    ),
    _http(
        "counter",
        "http_stream_failures",
        "Streams that ended before their last token, by the code of the error; 499 is a client that left.",
        ["code"],
    ),
    _http("counter", "key_requests", "Requests by the name of their API key, refused ones among them.", ["key"]),
    _http(
        "counter",
        "key_limited_requests",
        "Of those, refused by a limit of the key: requests, tokens or parallel.",
        ["key", "limit"],
    ),
    _http("counter", "key_prompt_tokens", "Prompt tokens by the name of the API key.", ["key"]),
    _http("counter", "key_generation_tokens", "Output tokens by the name of the API key.", ["key"]),
    _http("gauge", "gateway_engine_up", "1 if the coordinator gave its metrics for this scrape."),
)

BY_NAME = {spec.name: spec for spec in CATALOGUE}


def _router(
    kind: Kind, name: str, text: str, labels: Sequence[str] = (), buckets: tuple[float, ...] = ()
) -> MetricSpec:
    return MetricSpec(f"router_{name}", kind, text, tuple(labels), buckets, source="router")


ROUTER_CATALOGUE: tuple[MetricSpec, ...] = (
    _router("counter", "requests", "Requests answered, by route and status code.", ["route", "code"]),
    _router(
        "histogram",
        "request_duration_seconds",
        "Time from the request's headers to the end of the answer.",
        ["route"],
        HTTP_BUCKETS,
    ),
    _router("histogram", "queue_seconds", "Time until a replica with room was found.", (), HTTP_BUCKETS),
    _router("gauge", "queued", "Requests that wait for a replica with room."),
    _router(
        "counter",
        "rejections",
        "Requests that no replica took, by reason: queue_full, queue_timeout, no_backend.",
        ["reason"],
    ),
    _router("gauge", "backend_ready", "1 if the replica's /health/ready passes.", ["backend"]),
    _router("gauge", "backend_in_flight", "Requests at the replica.", ["backend"]),
    _router(
        "counter",
        "backend_requests",
        "Requests sent to the replica, by what became of them: answered, refused, lost, or their client has left.",
        ["backend", "outcome"],
    ),
    _router("gauge", "breaker_state", "1 for the breaker's present state, 0 for the others.", ["backend", "state"]),
    _router("counter", "breaker_changes", "Times that the breaker came into a state.", ["backend", "state"]),
    _router("counter", "moves", "Streams whose replica was lost: moved to another one, or failed.", ["outcome"]),
    _router("counter", "prompt_blocks", "Blocks of 128 characters of the prompts that were sent."),
    _router("counter", "matched_blocks", "Of those, that the chosen replica had seen, by the router's estimate."),
)
"""Of `tpserve router`, and of `tpserve serve --replicas`."""

ROUTER_BY_NAME = {spec.name: spec for spec in ROUTER_CATALOGUE}


def sample_names(catalogue: Sequence[MetricSpec] = CATALOGUE) -> frozenset[str]:
    """Return the name of every sample that a scrape can hold, of a replica if nothing else is said."""
    return frozenset(spec.full_name + suffix for spec in catalogue for suffix in spec.suffixes)
