"""Writes the dashboards beside it, one JSON file each. Run: python deploy/grafana/make_dashboards.py.

Expressions name metrics of `coordinator/metrics_catalogue.py` only; tests run every one of them against a real
Prometheus that scrapes the real server.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DataSourceRef, GridPos, VariableRefresh

FOLDER = Path(__file__).parent
RATE = "[$__rate_interval]"
MODEL = 'model_name=~"$model"'
_WIDTH, _HEIGHT, _PER_ROW = 8, 8, 3
_QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart."""

    title: str
    unit: str
    """Grafana's name of it."""
    queries: tuple[tuple[str, str], ...]
    """(expression, legend) pairs."""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard."""

    uid: str
    title: str
    panels: Sequence[Panel]


def rate(name: str, by: str = "", where: str = "") -> str:
    """Return the summed rate of a counter."""
    group = f" by ({by})" if by else ""
    return f"sum{group} (rate(tpserve_{name}{{{_where(where)}}}{RATE}))"


def gauge(name: str, by: str = "", where: str = "") -> str:
    """Return the sum of a gauge over replicas."""
    group = f" by ({by})" if by else ""
    return f"sum{group} (tpserve_{name}{{{_where(where)}}})"


def ratio(above: str, below: str) -> str:
    """Return a quotient of two rates."""
    return f"{above} / {below}"


def quantiles(name: str, by: str = "", where: str = "", legend: str = "") -> tuple[tuple[str, str], ...]:
    """Return the quantiles of a histogram."""
    labels = f"le, {by}" if by else "le"
    return tuple(
        (
            f"histogram_quantile({q}, sum by ({labels}) (rate(tpserve_{name}_bucket{{{_where(where)}}}{RATE})))",
            f"p{q * 100:g}{legend}",
        )
        for q in _QUANTILES
    )


def mean(name: str, by: str = "", where: str = "") -> str:
    """Return the mean of a histogram."""
    return ratio(rate(f"{name}_sum", by, where), rate(f"{name}_count", by, where))


def _where(more: str) -> str:
    return f"{MODEL},{more}" if more else MODEL


def _http(expression: str) -> str:
    """Return an expression on the gateway's own metrics, which know no model, as 0 where there is no series yet."""
    return f"{expression} or vector(0)"


OVERVIEW = Board(
    "tpserve-overview",
    "tpserve / overview",
    (
        Panel(
            "Requests",
            "short",
            ((gauge("num_requests_running"), "running"), (gauge("num_requests_waiting"), "waiting")),
            "Sequences in the batch, and those that wait for a slot or pages.",
        ),
        Panel("Output tokens", "suffix:tok/s", ((rate("generation_tokens_total"), "tokens"),)),
        Panel("Choices ended", "reqps", ((rate("request_success_total", "finished_reason"), "{{finished_reason}}"),)),
        Panel("Time to first token", "s", quantiles("time_to_first_token_seconds")),
        Panel("Time per output token", "s", quantiles("request_time_per_output_token_seconds")),
        Panel("End to end", "s", quantiles("e2e_request_latency_seconds")),
        Panel(
            "HTTP answers",
            "reqps",
            ((f"sum by (route, code) (rate(tpserve_http_requests_total{RATE}))", "{{route}} {{code}}"),),
        ),
        Panel("Requests refused", "reqps", ((rate("admission_rejections_total", "reason"), "{{reason}}"),)),
        Panel(
            "Streams broken off",
            "reqps",
            ((_http(f"sum by (code) (rate(tpserve_http_stream_failures_total{RATE}))"), "{{code}}"),),
            "By the code of the error; 499 is a client that left.",
        ),
        Panel(
            "Requests by API key",
            "reqps",
            (
                (_http(f"sum by (key) (rate(tpserve_key_requests_total{RATE}))"), "{{key}}"),
                (
                    _http(f"sum by (key, limit) (rate(tpserve_key_limited_requests_total{RATE}))"),
                    "{{key}}: limit of {{limit}}",
                ),
            ),
            "By the names in the key file; those over a limit of their key besides.",
        ),
        Panel(
            "Tokens by API key",
            "suffix:tok/s",
            (
                (_http(f"sum by (key) (rate(tpserve_key_prompt_tokens_total{RATE}))"), "{{key}}: prompt"),
                (_http(f"sum by (key) (rate(tpserve_key_generation_tokens_total{RATE}))"), "{{key}}: output"),
            ),
        ),
        Panel("KV cache in use", "percentunit", ((f"max(tpserve_kv_cache_usage_perc{{{MODEL}}})", "fullest replica"),)),
        Panel("Engine state", "short", ((gauge("engine_state", "state"), "{{state}}"),), "Replicas in each state."),
        Panel(
            "Lost ranks and rebuilds",
            "short",
            (
                (f"sum(increase(tpserve_ranks_lost_total{{{MODEL}}}[10m]))", "ranks lost in 10 min"),
                (f"sum(increase(tpserve_group_rebuilds_total{{{MODEL}}}[10m]))", "rebuilds in 10 min"),
            ),
        ),
    ),
)

