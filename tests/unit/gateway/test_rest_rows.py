"""One test for each row of the REST reference (features 1 to 18): its rule, over HTTP with the official client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tpserve.coordinator.gateway.tokenizer import Tokenizer
from unit.gateway.conftest import Stack, StackFactory
from unit.gateway.scripted_engine import ScriptedEngine, fixed_script

EOS = 2
HI: Any = [{"role": "user", "content": "Hello there"}]
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
TOOL: Any = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
}


def saying(tokenizer: Tokenizer, *texts: str, **fields: Any) -> ScriptedEngine:
    choices = [[*tokenizer.encode(text, add_special_tokens=False), EOS] for text in texts]
    return ScriptedEngine(fixed_script(*choices), tokenizer.vocab_size, **fields)


async def ask(stack: Stack, **fields: Any) -> Any:
    request: dict[str, Any] = {"model": "tiny", "messages": HI, "max_tokens": 64, **fields}
    return await stack.client.chat.completions.create(**request)


async def refused(stack: Stack, param: str, **fields: Any) -> str:
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(stack, **fields)
    assert (caught.value.param or "").startswith(param)
    return str(caught.value)


async def test_row_01_messages(make_stack: StackFactory) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "u"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "r"},
    ]
    async with make_stack() as stack:
        await ask(stack, messages=messages)
        await refused(stack, "messages", messages=[])
        await refused(stack, "messages[0]", messages=[{"role": "robot", "content": "x"}])
        await refused(stack, "messages[0]", messages=[{"role": "user"}])
        broken = {**call, "function": {"name": "f", "arguments": "[1]"}}
        await refused(stack, "messages", messages=[{"role": "assistant", "tool_calls": [broken]}])


async def test_row_02_model(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        reply = await stack.http.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 2})
        assert reply.json()["model"] == "tiny"
        assert (await ask(stack, model="gpt-4")).model == "gpt-4"
        with pytest.raises(openai.NotFoundError) as caught:
            await ask(stack, model="gpt-5")
        assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
async def test_row_03_frequency_penalty_and_row_04_presence_penalty(make_stack: StackFactory, name: str) -> None:
    async with make_stack() as stack:
        for value in (-2.0, 2.0):
            await ask(stack, **{name: value})
            assert getattr(stack.engine.submits[-1].sampling, name) == value
        for value in (-2.1, 2.1):
            await refused(stack, name, **{name: value})


async def test_row_05_logprobs(make_stack: StackFactory, tokenizer: Tokenizer) -> None:
    async with make_stack(saying(tokenizer, "Hello there")) as stack:
        reply = await ask(stack, logprobs=True)
        content = reply.choices[0].logprobs.content
        assert "".join(item.token for item in content) == "Hello there"
        assert b"".join(bytes(item.bytes) for item in content) == b"Hello there"
        assert {item.logprob for item in content} == {-0.5}
        assert {len(item.top_logprobs) for item in content} == {0}
        assert (await ask(stack)).choices[0].logprobs is None


async def test_row_06_top_logprobs(make_stack: StackFactory, tokenizer: Tokenizer) -> None:
    async with make_stack(saying(tokenizer, "Hello there")) as stack:
        reply = await ask(stack, logprobs=True, top_logprobs=20)
        assert {len(item.top_logprobs) for item in reply.choices[0].logprobs.content} == {20}
        await refused(stack, "top_logprobs", logprobs=True, top_logprobs=21)
        await refused(stack, "", top_logprobs=3)


async def test_row_07_logit_bias(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        await ask(stack, logit_bias={"5": -100, "7": 100})
        assert list(stack.engine.submits[-1].sampling.bias_token_ids) == [5, 7]
        assert list(stack.engine.submits[-1].sampling.bias_values) == [-100, 100]
        await refused(stack, "logit_bias", logit_bias={"5": 101})
        await refused(stack, "logit_bias", logit_bias={"100000": 1})


async def test_row_08_max_tokens(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        for fields, expected in (({"max_tokens": 3}, 3), ({"max_completion_tokens": 4}, 4)):
            reply = await ask(stack, **{"max_tokens": None, "logit_bias": {"2": -100}, **fields})
            assert reply.usage.completion_tokens == expected
            assert stack.engine.submits[-1].max_tokens == expected
        await refused(stack, "max_tokens", max_tokens=0)


async def test_row_09_n(make_stack: StackFactory, tokenizer: Tokenizer) -> None:
    async with make_stack(saying(tokenizer, "Hello there", "how are you", "today")) as stack:
        reply = await ask(stack, n=3)
        assert [choice.message.content for choice in reply.choices] == ["Hello there", "how are you", "today"]
        assert len(stack.engine.submits) == 1  # one prompt, shared
        texts = [choice.message.content for choice in reply.choices]
        tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) + 1 for text in texts)
        assert reply.usage.completion_tokens == tokens
        await refused(stack, "n", n=0)


async def test_row_10_seed(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        texts = [(await ask(stack, seed=seed, max_tokens=20)).choices[0].message.content for seed in (5, 5, 6)]
        assert texts[0] == texts[1] != texts[2]
        assert [submit.sampling.seed for submit in stack.engine.submits] == [5, 5, 6]


async def test_row_11_stop(make_stack: StackFactory, tokenizer: Tokenizer) -> None:
    async with make_stack(saying(tokenizer, "Hello there, how are you today?")) as stack:
        for stop in ("e, h", ["XX", "e, h"]):
            reply = await ask(stack, stop=stop)
            assert reply.choices[0].message.content == "Hello ther"
            assert reply.choices[0].finish_reason == "stop"
        await refused(stack, "stop", stop=["x"] * 17)


async def test_row_12_stream(make_stack: StackFactory, tokenizer: Tokenizer) -> None:
    async with make_stack(saying(tokenizer, "Hello there")) as stack:
        reply = await stack.http.post("/v1/chat/completions", json={"messages": HI, "stream": True})
        events = reply.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events[:-2]]
        assert "".join(delta.get("content", "") for delta in deltas) == "Hello there"


async def test_row_13_stream_options(make_stack: StackFactory, tokenizer: Tokenizer) -> None:
    async with make_stack(saying(tokenizer, "Hello there")) as stack:
        chunks = [c async for c in await ask(stack, stream=True, stream_options={"include_usage": True})]
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == len(tokenizer.encode("Hello there", add_special_tokens=False)) + 1
        assert all(chunk.usage is None for chunk in chunks[:-1])
        await refused(stack, "", stream_options={"include_usage": True})


async def test_row_14_temperature_and_top_p(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        await ask(stack, temperature=0.0, top_p=0.5)
        sampling = stack.engine.submits[-1].sampling
        assert (sampling.temperature, sampling.top_p) == (0.0, 0.5)
        await ask(stack)  # the model folder gives no defaults: OpenAI's
        assert stack.engine.submits[-1].sampling.temperature == 1.0
        await refused(stack, "temperature", temperature=2.1)
        await refused(stack, "top_p", top_p=0.0)


@pytest.mark.parametrize("tokens_per_event", [1, 4])
async def test_row_15_tools(make_stack: StackFactory, tokenizer: Tokenizer, tokens_per_event: int) -> None:
    async with make_stack(saying(tokenizer, f"Well.\n{CALL}", tokens_per_event=tokens_per_event)) as stack:
        for choice in ("auto", "required", {"type": "function", "function": {"name": "f"}}):
            reply = await ask(stack, tools=[TOOL], tool_choice=choice)
            assert stack.engine.submits[-1].HasField("grammar") is (choice != "auto")
            message = reply.choices[0].message
            assert (message.content, reply.choices[0].finish_reason) == ("Well.", "tool_calls")
            (call,) = message.tool_calls
            assert (call.type, call.function.name, call.function.arguments) == ("function", "f", '{"x": 1}')
            chunks = [c async for c in await ask(stack, tools=[TOOL], tool_choice=choice, stream=True)]
            deltas = [chunk.choices[0].delta for chunk in chunks]
            calls = [part for delta in deltas for part in delta.tool_calls or ()]
            assert (calls[0].index, calls[0].function.name, calls[0].function.arguments) == (0, "f", "")
            assert calls[0].id
            assert "".join(part.function.arguments for part in calls) == '{"x": 1}'
            assert "".join(delta.content or "" for delta in deltas) == "Well."
            assert chunks[-1].choices[0].finish_reason == "tool_calls"
        reply = await ask(stack, tools=[TOOL], tool_choice="none")
        assert reply.choices[0].message.content == f"Well.\n{CALL}"
        assert reply.choices[0].message.tool_calls is None
        assert reply.choices[0].finish_reason == "stop"
        await refused(stack, "", tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}})


async def test_row_16_user(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        await ask(stack, user="somebody")
        await refused(stack, "user", user=5)


async def test_row_17_response_format(make_stack: StackFactory) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    async with make_stack() as stack:
        for response_format, constrained in (
            ({"type": "text"}, False),
            ({"type": "json_object"}, True),
            ({"type": "json_object", "schema": json.dumps(schema)}, True),
            ({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}, True),
        ):
            await ask(stack, response_format=response_format)
            assert stack.engine.submits[-1].HasField("grammar") is constrained
        grammar = stack.engine.submits[-1].grammar
        assert json.loads(grammar.source)["required"] == ["a"]
        assert list(grammar.stop_token_ids) == [EOS]
        num_submits = len(stack.engine.submits)
        words = await refused(
            stack, "response_format", response_format={"type": "json_object", "schema": '{"not": {}}'}
        )
        assert "'not' is not supported" in words
        assert len(stack.engine.submits) == num_submits


def debugging(**fields: object) -> dict[str, Any]:
    return {"extra_body": {"debug_config": fields}}


async def test_row_18_debug_config_is_closed(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        for fields in ({"special_request": "query_engine_metrics"}, {"ignore_eos": True}, {}):
            assert "--enable-debug" in await refused(stack, "debug_config", **debugging(**fields))
        reply = await stack.http.post("/v1/completions", json={"prompt": "a", "debug_config": {"ignore_eos": True}})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "debug_config")
        assert stack.engine.submits == []


async def test_row_18_debug_config_of_a_server_with_enable_debug(
    make_stack: StackFactory, tokenizer: Tokenizer
) -> None:
    regex = {"guided_regex": "[0-9]"}
    async with make_stack(saying(tokenizer, "Hello there"), enable_debug=True) as stack:
        await ask(stack, **debugging(ignore_eos=False))
        assert list(stack.engine.submits[-1].stop_token_ids) == [EOS]
        for extra in ({"debug_config": {"ignore_eos": True}}, {"ignore_eos": True}):
            await ask(stack, extra_body=extra, max_tokens=2)
            assert list(stack.engine.submits[-1].stop_token_ids) == []
            words = await refused(stack, "", extra_body={**regex, **extra})
            assert "'ignore_eos' cannot be combined" in words
        await ask(stack, extra_body={**regex, "debug_config": {"grammar_execution_mode": "constraint"}})
        assert stack.engine.submits[-1].grammar.source == "[0-9]"
        words = await refused(stack, "debug_config", **debugging(grammar_execution_mode="jump_forward"))
        assert "'jump_forward' is not supported" in words
        await refused(stack, "debug_config.grammar_execution_mode", **debugging(grammar_execution_mode="fast"))
        await refused(stack, "debug_config.pinned_system_prompt", **debugging(pinned_system_prompt=True))


async def test_row_18_debug_config_asks_for_the_engines_metrics(make_stack: StackFactory) -> None:
    query = debugging(special_request="query_engine_metrics")
    async with make_stack(enable_debug=True) as stack:
        reply = await ask(stack, **query)
        assert reply.choices == []
        assert reply.usage.extra == {"tpserve_num_requests_running": 0}
        options = {"stream": True, "stream_options": {"include_usage": True}}
        (chunk,) = [chunk async for chunk in await ask(stack, **options, **query)]
        assert (chunk.object, chunk.usage.extra) == ("chat.completion.chunk", reply.usage.extra)
        assert "include_usage" in await refused(stack, "", stream=True, **query)
        body = {"prompt": "a", "debug_config": {"special_request": "query_engine_metrics"}}
        text = (await stack.http.post("/v1/completions", json=body)).json()
        assert (text["object"], text["usage"]["extra"]) == ("text_completion", reply.usage.extra)
        assert stack.engine.submits == []
