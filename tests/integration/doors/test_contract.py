"""The same request through REST, MLCEngine, AsyncMLCEngine and the terminal gives the same tokens."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from integration.doors.shapes import FORCED_CALL, PERSON, check_call, check_person
from server import MODEL_NAME, Server, command, environment, together
from tpserve import AsyncMLCEngine, MLCEngine
from tpserve.coordinator.gateway.errors import ApiError

PROMPT = "Tell me a very short story about a cat 🐈."
CHATS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "max_tokens": 24},
    "seeded": {"temperature": 0.9, "top_p": 0.8, "seed": 23, "max_tokens": 24},
    "stop": {"temperature": 0, "max_tokens": 60, "stop": ["cat", "."]},
    "penalties": {"temperature": 0.7, "seed": 1, "max_tokens": 20, "frequency_penalty": 1.0, "logit_bias": {"338": -5}},
    "choices": {"temperature": 1, "seed": 7, "n": 3, "max_tokens": 12},
    "logprobs": {"temperature": 0, "max_tokens": 6, "logprobs": True, "top_logprobs": 2},
    "tool": {"temperature": 1, "seed": 5, "max_tokens": 160, **FORCED_CALL},
    "schema": {"temperature": 1, "seed": 2, "max_tokens": 96, "response_format": PERSON},
}
REFUSED: dict[str, dict[str, Any]] = {
    "range": {"temperature": -1},
    "model": {"model": "other"},
    "length": {"max_tokens": 10**6},
}


@pytest.fixture(scope="module")
def engine(engine_address: str, server: Server) -> Iterator[MLCEngine]:
    with MLCEngine(MODEL_NAME, address=engine_address, start_timeout_s=30) as opened:
        yield opened


@pytest.fixture(scope="module")
def async_engine(engine_address: str) -> Iterator[AsyncMLCEngine]:
    opened = AsyncMLCEngine(MODEL_NAME, address=engine_address, start_timeout_s=30)
    yield opened
    opened.terminate()


def request_of(fields: dict[str, Any]) -> dict[str, Any]:
    return {"model": MODEL_NAME, "messages": [{"role": "user", "content": PROMPT}], **fields}


def meaning(answer: Any) -> dict[str, Any]:
    """Return the JSON of an answer but for what names it and what earlier requests have left in the cache."""
    plain: dict[str, Any] = answer.model_dump(exclude_none=True)
    for name in ("id", "created"):
        del plain[name]
    if "usage" in plain:
        del plain["usage"]["prompt_tokens_details"]
    for choice in plain["choices"]:
        for call in (choice.get("message") or choice.get("delta") or {}).get("tool_calls", ()):
            call.pop("id", None)
    return plain


@pytest.mark.parametrize("name", CHATS)
def test_row_23_a_chat_means_the_same_at_every_door(
    name: str, client: openai.OpenAI, engine: MLCEngine, async_engine: AsyncMLCEngine
) -> None:
    request = request_of(CHATS[name])
    over_http, in_process, awaited = together(
        lambda: meaning(client.chat.completions.create(**request)),
        lambda: meaning(engine.chat.completions.create(**request)),
        lambda: meaning(asyncio.run(async_engine.chat.completions.create(**request))),
    )
    assert in_process == awaited == over_http
    (choice, *_) = over_http["choices"]
    if name == "tool":
        (call,) = choice["message"]["tool_calls"]
        check_call(call["function"], choice["finish_reason"])
    elif name == "schema":
        check_person(choice["message"]["content"], choice["finish_reason"])


async def gather(engine: AsyncMLCEngine, request: dict[str, Any]) -> list[dict[str, Any]]:
    return [meaning(chunk) async for chunk in await engine.chat.completions.create(**request, stream=True)]


@pytest.mark.parametrize("name", ["seeded", "choices", "logprobs", "tool", "schema"])
def test_a_stream_means_the_same(
    name: str, client: openai.OpenAI, engine: MLCEngine, async_engine: AsyncMLCEngine
) -> None:
    """Choice by choice; how tokens fall into chunks depends on when they come."""
    request = request_of(CHATS[name]) | {"stream_options": {"include_usage": True}}

    def texts(chunks: list[dict[str, Any]]) -> dict[int, dict[str, str]]:
        found: dict[int, dict[str, str]] = {}
        for chunk in chunks:
            for choice in chunk["choices"]:
                of = found.setdefault(choice["index"], dict.fromkeys(("text", "name", "arguments", "finish"), ""))
                of["text"] += choice["delta"].get("content", "")
                of["finish"] += choice.get("finish_reason", "")
                for call in choice["delta"].get("tool_calls", ()):
                    of["name"] += call["function"].get("name", "")
                    of["arguments"] += call["function"].get("arguments", "")
        return found

    over_http, in_process, awaited = together(
        lambda: [meaning(chunk) for chunk in client.chat.completions.create(**request, stream=True)],
        lambda: [meaning(chunk) for chunk in engine.chat.completions.create(**request, stream=True)],
        lambda: asyncio.run(gather(async_engine, request)),
    )
    assert texts(in_process) == texts(awaited) == texts(over_http)
    if name == "tool":
        check_call(texts(over_http)[0], texts(over_http)[0]["finish"])
    assert in_process[-1] == awaited[-1] == over_http[-1]


def test_a_completion_means_the_same(client: openai.OpenAI, engine: MLCEngine, async_engine: AsyncMLCEngine) -> None:
    request: dict[str, Any] = {
        "model": MODEL_NAME,
        "prompt": ["Once upon a time", "def add(a, b):"],
        "temperature": 0.8,
        "seed": 3,
        "max_tokens": 10,
        "echo": True,
        "n": 2,
    }
    over_http, in_process, awaited = together(
        lambda: meaning(client.completions.create(**request)),
        lambda: meaning(engine.completions.create(**request)),
        lambda: meaning(asyncio.run(async_engine.completions.create(**request))),
    )
    assert in_process == awaited == over_http


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_means_the_same(
    name: str, client: openai.OpenAI, engine: MLCEngine, async_engine: AsyncMLCEngine
) -> None:
    request = request_of(REFUSED[name])
    with pytest.raises(openai.APIStatusError) as over_http:
        client.chat.completions.create(**request)
    with pytest.raises(ApiError) as in_process:
        engine.chat.completions.create(**request)
    with pytest.raises(ApiError) as awaited:
        asyncio.run(async_engine.chat.completions.create(**request))
    for refused in (in_process.value, awaited.value):
        assert (refused.status, refused.to_dict()["error"]) == (over_http.value.status_code, over_http.value.body) or (
            name == "model" and refused.status == 404  # the message lists the door's own names
        )


@pytest.mark.parametrize("how", ["--engine", "--base-url"])
def test_the_terminal_says_the_same(how: str, client: openai.OpenAI, server: Server, engine_address: str) -> None:
    """With the system prompt and settings of the command line, from a pipe."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    request: dict[str, Any] = {"messages": messages, "temperature": 0.9, "seed": 23, "max_tokens": 24}
    over_http = client.chat.completions.create(model=MODEL_NAME, **request).choices[0].message.content
    where = engine_address if how == "--engine" else server.url
    flags = (how, where, "--system", "Be brief.", "--set", "temperature=0.9;seed=23;max_tokens=24")
    done = subprocess.run(
        command("chat", *flags), input=PROMPT + "\n", capture_output=True, text=True, timeout=60, env=environment("cli")
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{over_http}\n"


async def test_concurrent_calls_are_one_batch(async_engine: AsyncMLCEngine, server: Server) -> None:
    """Eight awaited at once give what each gives alone."""
    requests = [request_of({"temperature": 1, "seed": seed, "max_tokens": 8}) for seed in range(8)]
    together = await asyncio.gather(*[async_engine.chat.completions.create(**request) for request in requests])
    alone = [await async_engine.chat.completions.create(**request) for request in requests]
    assert [meaning(answer) for answer in together] == [meaning(answer) for answer in alone]
    metrics = (await async_engine.metrics()).samples
    assert metrics["tpserve_num_requests_running"] == 0
    assert metrics["tpserve_num_requests_running"] == server.metric("num_requests_running")
