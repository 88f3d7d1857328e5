"""Requests that cannot work get an error in OpenAI's form, and the server goes on serving the others."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server import MODEL_NAME, Server, chat_text

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A small model with as much room as the demo model."""
    folder = tmp_path_factory.mktemp("bad")
    model = Path(shutil.copytree(tiny_folder, folder / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    flags = ("--load-format", "dummy", "--tp", "2", "--max-num-seqs", "8", "--api-key", "secret", "--api-key", "other")
    with Server.running(model, *flags, folder=folder) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"authorization": "Bearer secret"}, timeout=60) as opened:
        yield opened


@pytest.fixture(scope="module")
def greeting(server: Server) -> str:
    with server.client() as client:
        return chat_text(client, "Hi")


@pytest.fixture(autouse=True)
def _server_goes_on(server: Server, greeting: str) -> Iterator[None]:
    """After each request that fails, another client gets what it always got."""
    yield
    with server.client() as client:
        assert chat_text(client, "Hi") == greeting
    assert server.health()[0] == 200


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


BAD_FIELDS: list[tuple[str, dict[str, Any], int, str | None]] = [
    (CHAT, {"model": "nobody"}, 404, "model"),
    (CHAT, {"model": 3}, 400, "model"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": "Hi"}, 400, "messages"),
    (CHAT, {"messages": [{"role": "king", "content": "Hi"}]}, 400, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0]"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, 400, None),
    (CHAT, {"temperature": -1}, 400, "temperature"),
    (CHAT, {"temperature": 1e9}, 400, "temperature"),
    (CHAT, {"temperature": "hot"}, 400, "temperature"),
    (CHAT, {"top_p": 0}, 400, "top_p"),
    (CHAT, {"top_p": 1.5}, 400, "top_p"),
    (CHAT, {"n": 0}, 400, "n"),
    (CHAT, {"n": -1}, 400, "n"),
    (CHAT, {"n": 10**6}, 400, "n"),
    (CHAT, {"max_tokens": 0}, 400, "max_tokens"),
    (CHAT, {"max_tokens": -5}, 400, "max_tokens"),
    (CHAT, {"max_tokens": 10**30}, 400, "max_tokens"),
    (CHAT, {"max_tokens": 1.5}, 400, "max_tokens"),
    (CHAT, {"max_tokens": 10**6}, 400, "max_tokens"),
    (CHAT, {"max_completion_tokens": 0}, 400, "max_completion_tokens"),
    (CHAT, {"frequency_penalty": 3}, 400, "frequency_penalty"),
    (CHAT, {"presence_penalty": -3}, 400, "presence_penalty"),
    (CHAT, {"logit_bias": {"5": 1000}}, 400, "logit_bias"),
    (CHAT, {"logit_bias": {"-5": 1}}, 400, "logit_bias"),
    (CHAT, {"logit_bias": {"99999999": 1}}, 400, "logit_bias"),
    (CHAT, {"logit_bias": {"word": 1}}, 400, "logit_bias"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    (CHAT, {"top_logprobs": 2}, 400, None),
    (CHAT, {"seed": 2**70}, 400, "seed"),
    (CHAT, {"stop": [""]}, 400, "stop[0]"),
    (CHAT, {"stop": ["x"] * 100}, 400, "stop"),
    (CHAT, {"stream": "yes"}, 400, "stream"),
    (CHAT, {"stream_options": {"include_usage": True}}, 400, None),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 9000}]}, 400, None),
    (TEXT, {"prompt": ""}, 400, "prompt"),
    (TEXT, {"prompt": []}, 400, "prompt"),
    (TEXT, {"prompt": [-1]}, 400, "prompt[0]"),
    (TEXT, {"prompt": [49152]}, 400, "prompt"),
    (TEXT, {"prompt": [5] * 9000}, 400, None),
    (TEXT, {"prompt": {"a": 1}}, 400, "prompt"),
    (TEXT, {"logprobs": 6}, 400, "logprobs"),
]


