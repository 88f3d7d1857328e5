"""The coordinator's own HTTP door, for who looks after it: metrics and health. Off unless it is given a port.

A gateway gives the same metrics; but where several gateways serve one engine, each of them would give them once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from tpserve.coordinator.engine import Engine
from tpserve.coordinator.health import PROBES, Probe, passes
from tpserve.coordinator.metrics import Metrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def make_app(engine: Engine, metrics: Metrics) -> Starlette:
    """Return the application."""

    async def scrape(_: Request) -> Response:
        return PlainTextResponse(metrics.text(), media_type=CONTENT_TYPE)

    def answer(probe: Probe) -> Response:
        status, detail = engine.status
        name = status.name.lower()
        good = passes(probe, name, was_ready=engine.was_ready)
        return JSONResponse({"status": name, "detail": detail}, 200 if good else 503)

    async def health(_: Request) -> Response:
        return answer("ready")

    async def probe(request: Request) -> Response:
        name = request.path_params["probe"]
        found = next((known for known in PROBES if known == name), None)
        return PlainTextResponse("Not Found", 404) if found is None else answer(found)

    return Starlette(routes=[Route("/metrics", scrape), Route("/health", health), Route("/health/{probe}", probe)])


class OperationsServer(uvicorn.Server):
    """Runs on the coordinator's event loop and leaves signals alone."""

    def __init__(self, engine: Engine, metrics: Metrics, host: str, port: int) -> None:
        config = uvicorn.Config(
            make_app(engine, metrics),
            host=host,
            port=port,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install nothing: the coordinator's own handlers stay."""
        yield
