"""Starting, losing the coordinator and finding it again, draining."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import uvicorn

from tpserve.coordinator.gateway import __main__ as gateway
from tpserve.coordinator.gateway.config import ConfigError, GatewayConfig
from tpserve.coordinator.gateway.engine_client import EngineClient
from tpserve.coordinator.gateway.tls import TlsServer
from unit.gateway.conftest import StackFactory
from unit.gateway.test_chat import HI
from unit.gateway.test_protocol import USER

CHAT = "/v1/chat/completions"
REQUIRED: dict[str, Any] = {"engine_address": "127.0.0.1:1", "model_dir": "/m", "served_model_names": ["m"]}


async def test_lost_session_fails_requests_and_comes_back(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        stack.engine.gate.clear()
        outbox = await stack.engine.sessions.get()
        stream = await stack.client.chat.completions.create(model="tiny", messages=HI, stream=True)
        waiting = asyncio.create_task(stack.http.post(CHAT, json={"messages": [USER]}))
        for _ in range(2):
            await stack.engine.arrivals.get()
        outbox.put_nowait(None)
        with pytest.raises(openai.APIError, match="session with the engine was lost"):
            async for _ in stream:
                pass
        assert (await waiting).status_code == 503
        stack.engine.gate.set()
        async with asyncio.timeout(10):
            await stack.engine.sessions.get()
            await stack.until_state("ready")
        assert (await stack.http.post(CHAT, json={"messages": [USER], "max_tokens": 1})).status_code == 200


async def test_a_coordinator_that_is_gone(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        address = stack.service.config.engine_address
        await stack.engine_server.stop(None)
        async with asyncio.timeout(10):
            body = await stack.until_state("disconnected")
        assert address in body["detail"]
        refused = await stack.http.post(CHAT, json={"messages": [USER]})
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "engine_unavailable"
        assert "tpserve_gateway_engine_up 0.0" in (await stack.http.get("/metrics")).text
        again, _ = await stack.engine.start(address)
        async with asyncio.timeout(10):
            await stack.until_state("ready")
        assert (await stack.http.post(CHAT, json={"messages": [USER], "max_tokens": 1})).status_code == 200
        stack.engine_server = again


async def test_a_coordinator_that_hangs_is_not_healthy(make_stack: StackFactory) -> None:
    async with make_stack(rpc_timeout_s=0.05) as stack:
        stack.engine.answering.clear()
        async with asyncio.timeout(10):
            await stack.until_state("unresponsive")
        stack.engine.answering.set()
        async with asyncio.timeout(10):
            await stack.until_state("ready")
        assert stack.engine.sessions.qsize() == 1


async def test_a_coordinator_that_hangs_for_long_is_given_up(make_stack: StackFactory) -> None:
    async with make_stack(rpc_timeout_s=0.05, session_timeout_s=0.2) as stack:
        stack.engine.gate.clear()
        waiting = asyncio.create_task(stack.http.post(CHAT, json={"messages": [USER]}))
        await stack.engine.arrivals.get()
        stack.engine.answering.clear()
        assert (await asyncio.wait_for(waiting, 10)).status_code == 503
        assert (await stack.until_state("disconnected"))["status"] == "disconnected"
        stack.engine.answering.set()
        async with asyncio.timeout(10):
            await stack.until_state("ready")


async def test_who_is_not_with_the_engine_when_the_grace_ends_is_told_to_go_elsewhere(
    make_stack: StackFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example while a grammar is compiled: a router then asks another replica."""
    has_come = asyncio.Event()

    async def check(*_: object, **__: object) -> None:
        has_come.set()
        await asyncio.sleep(60)

    async with make_stack(drain_timeout_s=0.0) as stack:
        monkeypatch.setattr(stack.service.grammars, "check", check)
        body = {"messages": [USER], "response_format": {"type": "json_object"}}
        waiting = asyncio.create_task(stack.http.post(CHAT, json=body))
        await asyncio.wait_for(has_come.wait(), 5)
        os.kill(os.getpid(), signal.SIGTERM)
        refused = await asyncio.wait_for(waiting, 10)
        await asyncio.wait_for(stack.serving, 10)
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["message"] == "The server is shutting down"