@pytest.mark.parametrize(("route", "fields", "status", "param"), BAD_FIELDS)
def test_bad_field(http: httpx.Client, route: str, fields: dict[str, Any], status: int, param: str | None) -> None:
    body = {"model": MODEL_NAME, **({"messages": HI} if route == CHAT else {"prompt": "Hi"}), **fields}
    reply = http.post(route, content=json.dumps(body), headers={"content-type": "application/json"})
    error = error_of(reply, status)
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert (error["param"] or "").startswith(param)


BAD_BODIES: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("cut off", b'{"model": "demo", "messages": [{"role": "us'),
    ("not an object", b"[1, 2]"),
    ("null", b"null"),
    ("NaN", b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": NaN}'),
    ("Infinity", b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": Infinity}'),
    ("overflow", b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": 1e999}'),
    ("NaN bias", b'{"messages": [{"role": "user", "content": "Hi"}], "logit_bias": {"5": NaN}}'),
    ("invalid UTF-8", b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}'),
    ("UTF-16", '{"messages": [{"role": "user", "content": "Hi"}]}'.encode("utf-16")),
    ("NUL bytes", b"\x00" * 100),
    ("deep", b"[" * 100_000),
    ("form", b"model=demo&prompt=Hi"),
]


@pytest.mark.parametrize(("name", "body"), BAD_BODIES)
@pytest.mark.parametrize("route", [CHAT, TEXT])
def test_bad_body(http: httpx.Client, route: str, name: str, body: bytes) -> None:
    reply = http.post(route, content=body, headers={"content-type": "application/json"})
    assert error_of(reply, 400)["type"] == "invalid_request_error", name


def test_too_long_prompts_have_their_own_code(http: httpx.Client) -> None:
    for route, fields in (
        (CHAT, {"messages": [{"role": "user", "content": "word " * 9000}]}),
        (TEXT, {"prompt": [5] * 8192}),
    ):
        error = error_of(http.post(route, json=fields), 400)
        assert error["code"] == "context_length_exceeded"
        assert "8192" in error["message"]


def test_huge_body(http: httpx.Client, server: Server) -> None:
    refused = http.post(CHAT, content=b" " * (17 << 20), headers={"content-type": "application/json"})
    assert error_of(refused, 413)["code"] == "request_too_large"
    # A body that does not say how long it will be is refused as it comes.
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as raw:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nTransfer-Encoding: chunked\r\n\r\n"
        raw.sendall(head.encode())
        chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        for _ in range(17):
            raw.sendall(chunk)
        answer = raw.recv(4096)
    assert b" 413 " in answer.split(b"\r\n", 1)[0]


def test_unknown_route_and_wrong_method(http: httpx.Client) -> None:
    assert error_of(http.get("/v1/nothing"), 404)["code"] == "unknown_route"
    assert error_of(http.post("/v2/chat/completions", json={}), 404)["code"] == "unknown_route"
    assert error_of(http.get(CHAT), 405)["code"] == "method_not_allowed"
    assert error_of(http.delete("/v1/models"), 405)["code"] == "method_not_allowed"


def test_not_http(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(b"\x16\x03\x01 this is TLS, or nothing at all\r\n\r\n")
        assert raw.recv(4096).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic secret", "Bearer s\xe9cret"])
def test_wrong_api_key(server: Server, header: str | None) -> None:
    headers = [] if header is None else [(b"authorization", header.encode("latin-1"))]
    reply = httpx.post(f"{server.url}{CHAT}", json={"messages": HI}, headers=headers)
    assert error_of(reply, 401)["code"] == "invalid_api_key"
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_every_api_key_opens(server: Server) -> None:
    for key in ("secret", "other"):
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
            assert [model.id for model in client.models.list()] == [MODEL_NAME]


def test_failed_requests_hold_nothing(server: Server) -> None:
    metrics = server.metrics()
    assert metrics["tpserve_num_requests_running"] == metrics["tpserve_num_requests_waiting"] == 0
    assert metrics["tpserve_kv_cache_usage_perc"] == 0
    assert not any(line.startswith("Traceback") for line in server.log.splitlines())
