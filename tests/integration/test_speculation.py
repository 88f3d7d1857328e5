"""Servers that speculate answer as one that does not, token for token: greedy, sampled and constrained at once.

The draft is the demo model itself on one rank, so that a real draft is accepted; prompt lookup is the other proposer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from server import Server, chat_request, run_cli, until

FLAGS = ("--tp", "2", "--max-num-seqs", "8")
LISTS = "Repeat: red, green, blue, red, green, blue, red, green, blue, red,"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^[A-Z][a-z]{1,9}$"}, "age": {"enum": [7, 8, 9]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": chat_request("What is the capital of France?", max_tokens=40),
    "sampled": chat_request(LISTS, temperature=0.8, seed=3, max_tokens=60),
    "cut": chat_request(LISTS, temperature=1.0, top_p=0.8, seed=4, max_tokens=60),
    "penalties": chat_request(LISTS, temperature=0.7, seed=5, frequency_penalty=0.8, presence_penalty=0.3),
    "bias": chat_request(LISTS, temperature=0.7, seed=6, logit_bias={"260": 4, "28": -3}),
    "logprobs": chat_request(LISTS, temperature=0.9, seed=7, logprobs=True, top_logprobs=3),
    "choices": chat_request(LISTS, temperature=1.0, seed=8, n=3),
    "stop": chat_request(LISTS, stop=["blue, red"], max_tokens=60),
    "schema": chat_request("Name a child with its age.", temperature=0.6, seed=9, response_format=SCHEMA),
    "short": chat_request("Say yes.", max_tokens=1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("speculation")
    return path


@pytest.fixture(scope="module")
def expected(demo_model: Path, folder: Path) -> dict[str, Any]:
    """What a server without speculation answers."""
    with Server.running(demo_model, *FLAGS, folder=folder) as server:
        return asyncio.run(answers(server))


@pytest.fixture(scope="module", params=["draft", "ngram"])
def method(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def server(method: str, demo_model: Path, folder: Path) -> Iterator[Server]:
    flags = ["--num-speculative-tokens", "3"]
    flags += ["--draft-model", str(demo_model)] if method == "draft" else ["--spec-method", "ngram"]
    with Server.running(demo_model, *FLAGS, *flags, folder=folder) as running:
        yield running


async def answers(server: Server) -> dict[str, Any]:
    """Send every request at once; return what counts of each answer."""
    async with server.async_client() as client:
        replies = await asyncio.gather(*(client.chat.completions.create(**body) for body in REQUESTS.values()))
    return {name: _plain(reply) for name, reply in zip(REQUESTS, replies, strict=True)}


def _plain(reply: openai.types.chat.ChatCompletion) -> Any:
    found = []
    for choice in reply.choices:
        logprobs = [] if choice.logprobs is None else (choice.logprobs.content or [])
        # Rows that run together may differ in the last bits of their sums.
        tokens = [(item.token, round(item.logprob, 3), [top.token for top in item.top_logprobs]) for item in logprobs]
        found.append((choice.message.content, choice.finish_reason, tokens))
    assert reply.usage is not None
    return found, reply.usage.completion_tokens


def test_answers_are_those_of_plain_decoding(server: Server, method: str, expected: dict[str, Any]) -> None:
    found = asyncio.run(answers(server))
    for name, answer in expected.items():
        assert found[name] == answer, name
    metrics = server.metrics()
    drafted = metrics["tpserve_spec_decode_num_draft_tokens_total"]
    accepted = metrics["tpserve_spec_decode_num_accepted_tokens_total"]
    steps = metrics["tpserve_spec_decode_num_drafts_total"]
    assert 0 < accepted <= drafted <= 3 * steps
    if method == "draft":
        # It draws as the model does; only grammars and penalties of drafted tokens come between.
        assert accepted > 0.8 * drafted
    assert metrics["tpserve_spec_decode_num_accepted_tokens_per_pos_total{position=0}"] <= steps
    assert metrics["tpserve_step_seconds_count{kind=verify}"] > 0


def test_a_gateway_that_starts_a_process_amid_requests_does_not_lose_it(server: Server) -> None:
    """Requests with a grammar start its compiler beside busy gRPC threads, whose handlers at fork crashed it."""
    for module in ("tpserve.coordinator", "tpserve.coordinator.gateway"):
        environ = psutil.Process(server.process_pid(module)).environ()
        assert environ["GRPC_ENABLE_FORK_SUPPORT"] == "0", module


def test_a_stream_brings_several_tokens_in_a_chunk(server: Server) -> None:
    body = chat_request(LISTS, max_tokens=60, stream_options={"include_usage": True})
    with server.client() as client, client.chat.completions.create(**body, stream=True) as chunks:
        parts = list(chunks)
    usage = parts[-1].usage
    assert usage is not None
    text = [part for part in parts if part.choices and part.choices[0].delta.content]
    assert 0 < len(text) < usage.completion_tokens
    with server.client() as client:
        whole = client.chat.completions.create(**chat_request(LISTS, max_tokens=60))
    assert "".join(part.choices[0].delta.content or "" for part in text) == whole.choices[0].message.content


def test_nothing_is_held_after_disconnects(server: Server) -> None:
    async def leave() -> None:
        async with server.async_client() as client:
            for number in range(6):
                body = chat_request(LISTS, max_tokens=200, temperature=1.0, seed=number)
                stream = await client.chat.completions.create(**body, stream=True)
                async for _ in stream:
                    break
                await stream.close()

    asyncio.run(leave())
    until(lambda: server.metric("num_requests_running") == 0, within_s=20, what="idle")
    assert server.metric("kv_cache_usage_perc") == 0


def test_a_draft_of_another_family_is_refused(tiny_folder: Path, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((tiny_folder / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    flags = ["--load-format", "dummy", "--draft-model", str(other), "--max-num-seqs", "8"]
    error = run_cli("serve", tiny_folder, *flags, folder=folder).only_error()
    assert "the draft has 1000 tokens, the model 49152" in error
