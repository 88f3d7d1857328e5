"""Text completions through the official client, over a real server and a real gRPC session."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tpserve.coordinator.gateway.tokenizer import Tokenizer
from unit.gateway.conftest import StackFactory
from unit.gateway.scripted_engine import ScriptedEngine, fixed_script

EOS = 2


async def test_text_and_defaults(make_stack: StackFactory, tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("the lazy dog", add_special_tokens=False)
    async with make_stack(ScriptedEngine(fixed_script([*tokens, EOS]), tokenizer.vocab_size)) as stack:
        answer = await stack.client.completions.create(model="tiny", prompt="Hello")
    assert answer.object == "text_completion"
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("the lazy dog", "stop")
    assert stack.engine.submits[0].max_tokens == 16
    assert list(stack.engine.submits[0].prompt_token_ids) == tokenizer.encode("Hello", add_special_tokens=True)


@pytest.mark.parametrize("stream", [False, True])
async def test_prompts_times_n_with_echo(make_stack: StackFactory, tokenizer: Tokenizer, stream: bool) -> None:
    """Each choice is what its prompt and number alone decide, whichever way the prompts are written."""
    texts = ["Hello there", "the lazy dog"]
    ids = [tokenizer.encode(text, add_special_tokens=True) for text in texts]
    async with make_stack() as stack:

        async def run(prompt: Any, echo: bool) -> list[str]:
            request: dict[str, Any] = {"prompt": prompt, "n": 2, "max_tokens": 12, "seed": 3, "echo": echo}
            if not stream:
                answer = await stack.client.completions.create(model="tiny", **request)
                return [choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)]
            found: dict[int, str] = {}
            chunks = await stack.client.completions.create(model="tiny", stream=True, **request)
            async for chunk in chunks:
                choice = chunk.choices[0]
                found[choice.index] = found.get(choice.index, "") + choice.text
            return [found[index] for index in sorted(found)]

        plain = [*await run(texts[0], False), *await run(texts[1], False)]
        assert len(set(plain)) == 4
        assert await run(texts, False) == plain
        assert await run(ids, False) == plain
        assert await run(ids[1], False) == plain[2:]
        echoed = [texts[0] + plain[0], texts[0] + plain[1], texts[1] + plain[2], texts[1] + plain[3]]
        assert await run(texts, True) == echoed
        assert await run(ids, True) == echoed


async def test_usage_counts_each_prompt_once(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        stack.engine.num_cached_tokens = 2
        answer = await stack.client.completions.create(
            model="tiny", prompt=[[3, 4, 5], [6, 7]], n=3, max_tokens=4, extra_body={"ignore_eos": True}
        )
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 24)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4


async def test_logprobs_in_the_older_form(make_stack: StackFactory, tokenizer: Tokenizer) -> None:
    text = "Köln 👩 ok"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    async with make_stack(ScriptedEngine(fixed_script([*tokens, EOS]), tokenizer.vocab_size)) as stack:
        answer = await stack.client.completions.create(model="tiny", prompt="x", logprobs=2, max_tokens=50)
        chunks = await stack.client.completions.create(model="tiny", prompt="x", logprobs=2, max_tokens=50, stream=True)
        streamed = [o async for c in chunks if c.choices[0].logprobs for o in c.choices[0].logprobs.text_offset or []]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == [tokenizer.shown(token)[0] for token in tokens]
    assert logprobs.token_logprobs == [-0.5] * len(tokens)
    assert logprobs.top_logprobs is not None
    assert all(len(top) in (2, 3) for top in logprobs.top_logprobs)
    assert logprobs.text_offset == [
        len(tokenizer.decode(tokens[:i]).removesuffix("\ufffd")) for i in range(len(tokens))
    ]
    assert streamed == logprobs.text_offset


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": [5, 100_000]}, "token 100000"),
        ({"prompt": ""}, "no tokens"),
        ({"prompt": ["a"] * 200, "n": 2}, "400 choices"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": [3] * 512}, "512 tokens"),
        ({"prompt": [3] * 500, "max_tokens": 13}, "lower max_tokens to 12"),
    ],
)
async def test_refused(make_stack: StackFactory, fields: dict[str, Any], words: str) -> None:
    async with make_stack() as stack:
        with pytest.raises(openai.BadRequestError, match=words):
            await stack.client.completions.create(model="tiny", **fields)
        assert stack.engine.submits == []


async def test_usage_by_chunk_counts_tokens_without_text(make_stack: StackFactory, tokenizer: Tokenizer) -> None:
    """A load tool learns when each token came and how many came at once, whatever text they make."""
    tokens = tokenizer.encode("a 👩 b", add_special_tokens=False)
    request: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": 50,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    for tokens_per_event in (1, 3):
        script = fixed_script([*tokens, EOS])
        engine = ScriptedEngine(script, tokenizer.vocab_size, tokens_per_event=tokens_per_event)
        async with make_stack(engine) as stack:
            chunks = [c async for c in await stack.client.completions.create(prompt="x", **request)]
            request_in_chat: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], **request}
            chats = [c async for c in await stack.client.chat.completions.create(**request_in_chat)]
        assert "".join(c.choices[0].text for c in chunks if c.choices) == "a 👩 b"
        counts = [c.usage.completion_tokens for c in chunks if c.choices]
        assert counts == sorted(counts)
        assert counts[-1] == chunks[-1].usage.completion_tokens == len(tokens) + 1
        if tokens_per_event == 1:  # events may arrive together, so that a chunk may count more than one
            assert any(not c.choices[0].text and c.usage.completion_tokens <= len(tokens) for c in chunks if c.choices)
        in_chat = [c.usage.completion_tokens for c in chats if c.usage]
        assert (in_chat[-1], in_chat) == (len(tokens) + 1, sorted(in_chat))
