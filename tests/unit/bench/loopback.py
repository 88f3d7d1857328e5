"""An endpoint on a real socket whose tokens wait for the client to have read the last ones: exact times, no waiting."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Loopback:
    """Answers every completion by the same script of (time, bytes of the body)."""

    script: Sequence[tuple[float, bytes]]
    now_s: float = 0.0
    num_requests: int = 0
    url: str = ""
    drops: bool = False
    """Ends the connection after the script, in place of the body's regular end."""
    _read: asyncio.Event = field(default_factory=asyncio.Event)
    _handlers: set[asyncio.Task[None]] = field(default_factory=set)

    def clock(self) -> float:
        """The client's clock: when it is looked at, the client has read what was sent."""
        self._read.set()
        return self.now_s

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        while head := await self._head(reader):
            length = next(int(line[15:]) for line in head.splitlines() if line.lower().startswith("content-length"))
            await reader.readexactly(length)
            self.num_requests += 1
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            for time_s, data in self.script:
                await self._read.wait()
                self._read.clear()
                self.now_s = time_s
                writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            await self._read.wait()
            if self.drops:
                break
            writer.write(b"0\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    async def _head(self, reader: asyncio.StreamReader) -> str:
        try:
            return (await reader.readuntil(b"\r\n\r\n")).decode()
        except asyncio.IncompleteReadError:
            return ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Loopback]:
        server = await asyncio.start_server(self.answer, "127.0.0.1", 0)
        async with server:
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            yield self
        await asyncio.gather(*self._handlers)


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"
