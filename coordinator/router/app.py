"""The router's ASGI application: its own routes, and everything else to the replicas."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tpserve.coordinator.gateway.errors import (
    FAULT_MESSAGE,
    SHUTTING_DOWN,
    ApiError,
    EngineUnavailable,
    InternalError,
    InvalidApiKey,
    error_json,
    error_object,
)
from tpserve.coordinator.router.config import RouterConfig
from tpserve.coordinator.router.health import HealthWatch
from tpserve.coordinator.router.metrics import CONTENT_TYPE
from tpserve.coordinator.router.prompt import GENERATION_PATHS
from tpserve.coordinator.router.proxy import ClientLeft, Exchange, request_id
from tpserve.coordinator.router.replicas import Replicas
from tpserve.coordinator.router.upstream import UpstreamLost

logger = logging.getLogger(__name__)

_KNOWN_ROUTES = frozenset(
    {*GENERATION_PATHS, "/v1/embeddings", "/v1/models", "/tokenize", "/detokenize", "/version", "/openapi.json", "/"}
)
"""Paths that metrics name; all others count as `other`, so that clients cannot grow the label set."""
_METRICS_TIMEOUT_S = 5.0


class Router:
    """One router.

    Parameters
    ----------
    restart_all
        Begins to replace every replica in turn; None: the replicas are not this one's to restart.
    """

    def __init__(self, config: RouterConfig, restart_all: Callable[[], None] | None = None) -> None:
        self.config = config
        self.replicas = Replicas(config)
        self.is_draining = False
        self._health = HealthWatch(config, self.replicas)
        self._restart_all = restart_all
        self._exchanges: set[Exchange] = set()

    def give_up_all(self) -> None:
        """End every request that still runs with an error."""
        for exchange in list(self._exchanges):
            exchange.give_up(EngineUnavailable(SHUTTING_DOWN, retry_after_s=1))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the life of the application."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        path: str = scope["path"]
        if path == "/metrics":
            text = self.replicas.metrics.render(await self._scrape() if self.config.merge_metrics else None)
            await Response(text, media_type=CONTENT_TYPE)(scope, receive, send)
        elif path == "/health" or path.startswith("/health/"):
            await self._say_health(path)(scope, receive, send)
        elif path.startswith("/admin/"):
            await self._admin(scope)(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self._health.start()
                await send({"type": "lifespan.startup.complete"})
            else:
                await self._health.close()
                for backend in self.replicas.backends:
                    backend.upstream.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; the last resort for faults."""
        begin = time.perf_counter()
        path: str = scope["path"]
        name = request_id(scope["headers"])
        exchange = Exchange(self.config, self.replicas, scope, receive, send, name)
        error: ApiError | None = None
        self._exchanges.add(exchange)
        try:
            await exchange.run()
        except ClientLeft:
            logger.info("request %s: the client left", name.decode())
        except ApiError as refusal:
            error = refusal
        except Exception:
            logger.exception("request %s: a fault of the router", name.decode(), extra={"request_id": name.decode()})
            error = InternalError(FAULT_MESSAGE)
        finally:
            self._exchanges.discard(exchange)
        status = exchange.status
        if error is not None and status is None:
            status = error.status
            headers = {**error.headers, "x-request-id": name.decode()}
            await Response(error_json(error), status, headers, "application/json")(scope, receive, send)
        duration_s = time.perf_counter() - begin
        route = path if path in _KNOWN_ROUTES else "other"
        self.replicas.metrics.end(route, status or 499, duration_s)
        logger.info(
            "%s %s %d %.1f ms, request %s",
            scope["method"],
            route if route != "other" else repr(path[:100]),
            status or 499,
            1000 * duration_s,
            name.decode(),
            extra={"request_id": name.decode(), "route": route, "status": status or 499},
        )

    # ---- the router's own routes

    def _say_health(self, path: str) -> Response:
        """Answer a probe: ready as long as one replica is, live as long as this process answers."""
        replicas = self.replicas
        is_ready = replicas.num_ready > 0 and not self.is_draining
        passes = {
            "/health": is_ready,
            "/health/ready": is_ready,
            "/health/startup": replicas.was_ready,
            "/health/live": True,
        }
        if path not in passes:
            return _no_route("There is no such probe")
        status = "draining" if self.is_draining else "ready" if is_ready else "starting"
        if not is_ready and replicas.was_ready and not self.is_draining:
            status = "disconnected"
        body: dict[str, Any] = {
            "status": status,
            "detail": f"{replicas.num_ready} of {len(replicas.backends)} replicas are ready",
            "replicas": [
                {
                    "name": backend.name,
                    "ready": backend.is_ready,
                    "detail": backend.detail,
                    "breaker": backend.breaker.state.value,
                    "in_flight": backend.load.num_in_flight,
                }
                for backend in replicas.backends
            ],
        }
        return Response(orjson.dumps(body), 200 if passes[path] else 503, None, "application/json")

    def _admin(self, scope: Scope) -> Response:
        try:
            return self._checked_admin(scope)
        except ApiError as error:
            return Response(error_json(error), error.status, error.headers, "application/json")

    def _checked_admin(self, scope: Scope) -> Response:
        token, restart_all = self.config.admin_token, self._restart_all
        if token is None or restart_all is None or scope["path"] != "/admin/rolling-restart":
            return _no_route("POST /admin/rolling-restart is there with `serve --replicas N --admin-token SECRET`")
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), token.encode()):
            raise InvalidApiKey("/admin needs the --admin-token: send it as 'Authorization: Bearer SECRET'")
        if scope["method"] != "POST":
            return _no_route("Method Not Allowed: use POST", 405, "method_not_allowed")
        if self.replicas.num_ready < len(self.replicas.backends):
            raise EngineUnavailable("Not all replicas are ready: try again when they are", retry_after_s=5)
        restart_all()
        body = orjson.dumps({"status": "restarting", "replicas": len(self.replicas.backends)})
        return Response(body, 202, None, "application/json")

    async def _scrape(self) -> dict[str, str]:
        """Return the metrics of each replica that gives them."""

        async def one(number: int) -> tuple[str, str] | None:
            try:
                async with asyncio.timeout(_METRICS_TIMEOUT_S):
                    response = await self.replicas.backends[number].upstream.request(b"GET", b"/metrics", [])
                    try:
                        return str(number), (await response.body()).decode()
                    finally:
                        response.close()
            except (TimeoutError, UpstreamLost, UnicodeDecodeError):
                return None  # tpserve_router_backend_ready says so

        found = await asyncio.gather(*(one(number) for number in range(len(self.replicas.backends))))
        return dict(filter(None, found))


def _no_route(message: str, status: int = 404, code: str = "unknown_route") -> Response:
    body = orjson.dumps(error_object(message, "invalid_request_error", code=code))
    return Response(body, status, None, "application/json")


def signal_parent(pid: int) -> Callable[[], None]:
    """Return what asks the parent, which started the replicas, to replace them."""
    return lambda: os.kill(pid, signal.SIGHUP)
