"""What the server says when things are not as they should be, and its routes for operators."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tpserve.coordinator.gateway.tokenizer import Tokenizer
from tpserve.proto.pb import engine_pb2
from unit.gateway.conftest import StackFactory
from unit.gateway.scripted_engine import ScriptedEngine, seeded_script
from unit.gateway.test_chat import HI
from unit.gateway.test_protocol import BROKEN, USER

CHAT = "/v1/chat/completions"
READY = engine_pb2.EngineState.READY


def error_of(reply: httpx.Response) -> dict[str, Any]:
    """Check OpenAI's form and return the error object."""
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    error: dict[str, Any] = body["error"]
    return error


async def test_bad_bodies_never_fail_the_server(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        for body in BROKEN:
            reply = await stack.http.post(CHAT, content=body)
            assert (reply.status_code, error_of(reply)["type"]) == (400, "invalid_request_error")
        reply = await stack.http.post(CHAT, json={"messages": [USER], "max_tokens": 3})
        assert reply.status_code == 200


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"temperature": -1}, 400, None, "temperature"),
        ({"model": "other"}, 404, "model_not_found", "model"),
        ({"model": "x" * 10_000}, 404, "model_not_found", "model"),
        ({"logit_bias": {"100000": 1}}, 400, None, "logit_bias"),
        ({"max_tokens": 512}, 400, "context_length_exceeded", "max_tokens"),
        ({"messages": [{"role": "user", "content": "the " * 3000}]}, 400, "context_length_exceeded", None),
        ({"messages": [{**USER, "name": "nobody"}]}, 400, None, "messages"),
        ({"messages": [USER], "functions": [{"name": "f"}]}, 400, "unsupported_feature", None),
    ],
)
async def test_refusals(
    make_stack: StackFactory, fields: dict[str, Any], status: int, code: str | None, param: str | None
) -> None:
    async with make_stack() as stack:
        reply = await stack.http.post(CHAT, json={"messages": [USER], **fields})
        assert stack.engine.submits == []
    assert reply.status_code == status
    error = error_of(reply)
    assert (error["code"], error["param"]) == (code, param)
    assert len(error["message"]) < 400


async def test_far_too_long_is_refused_without_tokenising(
    make_stack: StackFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_stack() as stack:
        monkeypatch.setattr(type(stack.service.model.tokenizer), "encode", lambda *_, **__: 1 / 0)
        body = {"messages": [{"role": "user", "content": "x" * 3_000_000}]}
        reply = await stack.http.post(CHAT, json=body)
    assert (reply.status_code, error_of(reply)["code"]) == (400, "context_length_exceeded")
    assert "at least" in error_of(reply)["message"]


async def test_too_long_names_the_numbers(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        with pytest.raises(openai.BadRequestError) as caught:
            await stack.client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "the " * 3000}]
            )
    assert caught.value.code == "context_length_exceeded"
    assert "512" in str(caught.value)