LATENCY = Board(
    "tpserve-latency",
    "tpserve / latency",
    (
        Panel("Time to first token", "s", quantiles("time_to_first_token_seconds")),
        Panel("Time per output token", "s", quantiles("request_time_per_output_token_seconds"), "One value a choice."),
        Panel("Inter-token latency", "s", quantiles("inter_token_latency_seconds"), "Every gap."),
        Panel(
            "Output speed of one user",
            "suffix:tok/s",
            ((f"1 / ({mean('request_time_per_output_token_seconds')})", "1 / mean TPOT"),),
        ),
        Panel("End to end", "s", quantiles("e2e_request_latency_seconds")),
        Panel("Waiting for the first step", "s", quantiles("request_queue_time_seconds")),
        Panel("First step to first token", "s", quantiles("request_prefill_time_seconds")),
        Panel("First token to last", "s", quantiles("request_decode_time_seconds")),
        Panel("First step to last token", "s", quantiles("request_inference_time_seconds")),
        Panel("Prompt tokens", "short", quantiles("request_prompt_tokens")),
        Panel("Output tokens", "short", quantiles("request_generation_tokens")),
        Panel(
            "Requests ask for",
            "short",
            ((mean("request_params_max_tokens"), "mean max_tokens"), (mean("request_params_n"), "mean n")),
        ),
        Panel(
            "HTTP request duration, p99",
            "s",
            (
                (
                    "histogram_quantile(0.99, sum by (le, route) "
                    f"(rate(tpserve_http_request_duration_seconds_bucket{RATE})))",
                    "{{route}}",
                ),
            ),
        ),
        Panel("HTTP requests in flight", "short", (("sum by (route) (tpserve_http_requests_in_flight)", "{{route}}"),)),
    ),
)

