"""Counters of speculation, read from what servers show."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tpserve.coordinator.bench.speculation import read_drafts
from tpserve.coordinator.draft_counts import Drafts, parse_drafts
from tpserve.coordinator.metrics import Metrics
from tpserve.proto.messages import StepResult
from unit.bench.virtual import FakeEndpoint

STEP = StepResult(1, slots=(0, 1), token_ids=(0,) * 5, counts=(3, 2), drafted=(2, 2), num_tokens=6, step_us=9)


@pytest.mark.parametrize("compat", ["none", "vllm"])
def test_our_own_counters_by_either_name(compat: str) -> None:
    metrics = Metrics("m", compat="vllm" if compat == "vllm" else "none")
    begin = parse_drafts(metrics.text())
    assert begin == Drafts(0, 0, 0, (0,))
    for _ in range(3):
        metrics.observe_step(STEP, None)
    text = metrics.text()
    if compat == "vllm":
        text = "\n".join(line for line in text.splitlines() if "vllm:" in line) + "\n"
    now = parse_drafts(text)
    assert now == Drafts(6, 12, 9, (6, 3))
    metrics.observe_step(replace(STEP, counts=(1, 1), token_ids=(0, 0)), None)
    later = parse_drafts(metrics.text())
    assert later is not None
    assert now is not None
    assert later.since(now) == Drafts(2, 4, 0, (0, 0))
    assert later.since(later) is None
    assert now.since(begin) == now
    assert (now.accept_rate, now.accept_length) == (0.75, 2.5)


def test_a_server_without_them_has_none() -> None:
    assert parse_drafts("# TYPE up gauge\nup 1\n") is None


async def test_an_endpoint_without_metrics_has_none() -> None:
    assert await read_drafts("http://x/v1", None, FakeEndpoint(ttft_s=0.1, tpot_s=0.01)) is None
