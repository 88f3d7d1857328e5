"""Where an answer's ids, time and seed come from: this gateway, or a router that may move the stream to another one."""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tpserve.coordinator.gateway.errors import ClientDisconnected, InvalidRequest, RouterOnly
from tpserve.coordinator.relay import (
    SECRET_HEADER,
    STREAM_HEADER,
    Identity,
    Progress,
    RelayError,
    read_header,
    read_marks,
)


@dataclass(frozen=True, slots=True)
class Origin:
    """What of an answer does not follow from its request."""

    identity: Identity
    progress: Progress | None = None
    """If a router asks for marks: how far the stream is."""


def origin_of(http: Request) -> Origin:
    """Return what the router said of this request, or something fresh."""
    state: MutableMapping[str, Any] = http.scope["state"]
    given: Origin | None = state.get("origin")
    return given or Origin(Identity.fresh(int(time.time()), secrets.randbits(64)))


class RouterDoor:
    """ASGI middleware that takes in what only a router may say.

    Parameters
    ----------
    secret
        Shared with the router; None: there is no router, and whoever says to be one is refused.
    """

    def __init__(self, app: ASGIApp, secret: str | None) -> None:
        self._app = app
        self._secret = None if secret is None else secret.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            said, stream = headers.get(SECRET_HEADER.encode()), headers.get(STREAM_HEADER.encode())
            if said is not None or stream is not None:
                self._check(said)
            if stream is not None:
                receive = await _take_in(scope, receive, stream)
        await self._app(scope, receive, send)

    def _check(self, said: bytes | None) -> None:
        if self._secret is None:
            raise RouterOnly(
                f"{SECRET_HEADER} and {STREAM_HEADER} are a router's: start this server with the same --router-token"
            )
        if not hmac.compare_digest(said or b"", self._secret):
            raise RouterOnly(f"{SECRET_HEADER} is not this server's --router-token")


async def _take_in(scope: Scope, receive: Receive, stream: bytes) -> Receive:
    """Note the origin; return a channel with the client's body alone."""
    try:
        identity, body_bytes = read_header(stream)
        if body_bytes is None:
            scope["state"]["origin"] = Origin(identity, Progress())
            return receive
        body = await _whole(receive)
        scope["state"]["origin"] = Origin(identity, read_marks(body[body_bytes:]))
    except RelayError as error:
        raise InvalidRequest(str(error)) from None
    parts: list[Message] = [{"type": "http.request", "body": body[:body_bytes], "more_body": False}]

    async def replaced() -> Message:
        return parts.pop() if parts else await receive()

    return replaced


async def _whole(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected("The router closed the connection while sending the body")
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)
