"""The gateway's span of each API request: W3C context in, GenAI attributes, and the engine's spans below it."""

from __future__ import annotations

import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tpserve.coordinator.gateway.engine_types import EngineRequest
from tpserve.coordinator.gateway.generation import Usage
from tpserve.coordinator.tracing import PROVIDER, Tracing

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/responses": "chat",
}
"""Every route that submits requests to the engine."""


class TraceRequests:
    """ASGI middleware that spans what `_OPERATIONS` names; within it, `Tracing.traceparent` names the span."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        operation = _OPERATIONS.get(scope["path"]) if scope["type"] == "http" else None
        if operation is None:
            await self._app(scope, receive, send)
            return
        from opentelemetry.trace import SpanKind, StatusCode, use_span

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        state = scope.setdefault("state", {})
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": PROVIDER,
            "http.request.method": scope["method"],
            "http.route": scope["path"],
        }
        if server := scope.get("server"):
            attributes |= {"server.address": server[0], "server.port": server[1]}
        if request_id := state.get("request_id"):
            attributes["tpserve.request_id"] = request_id
        span = self._tracing.tracer.start_span(
            operation,
            context=self._tracing.context_of(headers.get("traceparent", ""), headers.get("tracestate", "")),
            kind=SpanKind.SERVER,
            attributes=attributes,
        )
        begin = time.perf_counter()
        has_body = False
        call = state["traced_call"] = TracedCall(span)

        async def spanned(message: Message) -> None:
            nonlocal has_body
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    span.set_status(StatusCode.ERROR)
                    span.set_attribute("error.type", str(message["status"]))
            elif not has_body and message.get("body"):
                has_body = True
                if call.is_stream:
                    span.set_attribute("gen_ai.response.time_to_first_chunk", time.perf_counter() - begin)
            await send(message)

        try:
            with use_span(span, end_on_exit=False):
                await self._app(scope, receive, spanned)
        finally:
            call.note_usage()
            span.end()


class TracedCall:
    """What the handlers know and the middleware does not."""

    def __init__(self, span: Any) -> None:
        self._span = span
        self._usage: Usage | None = None
        self.is_stream = False

    def begin(self, requests: list[EngineRequest], model: str, usage: Usage, *, is_stream: bool) -> None:
        """Note what is asked for; `usage` is read in the end."""
        self._usage = usage
        self.is_stream = is_stream
        first = requests[0]
        sampling = first.sampling
        self._span.update_name(f"{self._span.attributes['gen_ai.operation.name']} {model}")
        self._span.set_attributes(
            {
                "gen_ai.request.model": model,
                "gen_ai.response.model": model,
                "gen_ai.request.max_tokens": first.max_tokens,
                "gen_ai.request.temperature": sampling.temperature,
                "gen_ai.request.top_p": sampling.top_p,
                "gen_ai.request.seed": str(sampling.seed),
                "gen_ai.request.choice.count": first.n,
                "gen_ai.request.stream": is_stream,
            }
        )

    def note_usage(self) -> None:
        """Write the token counts, if the request got so far."""
        if self._usage is not None:
            self._span.set_attributes(
                {
                    "gen_ai.usage.input_tokens": self._usage.num_prompt_tokens,
                    "gen_ai.usage.output_tokens": self._usage.num_completion_tokens,
                    "gen_ai.usage.cache_read.input_tokens": self._usage.num_cached_tokens,
                }
            )
