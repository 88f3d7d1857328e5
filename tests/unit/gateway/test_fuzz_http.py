"""Bodies and bytes that nobody should send, at the real HTTP door: an answer below 500 in time, and it goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzzing import VALUES, fuzz, mutated_bytes, mutated_json
from unit.gateway.conftest import StackFactory
from unit.gateway.test_protocol import USER

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [USER, {"role": "assistant", "content": "Yes."}, USER]}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT | {"max_tokens": 3, "temperature": 0.5, "stop": ["x"], "seed": 1, "n": 2}),
    ("/v1/chat/completions", CHAT | {"max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/chat/completions", CHAT | {"max_tokens": 3, "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": 1}}),
    ("/v1/chat/completions", CHAT | {"max_tokens": 3, "tools": [TOOL], "tool_choice": "auto"}),
    (
        "/v1/chat/completions",
        CHAT | {"max_tokens": 3, "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    ),
    ("/v1/chat/completions", CHAT | {"max_tokens": 3, "chat_template_kwargs": {"enable_thinking": False}}),
    ("/v1/completions", {"prompt": ["the", "quick"], "max_tokens": 3, "echo": True, "logprobs": None}),
    ("/v1/completions", {"prompt": [5, 6], "max_tokens": 3, "guided_regex": "[ab]+"}),
    ("/v1/responses", {"input": [{"role": "user", "content": "hi"}], "max_output_tokens": 3, "tools": []}),
    ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"}),
    ("/tokenize", {"prompt": "hello", "add_special_tokens": True}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
]


def assert_good(reply: httpx.Response, sent: object) -> None:
    assert reply.status_code < 500, (sent, reply.text)
    if reply.status_code >= 400:
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, sent
        assert len(error["message"]) < 3000, sent


async def test_bodies(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        await asyncio.to_thread(send_bodies, stack.url)


def send_bodies(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as http:

        @fuzz(150)
        @given(st.data())
        def mutated(data: st.DataObject) -> None:
            path, whole = data.draw(st.sampled_from(BODIES))
            body = data.draw(mutated_json(whole))
            assert_good(http.post(path, content=json.dumps(body)), (path, body))

        @fuzz(100)
        @given(st.data())
        def broken(data: st.DataObject) -> None:
            path, whole = data.draw(st.sampled_from(BODIES))
            text = json.dumps(whole).encode()
            body = data.draw(st.one_of(mutated_bytes(text), st.binary(max_size=200), VALUES.map(json_bytes)))
            assert_good(http.post(path, content=body), (path, body))

        mutated()
        broken()
        assert http.get("/health").status_code == 200


def json_bytes(value: object) -> bytes:
    return json.dumps(value).encode()


REQUEST = b"POST /v1/chat/completions?a=b HTTP/1.1\r\nhost: x\r\nauthorization: Bearer k\r\nx-request-id: a\r\n"
CHUNKED = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


async def test_bytes_of_http(make_stack: StackFactory) -> None:
    async with make_stack(header_timeout_s=0.5, body_timeout_s=0.5) as stack:
        await asyncio.to_thread(send_bytes, stack.url)


def send_bytes(url: str) -> None:
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    body = json.dumps(BODIES[0][1]).encode()
    whole = REQUEST + b"content-length: %d\r\n\r\n" % len(body) + body
    chunked = CHUNKED + b'5\r\n{"a":\r\n2\r\n1}\r\n0\r\n\r\n'

    @fuzz(150)
    @given(st.one_of(mutated_bytes(whole), mutated_bytes(chunked), st.binary(max_size=300)))
    def check(sent: bytes) -> None:
        answer = b""
        with socket.create_connection(address, timeout=60) as raw, contextlib.suppress(ConnectionError):
            raw.sendall(sent)
            raw.shutdown(socket.SHUT_WR)
            while part := raw.recv(65536):
                answer += part
        assert b"HTTP/1.1 5" not in answer, sent

    check()
    assert httpx.post(f"{url}/v1/chat/completions", content=body, timeout=60).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/models/%ff", "/v1/models/%00", "/v1/models/" + "a" * 5000, "/health/%0d%0a", "//"]
)
async def test_paths(make_stack: StackFactory, path: str) -> None:
    async with make_stack() as stack:
        reply = await stack.http.get(stack.url + path)
        assert reply.status_code == 404
        assert len(reply.text) < 1000
