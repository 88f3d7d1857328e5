"""Structured output and tools through the official client, on two tensor-parallel ranks of a real model."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from typing import Any

import jsonschema
import openai
import pytest

from json_schemas import random_schema
from patience import patient
from server import MODEL_NAME, Server, chat_request, chat_text

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,9}$"},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 2},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "pattern": "^[A-Z][a-z]{2,9}$"}, "unit": {"enum": ["c", "f"]}},
            "required": ["city", "unit"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS: Any = [WEATHER, NOW]


def as_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def check_person(text: str) -> None:
    jsonschema.Draft202012Validator(PERSON).validate(json.loads(text))


@pytest.mark.parametrize(
    "response_format",
    [
        as_format(PERSON),
        {"type": "json_object", "schema": json.dumps(PERSON)},
        {"type": "json_object", "schema": PERSON},
    ],
)
def test_json_of_a_schema(client: openai.OpenAI, response_format: Any) -> None:
    request = chat_request("Describe a person.", max_tokens=64, response_format=response_format)
    reply = client.chat.completions.create(**request, n=2, seed=1)
    for choice in reply.choices:
        assert choice.finish_reason == "stop"
        check_person(choice.message.content or "")


def test_any_json_object(client: openai.OpenAI) -> None:
    text = chat_text(
        client, "Give me a JSON object with one key.", response_format={"type": "json_object"}, max_tokens=40
    )
    assert text.startswith("{")
    assert chat_text(client, "Say hello.", response_format={"type": "text"})[0] != "{"


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"guided_regex": r"\d{3}-\d{4}"}, r"\d{3}-\d{4}"),
        ({"guided_choice": ["yes", "no", 'say "maybe"']}, 'yes|no|say "maybe"'),
        ({"guided_grammar": 'root ::= sum " = " num\nsum ::= num " + " num\nnum ::= [0-9]{1,3}'}, r"\d+ \+ \d+ = \d+"),
        ({"guided_json": {"type": "integer", "minimum": 10, "maximum": 20}}, "1[0-9]|20"),
        ({"guided_json": '{"type": "boolean"}'}, "true|false"),
    ],
)
def test_guided_extras_on_both_routes(client: openai.OpenAI, extra: dict[str, Any], pattern: str) -> None:
    request = chat_request("Well?", temperature=1, n=3, seed=5, extra_body=extra)
    chat = client.chat.completions.create(**request)
    text = client.completions.create(
        model=MODEL_NAME, prompt="Well? ", temperature=1, n=3, seed=6, max_tokens=24, extra_body=extra
    )
    for answer in (*(choice.message.content for choice in chat.choices), *(choice.text for choice in text.choices)):
        assert re.fullmatch(pattern, answer or ""), answer
    assert {choice.finish_reason for choice in (*chat.choices, *text.choices)} == {"stop"}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"extra_body": {"guided_regex": "(a"}}, "guided_regex", "parenthesis is not closed"),
        ({"extra_body": {"guided_grammar": "root ::= nothing"}}, "guided_grammar", '"nothing" is not defined'),
        ({"response_format": as_format({"not": {}})}, "response_format", "'not' is not supported"),
        ({"response_format": as_format({"type": "x"})}, "response_format", "'x' is not valid"),
        ({"response_format": {"type": "json_object", "schema": "{"}}, "response_format", "not valid JSON"),
        ({"extra_body": {"guided_regex": "a" * 300_000}}, "guided_regex", "at most 262144"),
        ({"extra_body": {"guided_json": {}, "guided_regex": "a"}}, None, "at most one may shape the output"),
        (
            {"tools": [{**WEATHER, "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}]},
            "tools[0].function.parameters",
            "'not' is not supported",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused(
    client: openai.OpenAI, fields: dict[str, Any], param: str | None, words: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**chat_request("x", **fields))
    assert isinstance(caught.value.body, dict)
    assert words in caught.value.body["message"]
    assert caught.value.param == param


async def test_constrained_and_free_requests_share_batches(server: Server) -> None:
    """Free texts are what they are alone, and every constrained one matches, with all else that samples."""
    free = [chat_request(f"Tell me of the number {number}.", max_tokens=12) for number in range(6)]
    bound = [
        chat_request(
            "A person?",
            temperature=1.2,
            seed=number,
            max_tokens=80,
            response_format=as_format(PERSON),
            frequency_penalty=0.2 * (number % 2),
            logprobs=number % 3 == 0,
            top_logprobs=3 if number % 3 == 0 else None,
        )
        for number in range(9)
    ]
    async with server.async_client() as client:
        alone = [await client.chat.completions.create(**request) for request in free]
        replies = await asyncio.gather(*(client.chat.completions.create(**request) for request in [*free, *bound]))
        again = await client.chat.completions.create(**bound[4])
    texts = [reply.choices[0].message.content or "" for reply in replies]
    assert texts[: len(free)] == [reply.choices[0].message.content for reply in alone]
    for number, reply in enumerate(replies[len(free) :]):
        choice = reply.choices[0]
        if choice.finish_reason == "stop":
            check_person(choice.message.content or "")
        if choice.logprobs is not None:
            for token in choice.logprobs.content or ():
                assert 1 <= len(token.top_logprobs) <= 3
                assert all(other.logprob > -1e4 for other in token.top_logprobs)
        assert (choice.logprobs is not None) is (number % 3 == 0)
    finished = Counter(reply.choices[0].finish_reason for reply in replies[len(free) :])
    assert finished["stop"] >= 6
    assert again.choices[0].message.content == texts[len(free) + 4]
    assert server.metric("grammar_mask_seconds_total") > 0


async def test_every_finished_answer_validates(server: Server) -> None:
    """A sample of benchmarks/structured_output.py: as many schemas as fit into some seconds."""
    rng = random.Random(7)
    schemas = [random_schema(rng, depth=2) for _ in range(40)]
    finished: list[Any] = []

    async def ask(client: openai.AsyncOpenAI, gate: asyncio.Semaphore, number: int) -> None:
        async with gate:
            shape = as_format(schemas[number])
            request = chat_request("JSON:", temperature=1, seed=number, max_tokens=40, response_format=shape)
            reply = await client.chat.completions.create(**request)
        if reply.choices[0].finish_reason == "stop":
            value = json.loads(reply.choices[0].message.content or "")
            jsonschema.Draft202012Validator(schemas[number]).validate(value)
            finished.append(value)

    async with server.async_client() as client:
        gate = asyncio.Semaphore(8)
        await asyncio.gather(*(ask(client, gate, number) for number in range(len(schemas))))
    assert len(finished) >= 17


async def test_a_grammar_that_takes_too_long_costs_others_nothing(server: Server) -> None:
    """It is refused at its deadline; meanwhile everybody else is served."""
    nested = "".join(f"r{i} ::= (r{i + 1} | [a-z]{{1,900}} r{i + 1}){{1,900}}\n" for i in range(12))
    huge = f"root ::= r0\n{nested}r12 ::= [a-z]{{1,900}}"
    async with server.async_client() as client:
        slow = asyncio.create_task(
            client.chat.completions.create(**chat_request("x", extra_body={"guided_grammar": huge}, max_tokens=4))
        )
        await asyncio.sleep(0.3)
        started = time.monotonic()
        await client.chat.completions.create(**chat_request("Hello", max_tokens=4))
        assert time.monotonic() - started < patient(4)
        outcomes: list[Any] = list(await asyncio.gather(slow, return_exceptions=True))
        outcome = outcomes[0]
        if isinstance(outcome, BaseException):
            assert isinstance(outcome, openai.BadRequestError)
            assert "make it simpler" in str(outcome)
        reply = await client.chat.completions.create(**chat_request("x", extra_body={"guided_regex": "ab"}))
    assert reply.choices[0].message.content == "ab"


def test_a_required_call_has_valid_arguments(client: openai.OpenAI) -> None:
    request = chat_request("How is the weather in Paris?", max_tokens=120, tools=TOOLS, tool_choice="required")
    reply = client.chat.completions.create(**request, parallel_tool_calls=False)
    (choice,) = reply.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name in ("get_weather", "now")
    parameters = WEATHER["function"]["parameters"] if call.function.name == "get_weather" else {"maxProperties": 0}  # type: ignore[index]  # a nested literal
    jsonschema.Draft202012Validator(parameters).validate(json.loads(call.function.arguments))


@pytest.mark.parametrize("name", ["get_weather", "now"])
def test_a_named_call_streams_its_arguments(client: openai.OpenAI, name: str) -> None:
    choice: Any = {"type": "function", "function": {"name": name}}
    request = chat_request("Go on.", max_tokens=120, tools=TOOLS, tool_choice=choice, temperature=1, seed=3)
    whole = client.chat.completions.create(**request).choices[0]
    chunks = list(client.chat.completions.create(**request, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert [call.id is not None for call in calls] == [True] + [False] * (len(calls) - 1)
    assert calls[0].function is not None
    assert calls[0].function.name == name
    arguments = "".join(call.function.arguments or "" for call in calls if call.function is not None)
    assert whole.message.tool_calls is not None
    assert whole.message.tool_calls[0].type == "function"
    assert arguments == whole.message.tool_calls[0].function.arguments
    assert isinstance(json.loads(arguments), dict)
    assert not any(delta.content for delta in deltas)
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason == "tool_calls"


def test_no_call_where_none_is_allowed(client: openai.OpenAI) -> None:
    request = chat_request("How is the weather in Paris?", tools=TOOLS, tool_choice="none")
    reply = client.chat.completions.create(**request)
    assert reply.choices[0].message.tool_calls is None
    assert reply.choices[0].message.content
    plain = client.chat.completions.create(**chat_request("How is the weather in Paris?"))
    assert reply.usage is not None
    assert plain.usage is not None
    assert reply.usage.prompt_tokens == plain.usage.prompt_tokens  # tools are not in the prompt either


def test_a_conversation_with_calls_and_results(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "user", "content": "How is the weather in Rome?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "It is sunny, 21 degrees."},
    ]
    reply = client.chat.completions.create(
        model=MODEL_NAME, messages=messages, tools=TOOLS, temperature=0, max_tokens=40
    )
    assert re.search("sunny|21", reply.choices[0].message.content or "")
