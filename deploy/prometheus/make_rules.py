"""Writes rules.yaml beside it: recording rules, vLLM's names among them, and alerts.

Run: python deploy/prometheus/make_rules.py. Metric names come from `coordinator/metrics_catalogue.py`; the tests run
every expression against a real Prometheus, and rules_test.yaml says when alerts fire.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tpserve.coordinator.metrics_catalogue import CATALOGUE, VLLM_PREFIX

TARGET = Path(__file__).with_name("rules.yaml")
_HEAD = "# Made by make_rules.py; change it there.\n"
_BY = "model_name, engine"
_OLD_VLLM = {
    "gpu_cache_usage_perc": "kv_cache_usage_perc",
    "gpu_prefix_cache_hits_total": "prefix_cache_hits_total",
    "gpu_prefix_cache_queries_total": "prefix_cache_queries_total",
}
"""Names that vLLM itself has dropped, and that routers and boards still ask for."""

Rule = dict[str, Any]


def _vllm_rules() -> list[Rule]:
    """Record our metrics under vLLM's names. Not for targets that export these themselves (--metrics-compat vllm)."""
    rules: list[Rule] = []
    for spec in CATALOGUE:
        if spec.vllm is not None:
            for suffix in spec.suffixes:
                rules.append({"record": VLLM_PREFIX + spec.vllm + suffix, "expr": spec.full_name + suffix})
    rules += [{"record": VLLM_PREFIX + old, "expr": f"tpserve_{new}"} for old, new in _OLD_VLLM.items()]
    return rules


def _quantile(name: str, short: str, percent: int) -> Rule:
    expr = f"histogram_quantile({percent / 100:g}, sum by (le, {_BY}) (rate(tpserve_{name}_bucket[5m])))"
    return {"record": f"tpserve:{short}_seconds:p{percent}", "expr": expr}


def _own_rules() -> list[Rule]:
    latencies = {
        "time_to_first_token_seconds": "ttft",
        "request_time_per_output_token_seconds": "tpot",
        "inter_token_latency_seconds": "itl",
        "e2e_request_latency_seconds": "e2e",
    }
    rules = [_quantile(name, short, percent) for name, short in latencies.items() for percent in (50, 90, 99)]

    def share(above: str, below: str) -> str:
        return f"sum by ({_BY}) (rate({above}[5m])) / sum by ({_BY}) (rate({below}[5m]))"

    shares = {
        "tpserve:host_gap:ratio": ("tpserve_host_gap_seconds_sum", "tpserve_step_seconds_sum"),
        "tpserve:prefix_cache_hit:ratio": ("tpserve_prefix_cache_hits_total", "tpserve_prefix_cache_queries_total"),
        "tpserve:collective_time:ratio": ("tpserve_collective_seconds_total", "tpserve_rank_step_seconds_sum"),
    }
    rules += [{"record": name, "expr": share(*pair)} for name, pair in shares.items()]
    rules.append(
        {
            "record": "tpserve:generation_tokens:rate1m",
            "expr": f"sum by ({_BY}) (rate(tpserve_generation_tokens_total[1m]))",
        }
    )
    return rules


def _alert(name: str, expr: str, wait: str, severity: str, summary: str, description: str) -> Rule:
    return {
        "alert": name,
        "expr": expr,
        "for": wait,
        "labels": {"severity": severity},
        "annotations": {"summary": summary, "description": description},
    }


