"""Spans of a request inside the coordinator, sent over the real protocol to a receiver in this process."""

from __future__ import annotations

import asyncio
import sys
import time

import pytest

from otlp_receiver import grpc_receiver, http_receiver
from simulated_group import NUM_CHOICES, NUM_TOKENS, PROMPT, STEP_US, generate, running_engine
from tpserve.coordinator.metrics import Metrics
from tpserve.coordinator.tracing import Tracing, TracingUnavailable

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
NOT_SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-00"


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_a_request_has_spans_down_to_the_steps_of_every_rank(
    protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
    with grpc_receiver() if protocol == "grpc" else http_receiver() as (receiver, endpoint):
        tracing = Tracing(endpoint, "coordinator")
        async with running_engine(2, Metrics("m"), tracing) as engine:
            await generate(engine, TRACEPARENT)
            await generate(engine)  # not traced
            await generate(engine, NOT_SAMPLED)
        await asyncio.to_thread(tracing.shutdown, 60.0)
        spans = receiver.spans
    assert {span.trace_id for span in spans} == {TRACE_ID}
    (root,) = (span for span in spans if span.name == "engine.request")
    assert root.parent_id == PARENT_ID
    assert root.attributes["tpserve.request_id"] == "cmpl-1"
    assert root.attributes["gen_ai.usage.input_tokens"] == len(PROMPT)
    assert root.attributes["gen_ai.usage.output_tokens"] == NUM_CHOICES * NUM_TOKENS
    assert root.attributes["gen_ai.response.finish_reasons"] == ["length"] * NUM_CHOICES
    assert root.resource["service.name"] == "tpserve"
    phases = {span.name: span for span in spans if span.parent_id == root.span_id}
    assert set(phases) == {"engine.queue", "engine.prefill", "engine.decode"}
    assert phases["engine.queue"].end_ns <= phases["engine.prefill"].begin_ns + 1_000_000
    assert phases["engine.prefill"].end_ns <= phases["engine.decode"].begin_ns + 1_000_000
    steps = [span for span in spans if span.name == "worker.step"]
    assert {span.parent_id for span in steps} <= {phase.span_id for phase in phases.values()}
    by_rank = {
        rank: {s.attributes["tpserve.step"] for s in steps if s.attributes["tpserve.rank"] == rank} for rank in (0, 1)
    }
    assert by_rank[0] == by_rank[1]
    assert len(by_rank[0]) >= NUM_TOKENS
    assert {(span.end_ns - span.begin_ns) // 1000 for span in steps} == {STEP_US}


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(TracingUnavailable, match=r"pip install 'tpserve\[otel\]'"):
        Tracing("http://127.0.0.1:1", "gateway")


def test_an_unknown_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json")
    with pytest.raises(TracingUnavailable, match="http/json"):
        Tracing("http://127.0.0.1:1", "gateway")


def test_a_receiver_that_is_gone_does_not_hold_up_the_end(caplog: pytest.LogCaptureFixture) -> None:
    with grpc_receiver() as (_, endpoint):
        pass  # nobody listens there any more
    tracing = Tracing(endpoint, "gateway")
    tracing.tracer.start_span("lost").end()
    begin = time.perf_counter()
    tracing.shutdown(timeout_s=0.3)
    assert time.perf_counter() - begin < 15
    assert "did not take the last spans within 0.3 s" in caplog.text
