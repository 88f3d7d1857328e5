"""Reasoning and tool calls of several families, chosen by the model folder's template, over HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from text_models import EOS, byte_tokenizer
from tpserve.coordinator.gateway.tokenizer import Tokenizer
from unit.gateway.conftest import StackFactory
from unit.gateway.scripted_engine import ScriptedEngine, fixed_script

HI: Any = [{"role": "user", "content": "hi"}]
TOOLS: Any = [{"type": "function", "function": {"name": "f"}}]
BODY = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"


def write_model(folder: Path, template: str) -> Tokenizer:
    backend = byte_tokenizer(added=("<think>", "</think>"), special=("[TOOL_CALLS]", "<|python_tag|>"))
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": EOS}))
    return Tokenizer.load(folder)


def engine_saying(tokenizer: Tokenizer, text: str, tokens_per_event: int) -> ScriptedEngine:
    ids = [*tokenizer.encode(text, add_special_tokens=False), EOS]
    return ScriptedEngine(fixed_script(ids), tokenizer.vocab_size, tokens_per_event=tokens_per_event)


@pytest.mark.parametrize("tokens_per_event", [1, 5])
@pytest.mark.parametrize(
    ("template", "text", "reasoning", "content", "call"),
    [
        (f"{BODY}<think>x</think>;", "<think>\nIs it?\n</think>\n\nYes.", "Is it?", "Yes.", None),
        (f"{BODY}<think>x</think>;", "Yes.", None, "Yes.", None),
        (f"{BODY}<think>\n", "Is it?</think>Yes.", "Is it?", "Yes.", None),
        (
            f"{BODY}<think>x</think>;<tool_call>",
            '<think>call</think>\n<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>',
            "call",
            None,
            '{"a": "é"}',
        ),
        (f"{BODY}[TOOL_CALLS]", '[TOOL_CALLS][{"name": "f", "arguments": {}}]', None, None, "{}"),
        (f"{BODY}<|python_tag|>", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', None, None, '{"a": 1}'),
        (f"{BODY}<|python_tag|>", '{"name": "f", "parameters": {"a": 1}}', None, None, '{"a": 1}'),
        (f"{BODY}<|python_tag|>", "Just an answer.", None, "Just an answer.", None),
    ],
)
async def test_families(
    make_stack: StackFactory,
    tmp_path: Path,
    template: str,
    text: str,
    reasoning: str | None,
    content: str | None,
    call: str | None,
    tokens_per_event: int,
) -> None:
    tokenizer = write_model(tmp_path, template)
    engine = engine_saying(tokenizer, text, tokens_per_event)
    request: Any = {"model": "tiny", "messages": HI, "tools": TOOLS, "max_tokens": 300}
    async with make_stack(engine, model_dir=str(tmp_path)) as stack:
        whole = (await stack.client.chat.completions.create(**request)).choices[0]
        chunks = [chunk async for chunk in await stack.client.chat.completions.create(**request, stream=True)]
    message = whole.message.to_dict()
    assert (message.get("reasoning_content"), message["content"]) == (reasoning, content)
    deltas: list[Any] = [chunk.choices[0].delta.to_dict() for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == (reasoning or "")
    assert "".join(delta.get("content") or "" for delta in deltas) == (content or "")
    streamed = "".join(part["function"]["arguments"] for delta in deltas for part in delta.get("tool_calls", ()))
    assert streamed == (call or "")
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason == ("stop" if call is None else "tool_calls")
    calls: Any = message.get("tool_calls", [])
    assert [item["function"]["arguments"] for item in calls] == ([] if call is None else [call])


async def test_logprobs_stay_with_the_tokens_that_reasoning_and_calls_are_made_of(
    make_stack: StackFactory, tmp_path: Path
) -> None:
    text = '<think>so</think>\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    tokenizer = write_model(tmp_path, f"{BODY}<think>x</think>;<tool_call>")
    request: Any = {"model": "tiny", "messages": HI, "tools": TOOLS, "logprobs": True, "max_tokens": 300}
    async with make_stack(engine_saying(tokenizer, text, 1), model_dir=str(tmp_path)) as stack:
        whole = (await stack.client.chat.completions.create(**request)).choices[0]
        chunks = [chunk async for chunk in await stack.client.chat.completions.create(**request, stream=True)]
    tokens = len(tokenizer.encode(text, add_special_tokens=False))
    assert whole.logprobs is not None
    assert len(whole.logprobs.content or ()) == tokens
    streamed = [item for c in chunks if c.choices[0].logprobs for item in c.choices[0].logprobs.content or ()]
    assert len(streamed) == tokens
