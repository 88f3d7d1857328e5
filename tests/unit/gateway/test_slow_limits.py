"""Clients that are slow, or never end: each connection is given up by a deadline, and costs nobody else anything."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
from collections.abc import AsyncIterator

import pytest

from tpserve.coordinator.gateway import guard
from tpserve.coordinator.gateway.tokenizer import Tokenizer
from unit.gateway.conftest import Stack, StackFactory
from unit.gateway.scripted_engine import ScriptedEngine, seeded_script
from unit.gateway.test_protocol import USER

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
BODY = json.dumps({"messages": [USER], "max_tokens": 1}).encode()


@contextlib.asynccontextmanager
async def connection(stack: Stack) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port = stack.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        async with asyncio.timeout(20):
            yield reader, writer
    finally:
        writer.close()


async def everything(reader: asyncio.StreamReader) -> bytes:
    """Return what comes until the server closes; a reset is a close, too."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := await reader.read(65536):
            parts.append(part)
    return b"".join(parts)


async def drip(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Send a byte now and then, as a client does that wants to hold a connection for long."""
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(0.05)


async def assert_serves(stack: Stack) -> None:
    assert (await stack.http.post("/v1/chat/completions", content=BODY)).status_code == 200


async def test_slow_headers(make_stack: StackFactory) -> None:
    async with make_stack(header_timeout_s=0.3) as stack:
        async with connection(stack) as (reader, _):
            assert await everything(reader) == b"", "one that says nothing"
        async with connection(stack) as (reader, writer):
            writer.write(HEAD)
            dripping = asyncio.create_task(drip(writer, b"x-a: b\r\n"))
            answer = await everything(reader)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_too_slow"
            await dripping
        async with connection(stack) as (reader, writer):  # in the second request of a connection
            writer.write(HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY)
            first = await reader.readuntil(b'"cached_tokens":')
            assert first.startswith(b"HTTP/1.1 200")
            writer.write(HEAD)
            assert b"HTTP/1.1 408 " in await everything(reader)
        await assert_serves(stack)


async def test_an_idle_connection_may_stay_longer_than_headers_may_take(make_stack: StackFactory) -> None:
    async with make_stack(header_timeout_s=0.2) as stack:
        await assert_serves(stack)
        await asyncio.sleep(0.5)
        (held,) = stack.server.server_state.connections
        await assert_serves(stack)
        assert stack.server.server_state.connections == {held}, "it was the same connection"


async def test_endless_headers(make_stack: StackFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_HEADER_BYTES", 10_000)
    async with make_stack() as stack:
        for filler in (b"x-a: b\r\n" * 500, b"x" * 4000):
            async with connection(stack) as (reader, writer):
                writer.write(HEAD + b"x-long: ")
                with contextlib.suppress(ConnectionError):
                    for _ in range(100):
                        writer.write(filler)
                        await writer.drain()
                        await asyncio.sleep(0)
                answer = await everything(reader)
                assert answer.startswith(b"HTTP/1.1 431 ") or not answer  # a reset may overtake it
        await assert_serves(stack)
        whole = await stack.http.post("/v1/chat/completions", content=b" " * 100_000 + BODY)
        assert whole.status_code == 200, "a body is no header"


async def test_slow_body(make_stack: StackFactory) -> None:
    async with make_stack(body_timeout_s=0.3) as stack:
        for head in (b"content-length: 1000\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n"):
            async with connection(stack) as (reader, writer):
                writer.write(HEAD + head)
                dripping = asyncio.create_task(drip(writer, b"1\r\n \r\n" if b"chunked" in head else b" "))
                answer = await everything(reader)
                assert answer.startswith(b"HTTP/1.1 408 ")
                assert b"connection: close" in answer
                error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
                assert error["code"] == "request_too_slow"
                assert "0.3 s" in error["message"]
                await dripping
        await assert_serves(stack)


async def test_a_large_body_may_take_its_time(make_stack: StackFactory) -> None:
    """At more than 16 KiB a second it may take longer than the time-out."""

    async def steady() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b" " * 65536
            await asyncio.sleep(0.05)
        yield BODY

    async with make_stack(body_timeout_s=0.2) as stack:
        assert (await stack.http.post("/v1/chat/completions", content=steady())).status_code == 200


async def test_a_body_that_nobody_reads_ends(make_stack: StackFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_LINGER_S", 0.3)
    async with make_stack(api_keys=("k",)) as stack:
        async with connection(stack) as (reader, writer):
            writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n")
            dripping = asyncio.create_task(drip(writer, b"1\r\n \r\n"))
            assert (await everything(reader)).startswith(b"HTTP/1.1 401 ")
            await dripping


async def test_a_client_that_does_not_read_its_stream_is_cut_off(
    make_stack: StackFactory, tokenizer: Tokenizer
) -> None:
    vocab_size = tokenizer.vocab_size
    engine = ScriptedEngine(seeded_script(vocab_size), vocab_size, max_model_len=10**6, tokens_per_event=100)
    async with make_stack(engine, write_timeout_s=0.4) as stack:
        body = {"messages": [USER], "max_tokens": 40_000, "stream": True, "ignore_eos": True}
        body |= {"logprobs": True, "top_logprobs": 20}  # bytes enough to fill every buffer on the way
        content = json.dumps(body).encode()
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.setblocking(False)
            host, port = stack.url.removeprefix("http://").split(":")
            loop = asyncio.get_running_loop()
            await loop.sock_connect(raw, (host, int(port)))
            await loop.sock_sendall(raw, HEAD + b"content-length: %d\r\n\r\n" % len(content) + content)
            async with asyncio.timeout(60):
                await stack.engine.arrivals.get()
                await stack.engine.aborts.get()
        await assert_serves(stack)


TOO_MUCH: list[tuple[dict[str, object], str]] = [
    ({"stop": ["x"] * 17}, "17 stop strings were given; at most 16"),
    ({"stop": "x" * 1025}, "1024 characters"),
    ({"n": 129}, "less than or equal to 128"),
    ({"logit_bias": dict.fromkeys(map(str, range(4097)), 1)}, "at most 4096"),
    ({"stop_token_ids": [5] * 129}, "at most 128"),
    ({"guided_choice": ["a"] * 4097}, "at most 4096"),
    ({"guided_choice": ["a" * 300_000]}, "262144"),
    ({"guided_regex": "a" * 300_000}, "262144"),
    ({"guided_grammar": "root ::= " + '"a" ' * 70_000}, "262144"),
    ({"guided_json": {"enum": ["a" * 300_000]}}, "262144"),
    ({"guided_json": json.dumps({"enum": ["a" * 300_000]})}, "262144"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["a" * 300_000]}}}}, "262144"),
    ({"messages": [{"role": "user", "content": "the " * 3000}]}, "512"),
    ({"messages": [{"role": "user", "content": "a"}] * (2**16 + 1)}, "at most 65536"),
    ({"tools": [{"type": "function", "function": {"name": f"f{n}"}} for n in range(129)]}, "at most 128"),
]
"""A request's fields, and what the refusal names."""


async def test_sizes_of_requests(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        for fields, words in TOO_MUCH:
            reply = await stack.http.post("/v1/chat/completions", json={"messages": [USER], **fields})
            assert reply.status_code == 400, (words, reply.text[:300])
            assert words in reply.json()["error"]["message"]
            assert len(reply.json()["error"]["message"]) < 1000
        assert stack.engine.submits == []


async def test_a_full_server_lets_idle_connections_go_and_refuses_only_where_all_are_in_use(
    make_stack: StackFactory,
) -> None:
    request = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"
    async with make_stack(max_connections=3) as stack, contextlib.AsyncExitStack() as opened:
        await stack.http.aclose()  # has a connection of its own

        async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            return await opened.enter_async_context(connection(stack))

        idle_reader, idle_writer = await connect()
        idle_writer.write(request)
        assert (await idle_reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200 ")
        busy = [await connect() for _ in range(2)]
        for _, writer in busy:
            writer.write(HEAD + b"content-length: 1000\r\n\r\n{")  # their bodies are awaited
        # A fourth: the one that only waits for a next request goes.
        reader, writer = await connect()
        await everything(idle_reader)
        assert idle_reader.at_eof()
        writer.write(request)
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200 ")
        writer.write(HEAD + b"content-length: 1000\r\n\r\n{")
        await asyncio.sleep(0.1)
        # Now all three are in use.
        refused, _ = await connect()
        answer = await everything(refused)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: 1\r\n" in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_connections"
        busy[0][1].close()
        await asyncio.sleep(0.1)
        reader, writer = await connect()
        writer.write(request)
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200 "), "there is room again"


@pytest.mark.parametrize(("files", "each", "limit"), [(1024, 1, 896), (1024, 2, 448), (64, 1, 32), (1 << 20, 1, 4096)])
def test_there_are_no_more_connections_than_files(
    files: int, each: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert guard.connection_limit(4096, each) == limit
    assert guard.connection_limit(5, each) == 5
