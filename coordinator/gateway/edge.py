"""The outermost layer of each HTTP request: id, key, limits of the body, metrics, and the last resort for faults."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Iterable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tpserve.coordinator.gateway.errors import (
    FAULT_MESSAGE,
    SHUTTING_DOWN,
    ApiError,
    ClientDisconnected,
    EngineUnavailable,
    InternalError,
    InvalidApiKey,
)
from tpserve.coordinator.gateway.keys import Account, KeyRing
from tpserve.coordinator.gateway.limited_body import limited_body
from tpserve.coordinator.gateway.metrics import HttpMetrics
from tpserve.coordinator.gateway.stream import error_response

logger = logging.getLogger(__name__)

QUIET_ROUTES = ("/health", "/health/{probe}", "/metrics")
"""Scraped all the time; logged at debug level."""

GUARDED_PATHS = ("/v1/", "/debug/", "/tokenize", "/detokenize")
"""Need a key where there are keys."""

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Edge:
    """ASGI middleware around the whole application.

    Parameters
    ----------
    routes
        Paths that metrics name; all others count as `other`, so that clients cannot grow the label set.
    keys
        Keys that open /v1; none leaves it open.
    body_timeout_s
        See `limited_body`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: HttpMetrics,
        routes: Iterable[str],
        keys: KeyRing,
        max_body_bytes: int,
        body_timeout_s: float,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = frozenset(routes)
        self._keys = keys
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; anything else (lifespan) passes through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.perf_counter()
        headers = dict(scope["headers"])
        exchange = _Exchange(send, _request_id(headers))
        path: str = scope["path"]
        route = path if path in self._routes else "other"
        if path.startswith("/health/"):
            route = "/health/{probe}"
        scope.setdefault("state", {})["request_id"] = exchange.request_id
        self._metrics.begin(route)
        try:
            try:
                if path.startswith(GUARDED_PATHS) and not self._keys.is_open:
                    scope["state"]["account"] = self._account(headers)
                limited = limited_body(headers, receive, max_bytes=self._max_body_bytes, timeout_s=self._body_timeout_s)
                await self._app(scope, limited, exchange.send)
            except ClientDisconnect:
                raise ClientDisconnected("The client closed the connection while sending the body") from None
            except ApiError:
                raise
            except asyncio.CancelledError:  # by uvicorn alone, when the grace has ended
                if exchange.status is not None:
                    raise
                raise EngineUnavailable(SHUTTING_DOWN, retry_after_s=1) from None
            except Exception as fault:
                logger.exception(
                    "request %s: a fault of the gateway",
                    exchange.request_id,
                    extra={"request_id": exchange.request_id},
                )
                raise InternalError(FAULT_MESSAGE) from fault
        except ApiError as error:
            if exchange.status is None:
                await error_response(error)(scope, receive, exchange.send)
        finally:
            duration_s = time.perf_counter() - begin
            status = exchange.status or 499
            self._metrics.end(route, status, duration_s)
            logger.log(
                logging.DEBUG if route in QUIET_ROUTES else logging.INFO,
                "%s %s %d %.1f ms, request %s",
                scope["method"],
                route if route != "other" else repr(path[:100]),
                status,
                1000 * duration_s,
                exchange.request_id,
                extra={"request_id": exchange.request_id, "route": route, "status": status},
            )

    def _account(self, headers: dict[bytes, bytes]) -> Account:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not given:
            raise InvalidApiKey("An API key is needed: send it as 'Authorization: Bearer KEY'")
        account = self._keys.find(given.strip())
        if account is None:
            raise InvalidApiKey("The API key is not known to this server")
        return account


class _Exchange:
    """Adds the request id to the response and remembers its status."""

    __slots__ = ("_send", "request_id", "status")

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message["headers"], (b"x-request-id", self.request_id.encode())]}
        await self._send(message)


def _request_id(headers: dict[bytes, bytes]) -> str:
    """Take the client's id, if it is fit for headers and logs."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
