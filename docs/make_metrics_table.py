"""Writes docs/metrics.md from the catalogue of metrics. Run: python docs/make_metrics_table.py."""

from __future__ import annotations

from pathlib import Path

from tpserve.coordinator.metrics_catalogue import CATALOGUE, ROUTER_CATALOGUE, VLLM_PREFIX, MetricSpec

TARGET = Path(__file__).with_name("metrics.md")
_HEAD = """# Metrics

Everything at `/metrics`. Made from `coordinator/metrics_catalogue.py` by `docs/make_metrics_table.py`; change it there.

The coordinator's metrics have the labels `model_name` and `engine`, the number of the replica, besides those named
here. Histograms have `_bucket`, `_sum` and `_count`. Where vLLM has the same metric its name is given: `tpserve serve
--metrics-compat vllm` exports these names too, and `deploy/prometheus/rules.yaml` records them.

A router's /metrics has its own metrics; that of `tpserve serve --replicas` also those of all replicas, with the label
`replica`.

"""


def table() -> str:
    """Return the page."""
    return _HEAD + "\n\n".join(map(_part, ("coordinator", "gateway", "router"))) + "\n"


def _part(source: str) -> str:
    rows = [f"## The {source}'s", "", "| metric | type | labels | what it counts | vLLM |", "|---|---|---|---|---|"]
    return "\n".join(rows + [_row(spec) for spec in (*CATALOGUE, *ROUTER_CATALOGUE) if spec.source == source])


def _row(spec: MetricSpec) -> str:
    name = spec.full_name + ("_total" if spec.kind == "counter" else "")
    labels = ", ".join(f"`{label}`" for label in spec.labels)
    vllm = "" if spec.vllm is None else f"`{VLLM_PREFIX}{spec.vllm}{'_total' if spec.kind == 'counter' else ''}`"
    return f"| `{name}` | {spec.kind} | {labels} | {spec.text} | {vllm} |"


if __name__ == "__main__":
    TARGET.write_text(table())
