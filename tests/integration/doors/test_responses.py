"""/v1/responses with tools and schemas on the real model, through the official client."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from integration.doors.shapes import CITY, PERSON_SCHEMA, check_call, check_person
from server import MODEL_NAME, chat_request

QUESTION = "How is the weather in Paris?"
TOOL: Any = {"type": "function", "name": "get_weather", "description": "Weather of a city", "parameters": CITY}
REQUEST: dict[str, Any] = {"model": MODEL_NAME, "temperature": 0, "max_output_tokens": 160}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_forced_call_whole_streamed_and_answered(client: openai.OpenAI, choice: Any) -> None:
    request = REQUEST | {"tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False}
    # The chat route makes the same call.
    function = {"type": "function", "function": {"name": "get_weather"}}
    tools = [{"type": "function", "function": {name: TOOL[name] for name in ("name", "description", "parameters")}}]
    of_chat = chat_request(
        QUESTION, tools=tools, tool_choice=choice if choice == "required" else function, max_tokens=160
    )
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(lambda: client.responses.create(input=QUESTION, **request))
        chatted = pool.submit(lambda: client.chat.completions.create(**of_chat, parallel_tool_calls=False))
        events = list(client.responses.create(input=QUESTION, stream=True, **request))
        whole, chat = asked.result(), chatted.result()
    (item,) = whole.output
    assert item.type == "function_call"
    check_call({"name": item.name, "arguments": item.arguments}, "tool_calls")
    assert (whole.status, item.status) == ("completed", "completed")

    kinds = [event.type for event in events]
    num_deltas = kinds.count("response.function_call_arguments.delta")
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        *["response.function_call_arguments.delta"] * num_deltas,
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert num_deltas > 1  # they stream
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == item.arguments
    assert events[-1].type == "response.completed"
    (streamed,) = events[-1].response.output
    assert streamed.type == "function_call"
    assert (streamed.name, streamed.arguments) == (item.name, item.arguments)

    calls: Any = chat.choices[0].message.tool_calls
    assert calls[0].function.arguments == item.arguments

    # Its result goes back, and text comes.
    history: Any = [
        {"role": "user", "content": QUESTION},
        {"type": "function_call", "call_id": item.call_id, "name": item.name, "arguments": item.arguments},
        {"type": "function_call_output", "call_id": item.call_id, "output": "It is sunny, 21 degrees."},
    ]
    last = client.responses.create(input=history, **REQUEST | {"tools": [TOOL], "max_output_tokens": 24})
    assert last.output_text or last.output[0].type == "function_call"
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.input_tokens > whole.usage.input_tokens


def test_json_of_a_schema(client: openai.OpenAI) -> None:
    shape: Any = {"format": {"type": "json_schema", "name": "person", "schema": PERSON_SCHEMA, "strict": True}}
    reply = client.responses.create(input="Describe a person.", text=shape, **REQUEST)
    check_person(reply.output_text, "stop" if reply.status == "completed" else str(reply.status))
