"""Requests of this process, served by the gateway's own handlers: what HTTP would carry, without HTTP.

Runs in the engine's loop. What goes in is a request body, what comes out are the bytes of the answer's JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Scope

from tpserve.coordinator.gateway.errors import ClientDisconnected, InvalidRequest
from tpserve.coordinator.gateway.service import Service
from tpserve.coordinator.gateway.stream import END, EventStream, event_data
from tpserve.coordinator.python_engine.errors import RequestAborted

Handler = Callable[[Service, Request], Awaitable[Response]]
"""A route of the gateway: `chat.create_chat_completion` and its like."""


class LocalDoor:
    """Calls the gateway's handlers, and knows which calls are running."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._calls: dict[str, _Call] = {}
        """By request id and, once the answer has begun, by the answer's id."""

    async def whole(self, handler: Handler, body: bytes, request_id: str | None) -> bytes:
        """Return the JSON of an answer in one piece.

        Raises
        ------
        ApiError
            If the request cannot be served.
        RequestAborted
            If `abort` was called for it.
        """
        async with self._call(body, request_id) as call:
            return bytes((await handler(self._service, call.request)).body)

    async def stream(self, handler: Handler, body: bytes, request_id: str | None) -> AsyncIterator[bytes]:
        """Yield nothing (b"") once the request is accepted, then the JSON of each chunk of a streamed answer.

        Raises
        ------
        ApiError
            If the request cannot be served, at once or later.
        RequestAborted
            If `abort` was called for it.
        """
        async with self._call(body, request_id) as call:
            response = await handler(self._service, call.request)
            yield b""
            if not isinstance(response, EventStream):  # nothing was generated: it is all there
                for event in event_data(bytes(response.body)):
                    if event != END:
                        yield event
                return
            async with contextlib.aclosing(response.events()) as groups:
                async for group in groups:
                    for event in event_data(group):
                        if call.answer_id is None:
                            call.answer_id = orjson.loads(event).get("id", "")
                            self._calls[call.answer_id] = call
                        yield event

    def abort(self, request_id: str) -> None:
        """End a running request, by its own id or its answer's; one that has ended is none of our concern."""
        if call := self._calls.get(request_id):
            call.left.set()

    @contextlib.asynccontextmanager
    async def _call(self, body: bytes, request_id: str | None) -> AsyncIterator[_Call]:
        name = request_id or uuid.uuid4().hex
        if name in self._calls:
            raise InvalidRequest(f"request_id {name!r} belongs to a request that is still running", param="request_id")
        call = _Call(body, name)
        self._calls[name] = call
        try:
            yield call
        except ClientDisconnected:
            raise RequestAborted(f"request {name} was aborted") from None
        finally:
            del self._calls[name]
            self._calls.pop(call.answer_id or "", None)


class _Call:
    """What the handlers see of an HTTP exchange."""

    __slots__ = ("_body", "answer_id", "left", "request")

    def __init__(self, body: bytes, request_id: str) -> None:
        self._body: bytes | None = body
        self.answer_id: str | None = None
        self.left = asyncio.Event()
        scope: Scope = {"type": "http", "method": "POST", "headers": [], "state": {"request_id": request_id}}
        self.request = Request(scope, self._receive)

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}


def to_body(fields: dict[str, Any]) -> bytes:
    """Return keyword arguments as a request body; None leaves a field out, and answers' objects may be messages.

    Raises
    ------
    InvalidRequest
        If a value has no JSON form.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return orjson.dumps(given, default=_plain, option=orjson.OPT_NON_STR_KEYS)
    except TypeError as error:
        raise InvalidRequest(f"the request has no JSON form: {error}") from None


def _plain(value: object) -> object:
    """Turn a pydantic object (a message of an earlier answer) or another mapping into what JSON knows."""
    if hasattr(value, "model_dump"):
        return value.model_dump(exclude_none=True)
    if isinstance(value, tuple | set | frozenset):
        return list(value)
    raise TypeError(f"{type(value).__name__} {value!r}"[:200])
