"""What only `--enable-debug` opens: looks inside the engine, which cost it time."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter

from fastapi import FastAPI, Request
from starlette.responses import Response

from tpserve.coordinator.gateway.errors import EngineUnavailable, InvalidRequest
from tpserve.coordinator.gateway.service import Service
from tpserve.coordinator.gateway.stream import json_response
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
