"""Chat completions through the official client, over a real server and a real gRPC session."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tpserve.coordinator.gateway.tokenizer import Tokenizer
from unit.gateway.conftest import StackFactory
from unit.gateway.scripted_engine import ScriptedEngine, fixed_script

EOS = 2
HI: Any = [{"role": "user", "content": "Hello there"}]


def engine_saying(tokenizer: Tokenizer, *texts: str, **fields: Any) -> ScriptedEngine:
    choices = [[*tokenizer.encode(text, add_special_tokens=False), EOS] for text in texts]
    return ScriptedEngine(fixed_script(*choices), tokenizer.vocab_size, **fields)


async def test_whole_answer(make_stack: StackFactory, tokenizer: Tokenizer) -> None:
    text = "Grüße aus Köln, 👩‍👩‍👧!"
    async with make_stack(engine_saying(tokenizer, text, num_cached_tokens=5)) as stack:
        answer = await stack.client.chat.completions.create(model="gpt-4", messages=HI)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "gpt-4"
    assert answer.object == "chat.completion"
    submit = stack.engine.submits[0]
    prompt = "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"
    assert list(submit.prompt_token_ids) == tokenizer.encode(prompt, add_special_tokens=False)
    assert list(submit.stop_token_ids) == [EOS]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(submit.prompt_token_ids)
    assert answer.usage.completion_tokens == len(tokenizer.encode(text, add_special_tokens=False)) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 5


@pytest.mark.parametrize("tokens_per_event", [1, 3])
async def test_stream_adds_up(make_stack: StackFactory, tokenizer: Tokenizer, tokens_per_event: int) -> None:
    text = "Grüße aus Köln, 👩‍👩‍👧!"
    async with make_stack(engine_saying(tokenizer, text, tokens_per_event=tokens_per_event)) as stack:
        stream = await stack.client.chat.completions.create(
            model="tiny", messages=HI, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(tokenizer.encode(text, add_special_tokens=False)) + 1
    assert len({c.id for c in chunks}) == 1


async def test_stream_on_the_wire(make_stack: StackFactory, tokenizer: Tokenizer) -> None:
    async with make_stack(engine_saying(tokenizer, "Hello")) as stack:
        reply = await stack.http.post("/v1/chat/completions", json={"messages": HI, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert '"usage"' not in reply.text


async def test_seed_makes_text(make_stack: StackFactory) -> None:
    async with make_stack() as stack:

        async def text(seed: int | None) -> str | None:
            answer = await stack.client.chat.completions.create(model="tiny", messages=HI, max_tokens=20, seed=seed)
            return answer.choices[0].message.content

        assert await text(7) == await text(7)
        assert await text(-7) != await text(7)
        assert await text(None) != await text(None)


async def test_n_choices_interleave(make_stack: StackFactory, tokenizer: Tokenizer) -> None:
    texts = ("Hello there, how are you", "the quick brown fox")
    async with make_stack(engine_saying(tokenizer, *texts)) as stack:
        answer = await stack.client.chat.completions.create(model="tiny", messages=HI, n=2)
        assert [choice.message.content for choice in answer.choices] == list(texts)
        stream = await stack.client.chat.completions.create(model="tiny", messages=HI, n=2, stream=True)
        streamed = ["", ""]
        order = []
        async for chunk in stream:
            choice = chunk.choices[0]
            streamed[choice.index] += choice.delta.content or ""
            order.append(choice.index)
    assert streamed == list(texts)
    assert order != sorted(order)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(len(tokenizer.encode(t, add_special_tokens=False)) + 1 for t in texts)


@pytest.mark.parametrize("tokens_per_event", [1, 4])
@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_across_tokens(
    make_stack: StackFactory, tokenizer: Tokenizer, tokens_per_event: int, stream: bool
) -> None:
    full = "Hello there XYZZY and then more of it " * 3
    tokens = tokenizer.encode(full, add_special_tokens=False)
    used = next(i for i in range(len(tokens)) if "XYZZY" in tokenizer.decode(tokens[:i]))
    engine = engine_saying(tokenizer, full, tokens_per_event=tokens_per_event)
    engine.gate.clear()  # without the abort it would wait for ever
    async with make_stack(engine) as stack:
        engine.gate.set()
        request: dict[str, Any] = {"messages": HI, "stop": ["nope", "XYZZY"], "stream": stream}
        if stream:
            request["stream_options"] = {"include_usage": True}
            parts = await stack.client.chat.completions.create(model="tiny", **request)
            chunks = [chunk async for chunk in parts]
            text = "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
            finish, usage = chunks[-2].choices[0].finish_reason, chunks[-1].usage
        else:
            answer = await stack.client.chat.completions.create(model="tiny", **request)
            text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
            usage = answer.usage
        assert (text, finish) == ("Hello there ", "stop")
        assert usage.completion_tokens == used
        abort = await asyncio.wait_for(stack.engine.aborts.get(), 10)
    assert (abort.request_id, abort.choice) == (stack.engine.submits[0].request_id, 0)


async def test_stop_string_that_never_completes_is_shown(make_stack: StackFactory, tokenizer: Tokenizer) -> None:
    async with make_stack(engine_saying(tokenizer, "Hello XYZ")) as stack:
        answer = await stack.client.chat.completions.create(model="tiny", messages=HI, stop="XYZZY")
    assert answer.choices[0].message.content == "Hello XYZ"


async def test_logprobs(make_stack: StackFactory, tokenizer: Tokenizer) -> None:
    async with make_stack(engine_saying(tokenizer, "Köln 👩")) as stack:
        answer = await stack.client.chat.completions.create(model="tiny", messages=HI, logprobs=True, top_logprobs=2)
        stream = await stack.client.chat.completions.create(
            model="tiny", messages=HI, logprobs=True, top_logprobs=2, stream=True
        )
        streamed = [item async for c in stream if c.choices[0].logprobs for item in c.choices[0].logprobs.content or []]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    raw = b"".join(bytes(item.bytes or []) for item in logprobs.content)
    assert raw.decode() == "Köln 👩"
    assert all(item.logprob == -0.5 for item in logprobs.content)
    assert all(len(item.top_logprobs) == 2 for item in logprobs.content)
    assert streamed == logprobs.content


async def test_length_and_default_limit(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        answer = await stack.client.chat.completions.create(model="tiny", messages=HI, max_completion_tokens=9)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 9
        await stack.client.chat.completions.create(model="tiny", messages=HI)
    last = stack.engine.submits[-1]
    assert last.max_tokens == stack.engine.max_model_len - len(last.prompt_token_ids)


async def test_sampling_reaches_the_engine(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        await stack.client.chat.completions.create(
            model="tiny",
            messages=HI,
            max_tokens=1,
            temperature=0.5,
            top_p=0.25,
            frequency_penalty=-1.5,
            presence_penalty=0.75,
            seed=2**40,
            logit_bias={"5": -100, "6": 3},
            user="someone",
            extra_body={"top_k": 7, "min_p": 0.125, "ignore_eos": True, "unknown_field": 1},
        )
        sampling = stack.engine.submits[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 7, 0.125)
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.seed) == (-1.5, 0.75, 2**40)
    assert dict(zip(sampling.bias_token_ids, sampling.bias_values, strict=True)) == {5: -100.0, 6: 3.0}
    assert not sampling.HasField("num_logprobs")
    assert list(stack.engine.submits[0].stop_token_ids) == []


async def test_history_with_tools_and_parts(make_stack: StackFactory, tokenizer: Tokenizer) -> None:
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "ok"},
    ]
    async with make_stack() as stack:
        await stack.client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)
    prompt = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>\n<|im_start|>user\n'
        "<tool_response>\nok\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    expected = tokenizer.encode(prompt, add_special_tokens=False)
    assert list(stack.engine.submits[0].prompt_token_ids) == expected


async def test_many_clients_get_what_each_gets_alone(make_stack: StackFactory) -> None:
    async with make_stack() as stack:

        async def text(seed: int) -> str:
            stream = await stack.client.chat.completions.create(
                model="tiny", messages=HI, max_tokens=40, seed=seed, stream=True
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream])

        alone = [await text(seed) for seed in range(8)]
        together = await asyncio.gather(*(text(seed % 8) for seed in range(32)))
        assert together == alone * 4
        assert stack.service.engine.num_live_requests == 0