SCHEDULER = Board(
    "tpserve-scheduler",
    "tpserve / scheduler and KV cache",
    (
        Panel("Running", "short", ((gauge("num_requests_running", "engine"), "replica {{engine}}"),)),
        Panel("Waiting", "short", ((gauge("num_requests_waiting_by_reason", "reason"), "{{reason}}"),)),
        Panel(
            "KV pages in use",
            "percentunit",
            ((f"tpserve_kv_cache_usage_perc{{{MODEL}}}", "replica {{engine}}"),),
        ),
        Panel(
            "KV pages",
            "short",
            ((gauge("kv_pages"), "all"), (gauge("kv_pages_evictable"), "kept for their prefix only")),
        ),
        Panel(
            "Prefix cache hit rate",
            "percentunit",
            ((ratio(rate("prefix_cache_hits_total"), rate("prefix_cache_queries_total")), "of prompt tokens"),),
        ),
        Panel(
            "Prompt tokens",
            "suffix:tok/s",
            (
                (rate("prompt_tokens_by_source_total", "source"), "{{source}}"),
                (rate("prompt_tokens_total"), "accepted"),
                (rate("prompt_tokens_cached_total"), "cached"),
            ),
        ),
        Panel("Preemptions", "ops", ((rate("num_preemptions_total"), "preemptions"),)),
        Panel("Steps", "ops", ((rate("steps_total"), "planned"),)),
        Panel("Tokens in a step", "short", quantiles("iteration_tokens")),
        Panel("Step time, decode", "s", quantiles("step_seconds", where='kind="decode"')),
        Panel("Step time, with prompts", "s", quantiles("step_seconds", where='kind="mixed"')),
        Panel("Host gap between steps", "s", quantiles("host_gap_seconds"), "The device waits for the host that long."),
        Panel(
            "Plans ahead of their step",
            "s",
            ((f"max by (engine) (tpserve_plan_lead_seconds{{{MODEL}}})", "engine {{engine}}"),),
            "Later plans take in who comes meanwhile; they are made earlier after a gap.",
        ),
        Panel(
            "Host gap, share of a step",
            "percentunit",
            ((ratio(rate("host_gap_seconds_sum"), rate("step_seconds_sum")), "gap / step"),),
            "At most 3 % is the aim.",
        ),
        Panel("Graph buckets used", "ops", ((rate("graph_bucket_steps_total", "bucket"), "{{bucket}}"),)),
        Panel(
            "Mean step time by bucket",
            "s",
            (
                (
                    ratio(rate("graph_bucket_seconds_total", "bucket"), rate("graph_bucket_steps_total", "bucket")),
                    "{{bucket}}",
                ),
            ),
        ),
        Panel(
            "Padding",
            "percentunit",
            ((ratio(rate("step_padding_tokens_total"), rate("iteration_tokens_sum")), "padded / real tokens"),),
        ),
        Panel(
            "Grammar masks, share of a step",
            "percentunit",
            ((ratio(rate("grammar_mask_seconds_total"), rate("step_seconds_sum")), "masks / step"),),
            "Most of it runs beside the forward pass.",
        ),
        Panel(
            "Cache configuration",
            "short",
            ((f"tpserve_cache_config_info{{{MODEL}}}", "{{num_gpu_blocks}} pages of {{block_size}} tokens"),),
        ),
    ),
)

SPECULATION = Board(
    "tpserve-speculation",
    "tpserve / speculation",
    (
        Panel("Drafts verified", "ops", ((rate("spec_decode_num_drafts_total"), "drafts"),)),
        Panel(
            "Draft tokens",
            "suffix:tok/s",
            (
                (rate("spec_decode_num_draft_tokens_total"), "drafted"),
                (rate("spec_decode_num_accepted_tokens_total"), "accepted"),
            ),
        ),
        Panel(
            "Accept rate",
            "percentunit",
            (
                (
                    ratio(rate("spec_decode_num_accepted_tokens_total"), rate("spec_decode_num_draft_tokens_total")),
                    "accepted / drafted",
                ),
            ),
            "Without a draft model there is nothing to divide.",
        ),
        Panel(
            "Mean accept length",
            "short",
            (
                (
                    "1 + " + ratio(rate("spec_decode_num_accepted_tokens_total"), rate("spec_decode_num_drafts_total")),
                    "tokens a draft, the bonus token counted",
                ),
            ),
        ),
        Panel(
            "Accepted by position",
            "ops",
            ((rate("spec_decode_num_accepted_tokens_per_pos_total", "position"), "position {{position}}"),),
        ),
        Panel(
            "Steps by draft length",
            "ops",
            ((rate("spec_decode_steps_total", "length"), "{{length}} draft tokens"),),
            "0 is plain decoding: with `auto`, where drafts do not pay.",
        ),
        Panel(
            "Sequences given up",
            "ops",
            ((rate("spec_decode_given_up_total"), "sequences"),),
            "With `auto` and an EAGLE-3 head on CPUs: keeping it ready for them cost more than it brought.",
        ),
        Panel("Step time, with drafts", "s", quantiles("step_seconds", where='kind="verify"')),
        Panel(
            "Time spent on drafting",
            "percentunit",
            (
                (
                    ratio(rate("spec_decode_draft_seconds_total"), rate("step_seconds_sum")),
                    "of rank 0's steps",
                ),
            ),
        ),
        Panel("Time per output token", "s", quantiles("request_time_per_output_token_seconds")),
    ),
)

