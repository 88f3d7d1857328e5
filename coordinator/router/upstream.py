"""HTTP/1.1 to one replica: connections that are kept, responses that are read as they come.

Own code because a token passes through it: reading a chunk costs a few microseconds here and a hundred in httpx. Plain
HTTP only; TLS belongs before the router.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, cast

import httptools

from tpserve.coordinator.gateway.errors import LIMIT_HEADER

Headers = list[tuple[bytes, bytes]]

CONNECT_TIMEOUT_S = 5.0
_MAX_BUFFERED_BYTES = 256 * 1024
"""Of a response whose reader is slow; then nothing more is taken from the network."""
_MAX_IDLE = 256
"""Connections that are kept."""
_STALE_WITHIN_S = 0.5
"""A kept connection that breaks so soon was closed before; later, the replica has broken over the request."""


class UpstreamLost(Exception):
    """A connection could not be had, or was lost; the message says how.

    Parameters
    ----------
    was_sent
        Whether the replica may have begun with the request.
    """

    def __init__(self, message: str, *, was_sent: bool) -> None:
        super().__init__(message)
        self.was_sent = was_sent


class Response:
    """One answer as it comes."""

    __slots__ = ("_connection", "_error", "_parts", "_size", "_waiter", "headers", "is_complete", "status")

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._parts: list[bytes] = []
        self._size = 0
        self._waiter: asyncio.Future[None] | None = None
        self._error: UpstreamLost | None = None
        self.status = 0
        self.headers: Headers = []
        self.is_complete = False

    @property
    def is_stream(self) -> bool:
        """Whether it is an event stream."""
        return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in self.headers)

    @property
    def is_limit_of_key(self) -> bool:
        """Whether a 429 comes of the client's own limits, not of a full queue."""
        return any(name == LIMIT_HEADER.encode() for name, _ in self.headers)

    async def head(self) -> None:
        """Wait for status and headers.

        Raises
        ------
        UpstreamLost
            If the connection ends before.
        """
        while not self.status and self._error is None:
            await self._wait()
        if not self.status:
            assert self._error is not None
            raise self._error

    async def read(self) -> bytes:
        """Return what has come of the body, at least a byte; b"" at its end.

        Raises
        ------
        UpstreamLost
            If the connection ends before the body does.
        """
        while not self._parts:
            if self.is_complete:
                return b""
            if self._error is not None:
                raise self._error
            await self._wait()
        parts, self._parts = self._parts, []
        if self._size > _MAX_BUFFERED_BYTES:
            self._connection.resume()
        self._size = 0
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def body(self) -> bytes:
        """Return the whole body; raises as `read`."""
        parts = []
        while part := await self.read():
            parts.append(part)
        return b"".join(parts)

    def close(self) -> None:
        """Give the connection back, or cut it if the body has not ended: then the replica drops the request."""
        self._connection.close()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # ---- what the connection says

    def has_head(self) -> None:
        """Note that status and headers are there."""
        self._wake()

    def take(self, part: bytes) -> None:
        """Add a part of the body."""
        self._parts.append(part)
        self._size += len(part)
        if self._size > _MAX_BUFFERED_BYTES:
            self._connection.pause()
        self._wake()

    def end(self) -> None:
        """Note the end of the body."""
        self.is_complete = True
        self._wake()

    def fail(self, error: UpstreamLost) -> None:
        """Note that no more comes; the first error stays."""
        self._error = self._error or error
        self._wake()


