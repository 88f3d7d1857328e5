"""One HTTP connection with deadlines: for headers that do not come, and for a client that does not read.

uvicorn has a deadline for idle connections alone, and no limit on headers. Bodies have theirs in `limited_body`. Nor
does it bound connections: without files left, none is taken for a second, and none that holds one is let go.
"""

from __future__ import annotations

import asyncio
import http
import logging
import resource
from collections.abc import Callable
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tpserve.coordinator.gateway.errors import error_object

logger = logging.getLogger(__name__)

HEADER_TIMEOUT_S = 30.0
"""From the first byte of a connection or a request to the end of its headers."""
WRITE_TIMEOUT_S = 60.0
"""Without a byte read by the client while its answer waits."""
MAX_HEADER_BYTES = 64 * 1024
MAX_CONNECTIONS = 4096
"""Of one process."""
_OTHER_FILES = 128
"""Of a process, besides connections of clients."""
_LINGER_S = 5.0
"""A client that was answered before its body was read may send so long: closing at once could cost it the answer."""


def connection_limit(wanted: int, files_each: int = 1) -> int:
    """Return how many connections this process may hold: `wanted`, or as many as it may have files for.

    Parameters
    ----------
    files_each
        A router has a connection to a replica besides.
    """
    num_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if num_files == resource.RLIM_INFINITY:
        return wanted
    most = max(1, (num_files - min(_OTHER_FILES, num_files // 2)) // files_each)
    if most < wanted:
        logger.info("at most %d connections at once, as this process may open %d files (ulimit -n)", most, num_files)
    return min(wanted, most)


def guarded_protocol(
    header_timeout_s: float = HEADER_TIMEOUT_S,
    write_timeout_s: float = WRITE_TIMEOUT_S,
    max_connections: int = MAX_CONNECTIONS,
) -> type[GuardedProtocol]:
    """Return the protocol class for uvicorn's `http` with these deadlines and this limit."""

    class Protocol(GuardedProtocol):
        header_timeout = header_timeout_s
        write_timeout = write_timeout_s
        most_connections = max_connections

    return Protocol


class GuardedProtocol(HttpToolsProtocol):
    """See above. Timers are set and cancelled as the connection goes from one state to the next."""

    header_timeout = HEADER_TIMEOUT_S
    write_timeout = WRITE_TIMEOUT_S
    most_connections = MAX_CONNECTIONS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_in_head = True
        """Between requests, or in the headers of one."""
        self._num_changes = 0
        """Of `_is_in_head`."""
        self._head_bytes = 0
        self._head_timer = _Timer(self.loop)
        self._write_timer = _Timer(self.loop)
        self._end_timer = _Timer(self.loop)

    # ---- reading

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as the base class has it
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._arm_head_timer()
        if len(self.connections) > self.most_connections and not self._let_idle_go():
            message = f"The server has {self.most_connections} connections already, and all are in use"
            self._refuse(503, message, "too_many_connections", "server_error", "retry-after: 1\r\n")

    def _let_idle_go(self) -> bool:
        """Close a connection that is kept for a next request, which clients must expect; tell whether there is one."""
        for other in self.connections:
            if isinstance(other, GuardedProtocol) and other.is_idle:
                other.transport.close()
                return True
        return False

    @property
    def is_idle(self) -> bool:
        """Whether it has had an answer, and nothing of a next request has come."""
        between = self._is_in_head and not self._head_bytes and not self._is_answering
        return between and self._num_changes > 0 and not self.transport.is_closing()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        num_changes = self._num_changes
        super().data_received(data)
        if not self._is_in_head or num_changes != self._num_changes:
            self._head_bytes = 0
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEADER_BYTES:
            self._refuse(431, f"The headers have more than {MAX_HEADER_BYTES} bytes", "headers_too_large")
        elif not self._head_timer.is_running:
            self._arm_head_timer()

    def on_headers_complete(self) -> None:
        """See httptools."""
        self._is_in_head = False
        self._num_changes += 1
        self._head_timer.cancel()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """See httptools."""
        super().on_message_complete()
        self._is_in_head = True
        self._num_changes += 1
        if self.transport is not None and not self.transport.is_closing():
            self._end_timer.cancel()

    def _arm_head_timer(self) -> None:
        self._head_timer.start(self.header_timeout, self._on_head_timeout)

    def _on_head_timeout(self) -> None:
        self._head_timer.cancel()
        if self._is_answering:  # what was pipelined is not read now
            self._arm_head_timer()
        elif self._head_bytes:
            self._refuse(408, f"The headers did not come within {self.header_timeout:g} s", "request_too_slow")
        else:
            self._close()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(
        self, status: int, message: str, code: str, kind: str = "invalid_request_error", headers: str = ""
    ) -> None:
        """Say why in OpenAI's form and close; not in the middle of another answer."""
        if not self._is_answering and not self.transport.is_closing():
            body = orjson.dumps(error_object(message, kind, code=code))
            head = (
                f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\nconnection: close\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
            )
            self.transport.write(head.encode() + body)
        self._close()

    # ---- writing

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        super().pause_writing()
        self._write_timer.start(self.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._write_timer.cancel()
        super().resume_writing()

    def on_response_complete(self) -> None:
        """See uvicorn."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._abort_later(self.write_timeout)
        elif not self._is_in_head:
            self._abort_later(_LINGER_S)

    # ---- the end

    def timeout_keep_alive_handler(self) -> None:
        """See uvicorn."""
        super().timeout_keep_alive_handler()
        self._abort_later(self.write_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._head_timer.cancel()
        self._write_timer.cancel()
        self._end_timer.cancel()
        super().connection_lost(exc)

    def _close(self) -> None:
        """Close once what was written is read, which may be never."""
        self.transport.close()
        self._abort_later(self.write_timeout)

    def _abort_later(self, after_s: float) -> None:
        self._end_timer.start(after_s, self.transport.abort)


class _Timer:
    """Calls once, unless it is cancelled or started anew."""

    __slots__ = ("_handle", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    @property
    def is_running(self) -> bool:
        return self._handle is not None

    def start(self, after_s: float, callback: Callable[[], object]) -> None:
        self.cancel()
        self._handle = self._loop.call_later(after_s, callback)

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