COLLECTIVES = Board(
    "tpserve-collectives",
    "tpserve / collectives and GPUs",
    (
        Panel("Step time by rank, p50 to p99", "s", quantiles("rank_step_seconds", "rank", legend=" rank {{rank}}")),
        Panel(
            "Busy",
            "percentunit",
            ((rate("rank_step_seconds_sum", "engine, rank"), "replica {{engine}} rank {{rank}}"),),
            "Share of the time that each rank's device spends in steps.",
        ),
        Panel(
            "Output tokens per GPU",
            "suffix:tok/s",
            (
                (
                    ratio(rate("generation_tokens_total"), f"count(tpserve_rank_last_step{{{MODEL}}})"),
                    "tokens / rank",
                ),
            ),
        ),
        Panel(
            "Time in collectives, share of a step",
            "percentunit",
            (
                (
                    ratio(rate("collective_seconds_total", "rank"), rate("rank_step_seconds_sum", "rank")),
                    "rank {{rank}}",
                ),
            ),
            "Waiting for other ranks included. Not known inside captured graphs.",
        ),
        Panel(
            "Time of one collective",
            "s",
            (
                (
                    ratio(rate("collective_seconds_total", "kind"), rate("collective_calls_total", "kind")),
                    "{{kind}}",
                ),
            ),
        ),
        Panel("Bytes into collectives", "Bps", ((rate("collective_bytes_total", "kind, rank"), "{{kind}} {{rank}}"),)),
        Panel("Calls", "ops", ((rate("collective_calls_total", "kind"), "{{kind}}"),)),
        Panel(
            "Backend",
            "short",
            ((f"count by (backend) (tpserve_collectives_info{{{MODEL}}})", "{{backend}}"),),
            "nccl between GPUs of one host is slower than push: some GPUs cannot map each other's memory.",
        ),
        Panel(
            "Bandwidth inside collectives",
            "Bps",
            (
                (
                    ratio(rate("collective_bytes_total", "kind"), rate("collective_seconds_total", "kind")),
                    "{{kind}}",
                ),
            ),
        ),
        Panel(
            "Waited for, share of a step",
            "percentunit",
            (
                (
                    ratio(rate("straggler_wait_seconds_total", "rank"), rate("rank_step_seconds_sum", "rank")),
                    "rank {{rank}}",
                ),
            ),
            "How long the first rank in a collective waited for this one, which came last.",
        ),
        Panel("Steps as straggler", "ops", ((rate("straggler_steps_total", "rank"), "rank {{rank}}"),)),
        Panel(
            "Straggler",
            "percentunit",
            ((f"topk(1, {rate('straggler_wait_seconds_total', 'engine, rank')})", "replica {{engine}} rank {{rank}}"),),
            "The rank that is waited for most, in seconds a second.",
        ),
        Panel(
            "Behind the foremost rank",
            "short",
            (
                (
                    f"max by (engine) (tpserve_rank_last_step{{{MODEL}}}) - on (engine) group_right() "
                    f"tpserve_rank_last_step{{{MODEL}}}",
                    "replica {{engine}} rank {{rank}}",
                ),
            ),
            "In steps; grows for a rank that hangs.",
        ),
        Panel(
            "Ranks lost",
            "short",
            ((f"sum by (rank) (increase(tpserve_ranks_lost_total{{{MODEL}}}[10m]))", "rank {{rank}}"),),
        ),
    ),
)


def _router_rate(name: str, by: str = "", where: str = "") -> str:
    """Return the summed rate of a router's counter; routers know no model."""
    group = f" by ({by})" if by else ""
    return f"sum{group} (rate(tpserve_router_{name}{{{where}}}{RATE}))"


def _router_quantiles(name: str) -> tuple[tuple[str, str], ...]:
    """Return the quantiles of a router's histogram."""
    buckets = f"sum by (le) (rate(tpserve_router_{name}_bucket{RATE}))"
    return tuple((f"histogram_quantile({q}, {buckets})", f"p{q * 100:g}") for q in _QUANTILES)


