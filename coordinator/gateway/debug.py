"""What only `--enable-debug` opens: looks inside the engine, which cost it time."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from typing import Literal

from fastapi import FastAPI, Request
from starlette.responses import Response

from tpserve.coordinator.gateway.errors import EngineUnavailable, InvalidRequest, UnsupportedFeature
from tpserve.coordinator.gateway.generation import Usage
from tpserve.coordinator.gateway.metrics import samples_by_name
from tpserve.coordinator.gateway.protocol import ChatCompletionRequest, CompletionRequest
from tpserve.coordinator.gateway.service import AnswerHead, Service
from tpserve.coordinator.gateway.stream import DONE, json_response, sse
from tpserve.coordinator.step_log import MAX_TRACE_STEPS

_MAX_TIMEOUT_S = 300.0
_DEFAULT_TIMEOUT_S = 30.0


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the routes under /debug."""

    @app.get("/debug/tasks")
    async def tasks() -> Response:
        names = Counter(getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks())
        return json_response({"pid": os.getpid(), "count": names.total(), "tasks": dict(names)})

    @app.get("/debug/trace")
    async def trace(request: Request) -> Response:
        num_steps = int(_number(request, "steps", 100, 1, MAX_TRACE_STEPS))
        timeout_s = _number(request, "timeout", _DEFAULT_TIMEOUT_S, 0.1, _MAX_TIMEOUT_S)
        text = await service.engine.trace(num_steps, timeout_s)
        if json.loads(text)["otherData"]["steps"] == 0:
            raise EngineUnavailable(
                f"No step ran within {timeout_s:g} s: send requests while the trace is recorded", retry_after_s=1
            )
        headers = {"content-disposition": 'attachment; filename="tpserve-trace.json"'}
        return Response(text, media_type="application/json", headers=headers)


def require_enabled(service: Service, request: ChatCompletionRequest | CompletionRequest) -> None:
    """Refuse `debug_config` where nobody opened it.

    Raises
    ------
    UnsupportedFeature
        If the request has one and the server runs without `--enable-debug`.
    """
    if request.debug_config is not None and not service.config.enable_debug:
        raise UnsupportedFeature(
            "debug_config is only taken by a server started with --enable-debug: leave it out", param="debug_config"
        )


async def metrics_answer(
    service: Service,
    request: ChatCompletionRequest | CompletionRequest,
    head: AnswerHead,
    kind: Literal["chat.completion", "chat.completion.chunk", "text_completion"],
) -> Response:
    """Answer `query_engine_metrics`: an answer without choices, whose usage has the engine's metrics.

    Raises
    ------
    EngineUnavailable
        If the engine gives none.
    """
    extra = samples_by_name(await service.engine.metrics())
    answer = {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "choices": [],
        "usage": {**Usage(0).to_dict(), "extra": extra},
    }
    if not request.stream:
        return json_response(answer)
    return Response(sse(answer) + DONE, media_type="text/event-stream", headers={"cache-control": "no-cache"})


def _number(request: Request, name: str, default: float, least: float, most: float) -> float:
    """Return a query parameter.

    Raises
    ------
    InvalidRequest
        If it is no number in the range; whole numbers only where the range's begin is one.
    """
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        value = float(int(text)) if float(least).is_integer() else float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise InvalidRequest(f"{name} is {text[:40]!r}: it must be a number from {least:g} to {most:g}", param=name)
    return value