def _alerts() -> list[Rule]:
    who = "{{ $labels.model_name }}, replica {{ $labels.engine }}"
    return [
        _alert(
            "TpserveNotReady",
            f'max by ({_BY}) (tpserve_engine_state{{state="ready"}}) == 0',
            "2m",
            "critical",
            f"{who}: the engine is not ready",
            "For two minutes it has been starting, rebuilding, draining, stalled or dead; /health says which and why.",
        ),
        _alert(
            "TpserveStalled",
            f'max by ({_BY}) (tpserve_engine_state{{state="stalled"}}) == 1',
            "30s",
            "critical",
            f"{who}: work waits and no step ends",
            "A rank hangs, or a step takes longer than it may; the log names the late rank at its deadline.",
        ),
        _alert(
            "TpserveGatewayWithoutEngine",
            "tpserve_gateway_engine_up == 0",
            "1m",
            "critical",
            "{{ $labels.instance }}: the gateway has no engine",
            "The coordinator does not answer the gateway, which refuses every request with 503.",
        ),
        _alert(
            "TpserveRankLost",
            f"sum by ({_BY}, rank) (increase(tpserve_ranks_lost_total[10m])) > 0",
            "0s",
            "warning",
            f"{who}: rank {{{{ $labels.rank }}}} was lost",
            "Its group was rebuilt and requests were replayed. Look at the host, its GPU and the rank's log.",
        ),
        _alert(
            "TpserveRebuildsOften",
            f"sum by ({_BY}) (increase(tpserve_group_rebuilds_total[1h])) > 3",
            "0s",
            "critical",
            f"{who}: the group is rebuilt again and again",
            "More than three times within an hour; clients see pauses.",
        ),
        _alert(
            "TpserveRefusesRequests",
            f'sum by ({_BY}, reason) (rate(tpserve_admission_rejections_total{{reason!="invalid"}}[5m])) > 0.1',
            "5m",
            "warning",
            f"{who}: requests are refused ({{{{ $labels.reason }}}})",
            "Clients get 429 or 503. Add replicas, or raise --max-num-queued-reqs if they may wait longer.",
        ),
        _alert(
            "TpserveServerErrors",
            'sum by (route) (rate(tpserve_http_requests_total{code=~"5..",route!~"/health.*"}[5m])) '
            "/ sum by (route) (rate(tpserve_http_requests_total[5m])) > 0.02",
            "5m",
            "warning",
            "{{ $labels.route }}: more than 2 % of the answers are errors of the server",
            "The gateway's log has each with its request id.",
        ),
        _alert(
            "TpserveQueueLong",
            f"sum by ({_BY}) (tpserve_num_requests_waiting) > sum by ({_BY}) (tpserve_num_requests_running)",
            "10m",
            "warning",
            f"{who}: more sequences wait than run",
            "For ten minutes; time to first token suffers. Add replicas or raise --max-num-seqs.",
        ),
        _alert(
            "TpserveTimeToFirstTokenHigh",
            "tpserve:ttft_seconds:p99 > 5",
            "10m",
            "warning",
            f"{who}: the slowest 1 % wait more than 5 s for the first token",
            "Compare queue and prefill time on the latency board.",
        ),
        _alert(
            "TpserveTimePerOutputTokenHigh",
            "tpserve:tpot_seconds:p99 > 0.2",
            "10m",
            "warning",
            f"{who}: the slowest 1 % get less than 5 tokens a second",
            "Compare step time, batch size and the host gap on the scheduler board.",
        ),
        _alert(
            "TpserveKvCacheFull",
            f"max by ({_BY}) (tpserve_kv_cache_usage_perc) > 0.97 and "
            f"sum by ({_BY}) (rate(tpserve_num_preemptions_total[5m])) > 0",
            "10m",
            "warning",
            f"{who}: the KV cache is full and sequences are preempted",
            "Their tokens are computed twice. Lower --max-num-seqs, or give more memory or replicas.",
        ),
        _alert(
            "TpserveHostLate",
            "tpserve:host_gap:ratio > 0.05",
            "10m",
            "warning",
            f"{who}: the device waits for the host more than 5 % of each step",
            "Look for other load on the coordinator's cores.",
        ),
        _alert(
            "TpserveStraggler",
            f"sum by ({_BY}, rank) (rate(tpserve_straggler_wait_seconds_total[5m])) "
            f"/ sum by ({_BY}, rank) (rate(tpserve_rank_step_seconds_sum[5m])) > 0.15",
            "10m",
            "warning",
            f"{who}: the others wait for rank {{{{ $labels.rank }}}}",
            "More than 15 % of each step. Look at its clocks, temperature, PCIe link and neighbours on the host.",
        ),
        _alert(
            "TpserveDraftsRejected",
            f"sum by ({_BY}) (rate(tpserve_spec_decode_num_accepted_tokens_total[10m])) "
            f"/ sum by ({_BY}) (rate(tpserve_spec_decode_num_draft_tokens_total[10m])) < 0.3",
            "30m",
            "info",
            f"{who}: fewer than 30 % of the draft's tokens are accepted",
            "The draft model costs more than it gives.",
        ),
    ]