ROUTER = Board(
    "tpserve-router",
    "tpserve / router",
    (
        Panel("Answers", "reqps", ((_router_rate("requests_total", "route, code"), "{{route}} {{code}}"),)),
        Panel("Request duration", "s", _router_quantiles("request_duration_seconds"), "To the end of the answer."),
        Panel("Waiting for a replica with room", "s", _router_quantiles("queue_seconds")),
        Panel(
            "Requests",
            "short",
            (("sum (tpserve_router_backend_in_flight)", "at replicas"), ("sum (tpserve_router_queued)", "waiting")),
        ),
        Panel(
            "Refused",
            "reqps",
            ((_router_rate("rejections_total", "reason"), "{{reason}}"),),
            "With 429 or 503: no replica took them.",
        ),
        Panel(
            "Replicas that are ready",
            "short",
            (("min by (backend) (tpserve_router_backend_ready)", "{{backend}}"),),
            "0 if any router finds it not ready.",
        ),
        Panel(
            "In flight by replica", "short", (("sum by (backend) (tpserve_router_backend_in_flight)", "{{backend}}"),)
        ),
        Panel(
            "Requests by replica",
            "reqps",
            ((_router_rate("backend_requests_total", "backend, outcome"), "{{backend}} {{outcome}}"),),
            "lost: the replica broke off; left: the client did.",
        ),
        Panel(
            "Circuit breakers",
            "short",
            (('max by (backend, state) (tpserve_router_breaker_state{state!="closed"})', "{{backend}} {{state}}"),),
            "1 while a replica is left alone (open), or tried again (half_open).",
        ),
        Panel(
            "Breakers opened",
            "short",
            (
                (
                    'sum by (backend) (increase(tpserve_router_breaker_changes_total{state="open"}[10m]))',
                    "{{backend}} in 10 min",
                ),
            ),
        ),
        Panel(
            "Streams whose replica was lost",
            "short",
            (("sum by (outcome) (increase(tpserve_router_moves_total[10m]))", "{{outcome}} in 10 min"),),
            "moved: another replica went on, and the client saw a pause; failed: it saw an error.",
        ),
        Panel(
            "Prompts sent where their beginning was",
            "percentunit",
            ((ratio(_router_rate("matched_blocks_total"), _router_rate("prompt_blocks_total")), "of prompt blocks"),),
            "By the router's estimate; the scheduler board has the hits.",
        ),
    ),
)

BOARDS = (OVERVIEW, LATENCY, SCHEDULER, SPECULATION, COLLECTIVES, ROUTER)


def render(board: Board) -> str:
    """Return a dashboard as JSON."""
    source = DataSourceRef(type_val="prometheus", uid="$datasource")
    built = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .tags(["tpserve"])
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .readonly()
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    if any(MODEL in expression for panel in board.panels for expression, _ in panel.queries):
        built = built.with_variable(
            dashboard.QueryVariable("model")
            .label("Model")
            .datasource(source)
            .query("label_values(tpserve_num_requests_running, model_name)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    legend = legend.show_legend(True)
    for number, panel in enumerate(board.panels):
        row, column = divmod(number, _PER_ROW)
        position = GridPos(h=_HEIGHT, w=_WIDTH, x=column * _WIDTH, y=row * _HEIGHT)
        chart = (
            timeseries.Panel()
            .id(number + 1)
            .title(panel.title)
            .description(panel.text)
            .unit(panel.unit)
            .min(0)
            .datasource(source)
            .grid_pos(position)
            .legend(legend)
        )
        for letter, (expression, name) in zip("ABCDEFG", panel.queries, strict=False):
            query = prometheus.Dataquery().expr(expression).legend_format(name).ref_id(letter)
            chart = chart.with_target(query.datasource(source))
        built = built.with_panel(chart)
    return JSONEncoder(sort_keys=True, indent=1).encode(built.build()) + "\n"


def files() -> dict[str, str]:
    """Return every file's content by name."""
    found = {f"{board.uid}.json": render(board) for board in BOARDS}
    for text in found.values():
        json.loads(text)
    return found


if __name__ == "__main__":
    for name, text in files().items():
        (FOLDER / name).write_text(text)