async def test_sigterm_drains_and_ends_in_peace(make_stack: StackFactory) -> None:
    async with make_stack(drain_timeout_s=20.0) as stack:
        stack.engine.gate.clear()
        stream = await stack.client.chat.completions.create(
            model="tiny",
            messages=HI,
            stream=True,
            max_tokens=5,
            extra_body={"ignore_eos": True},
        )
        first = await anext(aiter(stream))
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(stack.server.draining.wait(), 5)
        stack.engine.gate.set()
        rest = [chunk async for chunk in stream]
        await asyncio.wait_for(stack.serving, 10)
        assert first.choices[0].delta.role == "assistant"
        assert rest[-1].choices[0].finish_reason == "length"


async def test_drain_ends_at_its_deadline(make_stack: StackFactory) -> None:
    async with make_stack(drain_timeout_s=0.1) as stack:
        stack.engine.gate.clear()
        stream = await stack.client.chat.completions.create(model="tiny", messages=HI, stream=True)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            async for _ in stream:
                pass
        await asyncio.wait_for(stack.serving, 10)


def test_busy_port_is_one_line(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        config = {**REQUIRED, "model_dir": str(model_dir), "port": port}
        assert gateway.main([json.dumps(config)]) == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"cannot listen on 127.0.0.1:{port}: Address already in use"
    ]


def test_missing_model_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert gateway.main([json.dumps({**REQUIRED, "model_dir": str(tmp_path), "port": 0})]) == 1
    told = f"{tmp_path / 'tokenizer.json'} is missing: put the model's tokenizer beside its config.json"
    assert [record.getMessage() for record in caplog.records] == [told]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prot": 1}, "unknown fields: prot"),
        ({"port": "80"}, "port is '80'"),
        ({"port": True}, "port is True"),
        ({"port": 70000}, "port is 70000"),
        ({"api_keys": "secret"}, "api_keys"),
        ({"api_keys": [""]}, "empty key"),
        ({"served_model_names": []}, "served_model_names is empty"),
        ({"engine_address": "here"}, "host:port"),
        ({"rpc_timeout_s": 0}, "rpc_timeout_s is 0"),
        ({"drain_timeout_s": -1}, "drain_timeout_s is -1"),
        ({"log_level": "loud"}, "loud"),
    ],
)
def test_bad_config(changes: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture) -> None:
    text = json.dumps({**REQUIRED, **changes})
    with pytest.raises(ConfigError, match=message):
        GatewayConfig.from_json(text)
    assert gateway.main([text]) == 2
    assert message in caplog.text


@pytest.mark.parametrize("text", ["", "[]", "{", "{}"])
def test_config_that_is_no_object(text: str) -> None:
    with pytest.raises(ConfigError):
        GatewayConfig.from_json(text)


def test_config_reads_lists_and_numbers() -> None:
    config = GatewayConfig.from_json(json.dumps({**REQUIRED, "api_keys": ["a", "b"], "drain_timeout_s": 0}))
    assert config.api_keys == ("a", "b")
    assert config.drain_timeout_s == 0.0


async def test_a_writer_ends_when_cancelled_just_as_a_write_ends() -> None:
    """`asyncio.wait_for` of Python 3.11 drops such a cancellation, and the gateway's end hung."""
    written = asyncio.get_running_loop().create_future()
    outbox: asyncio.Queue[Any] = asyncio.Queue()
    outbox.put_nowait(None)
    client = EngineClient("127.0.0.1:1", rpc_timeout_s=5, session_timeout_s=5)
    call: Any = SimpleNamespace(write=lambda _: written)
    writer = asyncio.create_task(client._write(call, outbox))
    await asyncio.sleep(0.01)
    written.set_result(None)
    writer.cancel()
    done, _ = await asyncio.wait([writer], timeout=2)
    assert done


async def test_it_ends_when_it_is_told_to(make_stack: StackFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not when uvicorn looks next."""
    never = asyncio.Event()
    monkeypatch.setattr(uvicorn.Server, "main_loop", lambda _: never.wait())
    async with make_stack() as stack:
        assert not stack.server.should_exit
        stack.server.should_exit = True
        async with asyncio.timeout(20):
            await stack.serving


async def test_what_fails_while_it_runs_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_: uvicorn.Server) -> None:
        raise OSError("no more")

    monkeypatch.setattr(uvicorn.Server, "main_loop", fail)
    server = TlsServer(uvicorn.Config("unused"), None)
    with pytest.raises(OSError, match="no more"):
        await server.main_loop()
