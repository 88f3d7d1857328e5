"""The router's HTTP client against a peer that writes what the test says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tpserve.coordinator.router.upstream import Upstream, UpstreamLost

Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@contextlib.asynccontextmanager
async def upstream(peer: Peer) -> AsyncIterator[Upstream]:
    peers: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        peers.add(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await peer(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    found = Upstream("127.0.0.1", server.sockets[0].getsockname()[1])
    try:
        yield found
    finally:
        found.close()
        server.close()
        for task in peers:
            task.cancel()
        await asyncio.gather(*peers)


async def take(reader: asyncio.StreamReader) -> bytes:
    """Read one request with its body."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next((int(line[16:]) for line in head.split(b"\r\n") if line.startswith(b"content-length: ")), 0)
    return head + await reader.readexactly(length)


async def test_an_answer_in_any_pieces_over_one_connection() -> None:
    requests: list[bytes] = []
    connections = 0

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            requests.append(await take(reader))
            for byte in b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n":
                writer.write(bytes([byte]))
                await writer.drain()

    async with upstream(peer) as found:
        for number in range(3):
            response = await found.request(b"POST", b"/v1/x?y=%d" % number, [(b"a", b"b")], b"x" * 50_000 * number)
            assert response.status == 200
            assert response.is_stream
            assert (b"transfer-encoding", b"chunked") in response.headers
            assert await response.body() == b"hello world"
            response.close()
            assert not found.active
        assert connections == 1
        for number, request in enumerate(requests):
            assert request.startswith(b"POST /v1/x?y=%d HTTP/1.1\r\nhost: 127.0.0.1:" % number)
            assert b"\r\na: b\r\n" in request
            assert request.endswith(b"\r\n\r\n" + b"x" * 50_000 * number)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"", "closed"),
        (b"HTTP/1.1 20", "closed"),
        (OK + b"5\r\nhel", "closed"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhello", "closed"),
        (b"SSH-2.0-OpenSSH\r\n", "does not speak HTTP"),
        (OK + b"zz\r\n", "does not speak HTTP"),
    ],
)
async def test_an_answer_that_breaks(answer: bytes, says: str) -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take(reader)
        writer.write(answer)
        await writer.drain()

    async with upstream(peer) as found:
        with pytest.raises(UpstreamLost, match=says) as lost:
            await (await found.request(b"GET", b"/", [])).body()
        assert lost.value.was_sent


async def test_what_came_before_the_break_is_not_lost() -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take(reader)
        writer.write(OK + b"5\r\nhello\r\n")
        await writer.drain()

    async with upstream(peer) as found:
        response = await found.request(b"GET", b"/", [])
        await asyncio.sleep(0.05)
        assert await response.read() == b"hello"
        with pytest.raises(UpstreamLost):
            await response.read()
        response.close()


async def test_nobody_listens() -> None:
    async with upstream(lambda reader, writer: asyncio.sleep(0)) as found:
        pass
    with pytest.raises(UpstreamLost, match="no connection") as lost:
        await found.request(b"GET", b"/", [])
    assert not lost.value.was_sent


async def test_a_kept_connection_that_the_replica_has_closed_is_no_loss() -> None:
    connections = 0

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await take(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        await writer.drain()
        if connections == 1:
            await reader.readexactly(1)  # the next request is on its way when it closes

    async with upstream(peer) as found:
        for _ in range(2):
            response = await found.request(b"POST", b"/", [], b"body")
            assert await response.body() == b"ok"
            response.close()
        assert connections == 2


async def test_a_reader_that_is_slow_holds_the_replica_back() -> None:
    written = 0

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await take(reader)
        writer.write(OK)
        for _ in range(400):
            writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            written += 65536
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async with upstream(peer) as found:
        response = await found.request(b"GET", b"/", [])
        await asyncio.sleep(0.3)
        assert written < 400 * 65536, "everything was taken at once"
        assert len(await response.body()) == 400 * 65536
        response.close()


async def test_silence_is_a_loss_of_streams_and_of_others_only_if_health_is_silent_too() -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await take(reader)
        if b"/stream" in request:
            writer.write(OK + b"5\r\nhello\r\n")
        await asyncio.Event().wait()  # until it is cancelled

    async with upstream(peer) as found:
        stream = await found.request(b"GET", b"/stream", [])
        whole = asyncio.create_task(found.request(b"GET", b"/whole", []))
        assert await stream.read() == b"hello"
        await asyncio.sleep(0.1)
        found.lose_silent(60.0, even_whole=True)
        found.lose_silent(0.01, even_whole=False)
        with pytest.raises(UpstreamLost, match="nothing came for"):
            await stream.read()
        stream.close()
        assert not whole.done()
        found.lose_silent(0.01, even_whole=True)
        with pytest.raises(UpstreamLost, match="nothing came for"):
            await whole
        assert not found.active