def _router_alerts() -> list[Rule]:
    who = "router {{ $labels.instance }}"
    return [
        _alert(
            "TpserveRouterWithoutReplica",
            "sum by (instance) (tpserve_router_backend_ready) == 0",
            "1m",
            "critical",
            f"{who}: no replica is ready",
            "Every request is refused with 503 after --queue-timeout.",
        ),
        _alert(
            "TpserveReplicaNotReady",
            "max by (instance, backend) (tpserve_router_backend_ready) == 0",
            "5m",
            "warning",
            f"{who}: {{{{ $labels.backend }}}} is not ready",
            "For five minutes it has not passed /health/ready. The other replicas carry its load.",
        ),
        _alert(
            "TpserveRouterRefusesRequests",
            "sum by (instance, reason) (rate(tpserve_router_rejections_total[5m])) > 0.1",
            "5m",
            "warning",
            f"{who}: requests are refused ({{{{ $labels.reason }}}})",
            "Clients get 429 or 503. Add replicas, or raise --max-inflight-per-backend or --max-queued.",
        ),
        _alert(
            "TpserveRouterQueueLong",
            "histogram_quantile(0.99, sum by (le, instance) (rate(tpserve_router_queue_seconds_bucket[5m]))) > 5",
            "10m",
            "warning",
            f"{who}: the slowest 1 % wait more than 5 s for a replica",
            "All replicas are full. Add some, or raise --max-inflight-per-backend if their batches have room.",
        ),
        _alert(
            "TpserveStreamsBroken",
            'sum by (instance) (increase(tpserve_router_moves_total{outcome="failed"}[10m])) > 0',
            "0s",
            "warning",
            f"{who}: streams have ended with an error, as their replica was lost",
            "Router and replicas must share --router-token for streams to move, and another replica must have room.",
        ),
        _alert(
            "TpserveBreakerOpensOften",
            'sum by (instance, backend) (increase(tpserve_router_breaker_changes_total{state="open"}[15m])) > 3',
            "0s",
            "warning",
            f"{who}: {{{{ $labels.backend }}}} fails again and again",
            "More than three times in a quarter of an hour. Look at its log, and at the network to it.",
        ),
        _alert(
            "TpserveRouterServerErrors",
            'sum by (instance, route) (rate(tpserve_router_requests_total{code=~"5..",route!~"/health.*"}[5m])) '
            "/ sum by (instance, route) (rate(tpserve_router_requests_total[5m])) > 0.02",
            "5m",
            "warning",
            f"{who}: more than 2 % of the answers of {{{{ $labels.route }}}} are errors",
            "The board of the router says whether replicas are lost, or none has room.",
        ),
    ]


def groups() -> dict[str, Any]:
    """Return the rule groups."""
    return {
        "groups": [
            {"name": "tpserve-recording", "interval": "15s", "rules": _own_rules()},
            {"name": "tpserve-vllm-names", "interval": "15s", "rules": _vllm_rules()},
            {"name": "tpserve-alerts", "interval": "15s", "rules": _alerts()},
            {"name": "tpserve-router-alerts", "interval": "15s", "rules": _router_alerts()},
        ]
    }


def text() -> str:
    """Return the file."""
    return _HEAD + yaml.safe_dump(groups(), sort_keys=False, width=160)


if __name__ == "__main__":
    TARGET.write_text(text())