class _Connection(asyncio.Protocol):
    """One connection; carries one exchange at a time."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._response: Response | None = None
        self._keeps = False
        self.was_used = False
        """Whether it has carried an exchange."""
        self.last_data_at = 0.0
        """When bytes came last; the loop's clock."""

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def is_streaming(self) -> bool:
        return self._response is not None and self._response.is_stream

    def begin(self, head: bytes, body: bytes) -> Response:
        """Send a request."""
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._response = Response(self)
        self.last_data_at = self._loop.time()
        # Small requests in one packet; large bodies are not copied.
        if len(body) < 16_384:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)
        return self._response

    def close(self) -> None:
        """End the exchange."""
        response, self._response = self._response, None
        if response is None:
            return
        self._upstream.active.discard(self)
        if response.is_complete and self._keeps and self.is_open:
            self.was_used = True
            self._upstream.keep(self)
        elif self._transport is not None:
            self._transport.abort()

    def lose(self, why: str) -> None:
        """Give up on it."""
        if self._response is not None:
            self._response.fail(UpstreamLost(why, was_sent=True))
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        if self._transport is not None and self._transport.is_reading():
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and not self._transport.is_reading() and self.is_open:
            self._transport.resume_reading()

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        self.last_data_at = self._loop.time()
        if self._response is None:
            if self._transport is not None:
                self._transport.abort()  # nobody asked
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.lose(f"it does not speak HTTP/1.1: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._upstream.forget(self)
        if self._response is not None and not self._response.is_complete:
            why = "the connection was closed" if error is None else f"the connection was lost ({error})"
            self._response.fail(UpstreamLost(why, was_sent=True))

    # ---- httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        assert self._response is not None
        self._response.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        assert self._response is not None
        status = self._parser.get_status_code()
        if status >= 200:  # others are followed by the real one
            self._response.status = status
            self._response.has_head()
        else:
            self._response.headers.clear()

    def on_body(self, body: bytes) -> None:
        assert self._response is not None
        self._response.take(body)

    def on_message_complete(self) -> None:
        if self._response is not None and self._response.status:
            self._keeps = self._parser.should_keep_alive()
            self._response.end()


class Upstream:
    """The connections to one replica.

    Parameters
    ----------
    host, port
        Where it listens.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._host_header = f"{f'[{host}]' if ':' in host else host}:{port}".encode()
        self._idle: list[_Connection] = []
        self.active: set[_Connection] = set()
        """With an exchange that has not ended."""

    async def request(self, method: bytes, target: bytes, headers: Headers, body: bytes = b"") -> Response:
        """Send a request; returns once status and headers have come. The caller closes the response.

        A kept connection that the replica has closed meanwhile is replaced by a new one.

        Raises
        ------
        UpstreamLost
            If no connection can be had, or it ends before the headers.
        """
        head = _head(method, target, self._host_header, headers, body)
        while True:
            connection = self._take() or await self._connect()
            begun_at = asyncio.get_running_loop().time()
            self.active.add(connection)
            response = connection.begin(head, body)
            try:
                await response.head()
                return response
            except UpstreamLost:
                response.close()
                if not connection.was_used or asyncio.get_running_loop().time() > begun_at + _STALE_WITHIN_S:
                    raise
            except BaseException:
                response.close()
                raise

    def _take(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(lambda: _Connection(self), self._host, self._port)
        except TimeoutError:
            raise UpstreamLost(f"no connection within {CONNECT_TIMEOUT_S:g} s", was_sent=False) from None
        except OSError as error:
            raise UpstreamLost(f"no connection: {error.strerror or error}", was_sent=False) from None
        return connection

    def keep(self, connection: _Connection) -> None:
        """Take back a connection whose exchange has ended."""
        if len(self._idle) < _MAX_IDLE:
            self._idle.append(connection)
        else:
            connection.lose("enough are kept")

    def forget(self, connection: _Connection) -> None:
        """Drop a connection that was closed."""
        if connection in self._idle:
            self._idle.remove(connection)

    def lose_silent(self, silent_s: float, *, even_whole: bool) -> None:
        """Give up on exchanges of which nothing has come for that long.

        Parameters
        ----------
        even_whole
            Also on those that have no event stream, which are silent until they are done.
        """
        latest = asyncio.get_running_loop().time() - silent_s
        for connection in list(self.active):
            if connection.last_data_at < latest and (even_whole or connection.is_streaming):
                connection.lose(f"nothing came for {silent_s:g} s")

    def close(self) -> None:
        """Cut every connection."""
        for connection in (*self._idle, *self.active):
            connection.lose("the router ends")


def _head(method: bytes, target: bytes, host: bytes, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> bytes:
    lines = [b"%s %s HTTP/1.1\r\nhost: %s\r\n" % (method, target, host)]
    lines += [b"%s: %s\r\n" % header for header in headers]
    if body or method in (b"POST", b"PUT", b"PATCH"):
        lines.append(b"content-length: %d\r\n" % len(body))
    return b"".join(lines) + b"\r\n"