async def test_routes_and_methods(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        missing = await stack.http.get("/v1/nothing")
        wrong = await stack.http.get(CHAT)
    assert (missing.status_code, error_of(missing)["code"]) == (404, "unknown_route")
    assert (wrong.status_code, error_of(wrong)["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


async def test_body_limit(make_stack: StackFactory) -> None:
    async def drip() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100

    async with make_stack(max_body_bytes=1000) as stack:
        declared = await stack.http.post(CHAT, content=b" " * 2000)
        chunked = await stack.http.post(CHAT, content=drip())
        within = await stack.http.post(CHAT, content=json.dumps({"messages": [USER], "max_tokens": 1}).ljust(1000))
    assert (declared.status_code, error_of(declared)["code"]) == (413, "request_too_large")
    assert (chunked.status_code, error_of(chunked)["code"]) == (413, "request_too_large")
    assert within.status_code == 200


async def test_api_keys(make_stack: StackFactory) -> None:
    async with make_stack(api_keys=("first", "zweiter-ü")) as stack:
        body = {"messages": [USER], "max_tokens": 1}
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "first"},
            {"authorization": "Bearer"},
        ):
            reply = await stack.http.post(CHAT, json=body, headers=headers)
            assert (reply.status_code, error_of(reply)["code"]) == (401, "invalid_api_key")
        assert (await stack.http.get("/v1/models")).status_code == 401
        for key in ("first", "zweiter-ü"):
            reply = await stack.http.post(CHAT, json=body, headers={b"authorization": f"Bearer {key}".encode()})
            assert reply.status_code == 200
        assert (await stack.http.get("/health")).status_code == 200
        assert (await stack.http.get("/metrics")).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            await stack.client.models.list()


async def test_request_ids(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        body = {"messages": [USER], "max_tokens": 1}
        given = await stack.http.post(CHAT, json=body, headers={"x-request-id": "abc-1"})
        unfit = await stack.http.post(CHAT, json=body, headers={"x-request-id": "a b" * 100})
    assert given.headers["x-request-id"] == "abc-1"
    assert stack.engine.submits[0].name == "abc-1"
    assert unfit.headers["x-request-id"] == stack.engine.submits[1].name
    assert len(unfit.headers["x-request-id"]) == 32


async def test_cors(make_stack: StackFactory) -> None:
    async with make_stack(allow_origins=("https://app.example",), api_keys=("k",)) as stack:
        headers = {"origin": "https://app.example", "access-control-request-method": "POST"}
        preflight = await stack.http.options(CHAT, headers=headers)
        other = await stack.http.options(CHAT, headers={**headers, "origin": "https://other.example"})
        refused = await stack.http.post(CHAT, json={}, headers=headers)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    assert other.status_code == 400
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://app.example"


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        (engine_pb2.Rejected.INVALID, 400, openai.BadRequestError),
        (engine_pb2.Rejected.QUEUE_FULL, 429, openai.RateLimitError),
        (engine_pb2.Rejected.UNAVAILABLE, 503, openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_rejected_before_any_header(
    make_stack: StackFactory,
    code: engine_pb2.Rejected.Code,
    status: int,
    kind: type[openai.APIStatusError],
    stream: bool,
) -> None:
    async with make_stack() as stack:
        stack.engine.rejection = engine_pb2.Rejected(code=code, message="not now", retry_after_s=7)
        with pytest.raises(kind, match="not now") as caught:
            await stack.client.chat.completions.create(model="tiny", messages=HI, stream=stream)
        assert stack.service.engine.num_live_requests == 0
    assert caught.value.status_code == status
    assert caught.value.response.headers.get("retry-after") == (None if status == 400 else "7")


async def test_failure_before_the_end(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        stack.engine.fail_after = 3
        whole = await stack.http.post(CHAT, json={"messages": [USER]})
        streamed = await stack.http.post(CHAT, json={"messages": [USER], "stream": True, "n": 2})
        with pytest.raises(openai.APIError, match="rank 1 was lost"):
            async for _ in await stack.client.chat.completions.create(model="tiny", messages=HI, stream=True):
                pass
        text = (await stack.http.get("/metrics")).text
        assert stack.service.engine.num_live_requests == 0
    assert whole.status_code == 503
    assert "rank 1 was lost" in error_of(whole)["message"]
    assert whole.headers["retry-after"] == "1"
    assert streamed.status_code == 200
    events = streamed.text.strip().split("\n\n")
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    assert "[DONE]" not in streamed.text
    assert 'tpserve_http_stream_failures_total{code="503"} 2.0' in text


@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_aborts(make_stack: StackFactory, stream: bool) -> None:
    async with make_stack() as stack:
        stack.engine.gate.clear()
        body = {"messages": [USER], "stream": stream}
        async with httpx.AsyncClient(base_url=stack.url) as leaver:
            request = asyncio.create_task(leaver.send(leaver.build_request("POST", CHAT, json=body), stream=stream))
            if stream:
                reply = await request
                assert (await anext(reply.aiter_lines())).startswith("data: ")
                await reply.aclose()
            else:
                await stack.engine.arrivals.get()
                request.cancel()
        abort = await asyncio.wait_for(stack.engine.aborts.get(), 5)
        assert abort.request_id == stack.engine.submits[0].request_id
        assert not abort.HasField("choice")
        stack.engine.gate.set()
        assert (await stack.http.post(CHAT, json={"messages": [USER], "max_tokens": 1})).status_code == 200
        assert stack.service.engine.num_live_requests == 0


async def test_silence_is_broken(make_stack: StackFactory) -> None:
    async with make_stack(keep_alive_s=0.02) as stack:
        stack.engine.gate.clear()
        body = {"messages": [USER], "max_tokens": 3, "stream": True}
        async with stack.http.stream("POST", CHAT, json=body) as reply:
            lines = reply.aiter_lines()
            while await anext(lines) != ": keep-alive":
                pass
            stack.engine.gate.set()
            rest = [line async for line in lines]
        assert [line for line in rest if line][-1] == "data: [DONE]"


async def test_request_timeout(make_stack: StackFactory) -> None:
    async with make_stack(request_timeout_s=0.2) as stack:
        stack.engine.gate.clear()
        reply = await stack.http.post(CHAT, json={"messages": [USER]})
        await asyncio.wait_for(stack.engine.aborts.get(), 5)
    assert (reply.status_code, error_of(reply)["code"]) == (504, "request_timeout")


async def test_engine_that_answers_nothing(make_stack: StackFactory) -> None:
    async with make_stack(accept_timeout_s=0.2) as stack:
        stack.engine.silent = True
        reply = await stack.http.post(CHAT, json={"messages": [USER], "stream": True})
    assert (reply.status_code, error_of(reply)["code"]) == (503, "engine_unavailable")
    assert reply.headers["retry-after"] == "1"


@pytest.mark.parametrize("name", [name for name in engine_pb2.EngineState.Status.keys() if name != "READY"])
async def test_health_is_the_engines(make_stack: StackFactory, tokenizer: Tokenizer, name: str) -> None:
    engine = ScriptedEngine(seeded_script(tokenizer.vocab_size), tokenizer.vocab_size)
    engine.status = getattr(engine_pb2.EngineState, name)
    async with make_stack(engine, rpc_timeout_s=600.0) as stack:  # which is not asked again
        unwell = await stack.http.get("/health")
        assert unwell.status_code == 503
        assert unwell.json() == {"status": name.lower(), "detail": "scripted"}
        outbox = await engine.sessions.get()
        outbox.put_nowait(engine_pb2.EngineMessage(state=engine_pb2.EngineState(status=READY)))
        async with asyncio.timeout(10):
            await stack.until_state("ready")
        assert (await stack.http.get("/health")).status_code == 200


async def test_the_page_loads_nothing_from_elsewhere(make_stack: StackFactory) -> None:
    async with make_stack(api_keys=("k",)) as stack:
        page = await stack.http.get("/")
        files = {name: await stack.http.get(f"/{name}") for name in re.findall(r'(?:href|src)="([^"]+)"', page.text)}
        for name in re.findall(r'from "\./([\w.]+)"', files["page/app.js"].text):
            files[f"page/{name}"] = await stack.http.get(f"/page/{name}")
        again = await stack.http.get("/page/app.js", headers={"if-none-match": files["page/app.js"].headers["etag"]})
        assert (await stack.http.get("/page/../app.py")).status_code == 404
        assert (await stack.http.get("/page/index.html")).status_code == 404
    assert set(files) == {
        f"page/{name}" for name in ("icon.svg", "style.css", "app.js", "api.js", "markdown.js", "store.js")
    }
    assert again.status_code == 304
    for reply in (page, *files.values()):
        assert reply.status_code == 200
        assert reply.headers["content-security-policy"].startswith("default-src 'none'")
        for url in re.findall(r"https?://[^\s\"')]*", reply.text):
            assert url == "http://www.w3.org/2000/svg" or "(" in url or "\\" in url, url  # names and patterns only
        assert "innerHTML" not in reply.text.replace("Never touches innerHTML", "")


async def test_models_and_version(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        listed = await stack.client.models.list()
        assert [model.id for model in listed.data] == ["tiny", "gpt-4"]
        assert (await stack.client.models.retrieve("gpt-4")).id == "gpt-4"
        with pytest.raises(openai.NotFoundError):
            await stack.client.models.retrieve("other")
        assert (await stack.http.get("/v1/models")).json()["data"][0]["max_model_len"] == 512
        assert (await stack.http.get("/version")).json() == {"version": "1.2.3"}


async def test_metrics_are_valid_and_joined(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        await stack.http.post(CHAT, json={"messages": [USER], "max_tokens": 1})
        await stack.http.post(CHAT, content=b"{")
        await stack.http.get("/some/other/path")
        reply = await stack.http.get("/metrics")
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family for family in text_string_to_metric_families(reply.text)}
    assert all(name.startswith("tpserve_") and ":" not in name for name in families)
    assert "tpserve_num_requests_running" in families
    counts = {
        (sample.labels["route"], sample.labels["code"]): sample.value
        for sample in families["tpserve_http_requests"].samples
        if sample.name == "tpserve_http_requests_total"
    }
    assert counts[CHAT, "200"] == 1
    assert counts[CHAT, "400"] == 1
    assert counts["other", "404"] == 1
    in_flight = {sample.labels["route"]: sample.value for sample in families["tpserve_http_requests_in_flight"].samples}
    assert in_flight[CHAT] == 0
    assert in_flight["/metrics"] == 1
    assert families["tpserve_gateway_engine_up"].samples[0].value == 1


async def test_a_fault_of_ours_is_a_500_and_the_server_goes_on(
    make_stack: StackFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with make_stack() as stack:
        with monkeypatch.context() as patch:
            patch.setattr(type(stack.service.model.tokenizer), "encode", lambda *_, **__: 1 / 0)
            reply = await stack.http.post(CHAT, json={"messages": [USER]})
        assert (reply.status_code, error_of(reply)["code"]) == (500, "internal_error")
        assert "ZeroDivisionError" in caplog.text
        assert "division" not in reply.text
        assert (await stack.http.post(CHAT, json={"messages": [USER], "max_tokens": 1})).status_code == 200
