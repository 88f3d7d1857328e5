"""POST /v1/responses with the official client: text, events in their order, tool history, refusals."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tpserve.coordinator.gateway.errors import QueueFull
from tpserve.coordinator.gateway.responses import ResponseWriter
from tpserve.coordinator.gateway.responses_wire import ResponseEvent, ResponseObject, ResponsesRequest
from tpserve.coordinator.gateway.stream import event_data
from tpserve.coordinator.gateway.tokenizer import Tokenizer
from tpserve.coordinator.relay import Identity
from unit.gateway.conftest import StackFactory
from unit.gateway.test_chat import HI


async def test_the_text_is_the_chats(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        chat = await stack.client.chat.completions.create(
            model="tiny", messages=HI, max_tokens=9, temperature=0, seed=1
        )
        stack.engine.script = lambda submit, choice: iter(tokens)
        tokens = stack.service.model.tokenizer.encode("the quick brown fox", add_special_tokens=False)
        reply = await stack.client.responses.create(model="tiny", input=list(HI), max_output_tokens=4)
        submits = stack.engine.submits
    assert submits[0].prompt_token_ids == submits[1].prompt_token_ids
    assert submits[1].max_tokens == 4
    assert chat.usage is not None
    assert reply.usage is not None
    assert reply.usage.input_tokens == chat.usage.prompt_tokens
    assert reply.output_text == stack.service.model.tokenizer.decode(tokens[:4])
    assert (reply.status, reply.object, reply.usage.output_tokens) == ("incomplete", "response", 4)
    assert reply.incomplete_details is not None
    assert reply.incomplete_details.reason == "max_output_tokens"
    assert reply.store is False  # type: ignore[attr-defined]


async def test_events_come_in_order(make_stack: StackFactory, tokenizer: Tokenizer) -> None:
    async with make_stack() as stack:
        ids = [*tokenizer.encode("the quick brown fox", add_special_tokens=False), 2]
        stack.engine.script = lambda submit, choice: iter(ids)
        events = [event async for event in await stack.client.responses.create(model="tiny", input="Hi", stream=True)]
        raw = (await stack.http.post("/v1/responses", json={"input": "Hi", "stream": True})).content
    kinds = [event.type for event in events]
    num_deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * num_deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == "the quick brown fox"
    assert last.response.usage is not None
    assert (
        "".join(event.delta for event in events if event.type == "response.output_text.delta") == "the quick brown fox"
    )
    assert b"[DONE]" not in raw
    for data in event_data(raw):
        ResponseEvent.model_validate_json(data)


async def test_instructions_and_history_become_messages(make_stack: StackFactory, tokenizer: Tokenizer) -> None:
    async with make_stack() as stack:
        body = {
            "instructions": "be brief",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "first"}]},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "answer"}]},
                {"type": "reasoning", "summary": []},
                {"role": "user", "content": "second"},
            ],
        }
        assert (await stack.http.post("/v1/responses", json=body)).status_code == 200
        prompt = stack.engine.submits[0].prompt_token_ids
    assert tokenizer.decode(prompt) == "system\nbe brief\nuser\nfirst\nassistant\nanswer\nuser\nsecond\nassistant\n"


def test_tool_history_is_translated() -> None:
    request = ResponsesRequest.model_validate_json(
        json.dumps(
            {
                "input": [
                    {"role": "user", "content": "weather?"},
                    {"type": "function_call", "call_id": "c1", "name": "w", "arguments": '{"a": 1}'},
                    {"type": "function_call", "call_id": "c2", "name": "w", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
                ],
                "tools": [{"type": "function", "name": "w", "description": "d", "parameters": {"type": "object"}}],
                "tool_choice": {"type": "function", "name": "w"},
                "text": {"format": {"type": "json_schema", "name": "s", "schema": {"type": "object"}, "strict": True}},
            }
        )
    )
    chat = request.to_chat()
    assert [call["id"] for call in chat["messages"][1]["tool_calls"]] == ["c1", "c2"]
    assert chat["messages"][2] == {"role": "tool", "tool_call_id": "c1", "content": "sunny"}
    function = {"name": "w", "description": "d", "parameters": {"type": "object"}}
    assert chat["tools"] == [{"type": "function", "function": function}]
    assert chat["tool_choice"] == {"type": "function", "function": {"name": "w"}}
    schema = {"name": "s", "schema": {"type": "object"}, "strict": True}
    assert chat["response_format"] == {"type": "json_schema", "json_schema": schema}


def chunk(finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def test_reasoning_text_and_calls_become_items() -> None:
    writer = ResponseWriter(ResponsesRequest(input="x"), "m", Identity.fresh(0, 0))
    raw = writer.begin()
    for piece in (
        chunk(role="assistant", content=""),
        chunk(reasoning_content="hm"),
        chunk(content="I "),
        chunk(content="look"),
        chunk(tool_calls=[{"index": 0, "id": "c1", "type": "function", "function": {"name": "w", "arguments": ""}}]),
        chunk(tool_calls=[{"index": 0, "function": {"arguments": '{"a"'}}]),
        chunk(tool_calls=[{"index": 0, "function": {"arguments": ":1}"}}]),
        chunk(tool_calls=[{"index": 1, "id": "c2", "type": "function", "function": {"name": "v", "arguments": "{}"}}]),
        chunk(finish="tool_calls"),
    ):
        raw += writer.take(piece)
    raw += writer.end()
    answer = ResponseObject.model_validate(writer.to_dict())
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call", "function_call"]
    assert answer.output[1].content is not None
    assert answer.output[1].content[0].text == "I look"
    calls = [(item.call_id, item.name, item.arguments) for item in answer.output[2:]]
    assert calls == [("c1", "w", '{"a":1}'), ("c2", "v", "{}")]
    assert {item.status for item in answer.output} == {"completed"}
    events = [ResponseEvent.model_validate_json(data) for data in event_data(raw)]
    done = [event.arguments for event in events if event.type == "response.function_call_arguments.done"]
    assert done == ['{"a":1}', "{}"]
    failed = json.loads(event_data(writer.failed(QueueFull("later")))[0])
    assert (failed["type"], failed["response"]["error"]["message"]) == ("response.failed", "later")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_feature"),
        ({"background": True}, "background", "unsupported_feature"),
        ({"truncation": "auto"}, "truncation", "unsupported_feature"),
        ({"max_output_tokens": 5000}, "max_output_tokens", "context_length_exceeded"),
        ({"input": [{"role": "user"}]}, "input[0]", None),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "unsupported_feature"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", None),
        ({"model": "other"}, "model", "model_not_found"),
    ],
)
async def test_refusals(make_stack: StackFactory, fields: dict[str, Any], param: str, code: str | None) -> None:
    async with make_stack() as stack:
        with pytest.raises(openai.APIStatusError) as caught:
            await stack.client.responses.create(**{"model": "tiny", "input": "Hi", **fields})
        assert stack.service.engine.num_live_requests == 0
    assert (caught.value.param, caught.value.code) == (param, code)
    assert "max_completion_tokens" not in caught.value.message


async def test_a_failure_while_streaming_is_an_event(make_stack: StackFactory) -> None:
    async with make_stack() as stack:
        stack.engine.fail_after = 3
        stream = await stack.client.responses.create(model="tiny", input="Hi", stream=True)
        events = [event async for event in stream]
        whole = await stack.http.post("/v1/responses", json={"input": "Hi"})
    last = events[-1]
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert "rank 1 was lost" in last.response.error.message
    assert whole.status_code == 503
