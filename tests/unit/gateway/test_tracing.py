"""Every route that runs the model has a span of its own, below the client's, and still answers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from otlp_receiver import grpc_receiver
from unit.gateway.conftest import StackFactory

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("route", "body", "operation"),
    [
        ("/v1/chat/completions", CHAT, "chat"),
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 2}, "text_completion"),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 2}, "chat"),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 2, "stream": True}, "chat"),
        ("/v1/embeddings", {"input": "Hi"}, "embeddings"),
    ],
)
async def test_it_is_traced(make_stack: StackFactory, route: str, body: dict[str, Any], operation: str) -> None:
    with grpc_receiver() as (receiver, endpoint):
        async with make_stack(otlp_traces_endpoint=endpoint) as stack:
            headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
            reply = await stack.http.post(route, json=body, headers=headers)
            assert reply.status_code == 200, reply.text
            (submit,) = stack.engine.submits
            tracing = stack.service.tracing
        assert tracing is not None
        await asyncio.to_thread(tracing.shutdown, 60.0)
        (span,) = receiver.spans
    assert (span.trace_id, span.parent_id) == (TRACE_ID, PARENT_ID)
    assert submit.traceparent == f"00-{TRACE_ID}-{span.span_id}-01"
    assert span.name.split(" ")[0] == span.attributes["gen_ai.operation.name"] == operation
    assert span.attributes["http.route"] == route
    if operation != "embeddings":
        assert span.attributes["gen_ai.request.max_tokens"] == span.attributes["gen_ai.usage.output_tokens"] == 2
