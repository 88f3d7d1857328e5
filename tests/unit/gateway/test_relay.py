"""A stream that another gateway goes on with: wherever it is cut, the client gets the bytes it would have got."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tpserve.coordinator.gateway.tokenizer import Tokenizer
from tpserve.coordinator.relay import SECRET_HEADER, STREAM_HEADER, Identity
from tpserve.coordinator.router.marks import MarkedStream
from tpserve.proto.pb import engine_pb2
from unit.gateway.conftest import Stack, StackFactory
from unit.gateway.scripted_engine import Script, ScriptedEngine, fixed_script, seeded_script
from unit.gateway.test_chat import HI

SECRET = "s3cret"
IDENTITY = Identity("0123456789abcdef" * 2, 1_700_000_000, 77)
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
FLAT_TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}
CALLS = (
    'Well.<tool_call>\n{"name": "f", "arguments": {"a": [1, 2]}}\n</tool_call>\n'
    '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
)


@dataclass(frozen=True)
class Case:
    path: str
    body: dict[str, Any]
    text: str | None = None
    """What the model says; None: something random."""


CASES = {
    "chat": Case("/v1/chat/completions", {"messages": HI, "max_tokens": 20, **USAGE}),
    "chat, unseeded": Case("/v1/chat/completions", {"messages": HI, "max_tokens": 8, "temperature": 1, "stream": True}),
    "chat, choices": Case("/v1/chat/completions", {"messages": HI, "max_tokens": 9, "n": 3, "seed": 5, **USAGE}),
    "chat, logprobs": Case(
        "/v1/chat/completions", {"messages": HI, "max_tokens": 6, "logprobs": True, "top_logprobs": 2, "stream": True}
    ),
    "chat, stop": Case(
        "/v1/chat/completions", {"messages": HI, "stop": ["brown fox"], **USAGE}, "The quick brown brown fox jumps."
    ),
    "chat, calls": Case("/v1/chat/completions", {"messages": HI, "tools": [TOOL], **USAGE}, CALLS),
    "chat, characters": Case("/v1/chat/completions", {"messages": HI, **USAGE}, "Grüße 👩‍👩‍👧, 你好"),
    "completions": Case(
        "/v1/completions",
        {"prompt": ["the quick", "how are"], "n": 2, "echo": True, "max_tokens": 7, "temperature": 1, **USAGE},
    ),
    "completions, logprobs": Case(
        "/v1/completions", {"prompt": "the quick", "logprobs": 2, "max_tokens": 7, "seed": 3, "stream": True}
    ),
    "responses": Case("/v1/responses", {"input": "hello", "max_output_tokens": 12, "stream": True}),
    "responses, calls": Case("/v1/responses", {"input": "hello", "tools": [FLAT_TOOL], "stream": True}, CALLS),
}


async def ask(stack: Stack, case: Case, marks: bytes | None = None) -> httpx.Response:
    body = json.dumps({"model": "tiny", **case.body}).encode()
    headers = {
        SECRET_HEADER: SECRET,
        STREAM_HEADER: IDENTITY.to_header(None if marks is None else len(body)).decode(),
        "content-type": "application/json",
    }
    return await stack.http.post(case.path, content=body + (marks or b""), headers=headers)


def script_of(case: Case, tokenizer: Tokenizer) -> Script:
    if case.text is None:
        return seeded_script(tokenizer.vocab_size)
    return fixed_script([*tokenizer.encode(case.text, add_special_tokens=False), 2])


@pytest.mark.parametrize("tokens_per_event", [1, 3])
@pytest.mark.parametrize("name", CASES)
async def test_a_stream_goes_on_wherever_it_was_cut(
    make_stack: StackFactory, tokenizer: Tokenizer, name: str, tokens_per_event: int
) -> None:
    case = CASES[name]
    script = script_of(case, tokenizer)
    # Two gateways, so that nothing can be remembered.
    first = ScriptedEngine(script, tokenizer.vocab_size, tokens_per_event=tokens_per_event, num_cached_tokens=2)
    num_cached = 1 if name == "chat" else 2  # what the second has cached is nothing to an answer that has begun
    second = ScriptedEngine(
        script, tokenizer.vocab_size, tokens_per_event=tokens_per_event, num_cached_tokens=num_cached
    )
    async with make_stack(first, router_token=SECRET) as old, make_stack(second, router_token=SECRET) as new:
        reply = await ask(old, case)
        assert reply.status_code == 200
        whole, cuts = groups_of(reply.content)
        assert len(cuts) >= 2
        assert whole.endswith(b"data: [DONE]\n\n") or case.path == "/v1/responses"
        assert b": tpserve" not in whole
        for num_passed, marks in cuts:
            again = await ask(new, case, marks)
            assert again.status_code == 200, again.text
            rest = groups_of(again.content)[0]
            if name == "completions":  # prompts are requests of their own: their events come in any order
                assert by_choice(whole[:num_passed] + rest) == by_choice(whole)
            else:
                assert rest == whole[num_passed:], (num_passed, marks)
            assert IDENTITY.key.encode() in whole


def by_choice(events: bytes) -> list[bytes]:
    """Return the events in order, of each choice for itself."""

    def choice(event: bytes) -> int:
        found = re.search(rb'"index":(\d+)', event)
        return int(found[1]) if found else sys.maxsize

    return sorted(events.split(b"\n\n"), key=choice)


def groups_of(wire: bytes) -> tuple[bytes, list[tuple[int, bytes]]]:
    """Return all events, and after each mark how many bytes have passed and what to send another gateway."""
    stream = MarkedStream()
    passed = b""
    cuts = []
    for line in wire.splitlines(keepends=True):
        if more := stream.feed(line):
            passed += more
            marks = MarkedStream()
            marks._marks = list(stream._marks)
            cuts.append((len(passed), marks.restart()))
    return passed + stream.finish(), cuts


async def test_what_finished_is_not_asked_for_again(make_stack: StackFactory, tokenizer: Tokenizer) -> None:
    words = [[*tokenizer.encode(text, add_special_tokens=False), 2] for text in ("stop", "the " * 6)]
    engine = ScriptedEngine(fixed_script(*words), tokenizer.vocab_size)
    case = Case("/v1/chat/completions", {"messages": HI, "n": 2, **USAGE})
    async with make_stack(engine, router_token=SECRET) as stack:
        whole, cuts = groups_of((await ask(stack, case)).content)
        num_passed, marks = cuts[-2]
        engine.submits.clear()
        again = await ask(stack, case, marks)
        assert groups_of(again.content)[0] == whole[num_passed:]
        (submit,) = engine.submits
        assert not submit.emitted[0].token_ids
        assert len(submit.emitted[1].token_ids) > len(words[0])
        assert (await engine.aborts.get()).choice == 0
        engine.submits.clear()
        assert groups_of((await ask(stack, case, cuts[-1][1])).content)[0] == whole[cuts[-1][0] :]


async def test_a_failure_that_another_replica_need_not_have(make_stack: StackFactory, tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(seeded_script(tokenizer.vocab_size), tokenizer.vocab_size, fail_after=3)
    async with make_stack(engine, router_token=SECRET) as stack:
        reply = await ask(stack, CASES["chat"])
        stream = MarkedStream()
        assert stream.feed(reply.content).count(b'"content"') >= 3
        assert stream.failure is not None
        assert b"rank 1 was lost" in stream.failure
        plain = await stack.http.post("/v1/chat/completions", json={"messages": HI, "stream": True})
        assert b": tpserve" not in plain.content


async def test_only_who_knows_the_secret_is_a_router(make_stack: StackFactory) -> None:
    body = {"messages": HI, "max_tokens": 2}
    header = {STREAM_HEADER: IDENTITY.to_header().decode()}
    async with make_stack(router_token=SECRET) as stack:
        for headers in (header, {SECRET_HEADER: "wrong"}, {**header, SECRET_HEADER: SECRET + "x"}):
            refused = await stack.http.post("/v1/chat/completions", json=body, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "router_only")
        good = await stack.http.post("/v1/chat/completions", json=body, headers={SECRET_HEADER: SECRET})
        assert good.status_code == 200
        for bad in (b"[[0,[[9,0,[5]]]]]", b"[[0,[[0,3,[5]]]]]", b"nonsense"):
            refused = await ask(stack, CASES["chat"], bad)
            assert refused.status_code == 400, bad
    async with make_stack() as stack:
        refused = await stack.http.post("/v1/chat/completions", json=body, headers={SECRET_HEADER: SECRET})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "router_only")
        assert "--router-token" in refused.json()["error"]["message"]


async def test_what_is_asked_of_the_engine_when_a_stream_goes_on(
    make_stack: StackFactory, tokenizer: Tokenizer
) -> None:
    engine = ScriptedEngine(seeded_script(tokenizer.vocab_size), tokenizer.vocab_size)
    async with make_stack(engine, router_token=SECRET) as stack:
        case = CASES["chat"]
        _, cuts = groups_of((await ask(stack, case)).content)
        await ask(stack, case, cuts[4][1])
        first, again = engine.submits
        assert again.sampling.seed == first.sampling.seed == IDENTITY.seed
        assert list(again.prompt_token_ids) == list(first.prompt_token_ids)
        assert again.max_tokens == first.max_tokens
        assert 0 < len(again.emitted[0].token_ids) <= 6
        assert isinstance(again, engine_pb2.Submit)
