"""Writes answers: server-sent events, and JSON. Knows nothing of what the events say."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any, Protocol

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tpserve.coordinator.gateway.errors import (
    FAULT_MESSAGE,
    ApiError,
    ClientDisconnected,
    EngineUnavailable,
    InternalError,
    error_json,
)
from tpserve.coordinator.gateway.generation import Generation, Update
from tpserve.coordinator.gateway.metrics import HttpMetrics
from tpserve.coordinator.relay import LOST

logger = logging.getLogger(__name__)

END = b"[DONE]"
DONE = b"data: " + END + b"\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients of server-sent events ignore."""


class ChunkWriter(Protocol):
    """Writes one kind of streamed answer."""

    def write(self, update: Update) -> bytes:
        """Return the events, each whole, for what is new in a choice; may be empty."""

    def close(self) -> bytes:
        """Return what comes after the last choice has finished, before [DONE]."""


def sse(data: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


def event_data(group: bytes) -> list[bytes]:
    """Return the data of each event in a group of whole events."""
    return [line[6:] for line in group.split(b"\n") if line.startswith(b"data: ")]


def json_response(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON response."""
    return Response(orjson.dumps(data), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    """Return an error in OpenAI's form."""
    return Response(error_json(error), error.status, error.headers, "application/json")


class EventStream(Response):
    """The response that streams a generation and closes it.

    Headers are sent at once: the generation must have been accepted. What goes wrong later is sent as an event with
    OpenAI's error object, which ends the stream in place of [DONE]. A router gets marks (see `relay`), and none of the
    events that it had from another gateway.

    Parameters
    ----------
    generation
        Started; it is closed when the response ends, for whatever reason.
    name
        Request id, for logs.
    keep_alive_s
        Silence after which a comment is sent.
    end
        What ends a stream that did not fail.
    """

    def __init__(
        self,
        generation: Generation,
        writer: ChunkWriter,
        metrics: HttpMetrics,
        *,
        name: str,
        keep_alive_s: float,
        end: bytes = DONE,
    ) -> None:
        super().__init__(
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
            media_type="text/event-stream",
        )
        del self.headers["content-length"]
        self.generation = generation
        self.writer = writer
        self.metrics = metrics
        self.name = name
        self.keep_alive_s = keep_alive_s
        self._end = end
        self._num_sent = 0

    async def events(self) -> AsyncGenerator[bytes]:
        """Yield the events of each batch of updates, and close the generation. The end of the stream is not among them.

        Raises
        ------
        ApiError
            If the generation fails.
        """
        write = self.writer.write
        try:
            async for updates in self.generation.updates():
                body = write(updates[0]) if len(updates) == 1 else b"".join(map(write, updates))
                if body:
                    yield body
            if body := self.writer.close():
                yield body
        finally:
            self.generation.close()

    def error_event(self, error: ApiError) -> bytes:
        """Return what ends a stream that failed."""
        return sse(error.to_dict())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it."""
        keeper = asyncio.create_task(self._keep_alive(send))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            last = await self._send_events(send)
        finally:
            keeper.cancel()
            self.generation.close()
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        """Break silences; headers go out well within the first period."""
        while True:
            num_sent = self._num_sent
            await asyncio.sleep(self.keep_alive_s)
            if num_sent == self._num_sent:
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})

    async def _send_events(self, send: Send) -> bytes:
        """Send the events; return what ends the stream."""
        progress = self.generation.progress
        try:
            async with contextlib.aclosing(self.events()) as events:
                async for body in events:
                    if progress is not None:
                        if self.generation.is_replaying:
                            continue  # the client has it from another gateway
                        if not self.generation.is_over:
                            body += progress.take_mark(self.generation.usage.num_cached_tokens)
                    self._num_sent += 1
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        except ClientDisconnected as error:
            self.metrics.stream_failed(error.status)
            logger.info("request %s: the client left", self.name)
            return b""
        except ApiError as error:
            self.metrics.stream_failed(error.status)
            logger.warning("request %s failed while streaming: %s", self.name, error.message)
            lost = progress is not None and isinstance(error, EngineUnavailable)
            return (LOST if lost else b"") + self.error_event(error)
        except Exception:
            self.metrics.stream_failed(500)
            logger.exception("request %s failed while streaming", self.name)
            return self.error_event(InternalError(FAULT_MESSAGE))
        return self._end
