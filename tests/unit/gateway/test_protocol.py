"""Every field of both request bodies: what is accepted, and what is refused by which name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tpserve.coordinator.gateway.errors import InvalidRequest
from tpserve.coordinator.gateway.protocol import ChatCompletionRequest, CompletionRequest, parse_body

USER = {"role": "user", "content": "hi"}


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def chat(**fields: Any) -> ChatCompletionRequest:
    return parse_body(ChatCompletionRequest, json.dumps({"messages": [USER], **fields}).encode())


def completion(**fields: Any) -> CompletionRequest:
    return parse_body(CompletionRequest, json.dumps({"prompt": "hi", **fields}).encode())


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("model", ["m", None]),
        ("frequency_penalty", [-2, 2, 0.5, None]),
        ("presence_penalty", [-2, 2, None]),
        ("logit_bias", [{"5": 100, "0": -100}, {}, None]),
        ("max_tokens", [1, 2**31 - 1, None]),
        ("n", [1, 128, None]),
        ("seed", [0, -1, 2**64 - 1, -(2**63), None]),
        ("stop", ["x", ["x"] * 16, [], None]),
        ("stream", [True, False, None]),
        ("temperature", [0, 2, 1e-9, None]),
        ("top_p", [1, 1e-9, None]),
        ("top_k", [0, 1, None]),
        ("min_p", [0, 1, None]),
        ("ignore_eos", [True, None]),
        ("stop_token_ids", [[1, 2], [], None]),
        ("user", ["u", None]),
        ("response_format", [{"type": "text"}, None]),
        ("tools", [[], None]),
        ("service_tier", ["auto"]),
    ],
)
def test_accepted(name: str, values: list[Any]) -> None:
    for value in values:
        request = chat(**{name: value})
        if name in type(request).model_fields and isinstance(value, int | str | list | None):
            assert getattr(request, name) == value


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("messages", [[], None, "hi", {}, [1], [{}], [{"role": "user"}], [{"role": "judge", "content": "x"}]]),
        ("model", [1, [], True]),
        ("frequency_penalty", [-2.1, 2.1, "0", True, [], float("nan"), float("inf")]),
        ("presence_penalty", [-2.1, 2.1, "0", float("-inf")]),
        ("logit_bias", [{"x": 1}, {"5": 101}, {"5": -100.5}, {"-1": 1}, {str(2**40): 1}, [5], {"5": "1"}]),
        ("max_tokens", [0, -1, 1.5, "1", True, 2**31, 10**400]),
        ("max_completion_tokens", [0, -1, 2**40]),
        ("n", [0, -1, 129, 1.5, "1"]),
        ("seed", [1.5, "1", 2**64, -(2**63) - 1]),
        ("stop", ["", [""], ["x"] * 17, 1, [1], "x" * 2000]),
        ("stream", ["true", 1]),
        ("stream_options", ["x", {"include_usage": "yes"}]),
        ("temperature", [-0.1, 2.1, "1", float("nan"), True]),
        ("top_p", [0, -1, 1.1, float("nan")]),
        ("top_k", [-1, 1.5, 2**31]),
        ("min_p", [-0.1, 1.1]),
        ("stop_token_ids", [[-1], ["1"], 5, [2**32]]),
        ("user", [5]),
        ("logprobs", [1, "true"]),
        ("top_logprobs", [-1, 21, "1"]),
        (
            "response_format",
            [
                {"type": "x"},
                "text",
                {},
                {"type": "json_schema"},
                {"type": "json_schema", "json_schema": {"name": "x"}},
                {"type": "json_object", "json_schema": {"schema": {}}},
                {"type": "json_schema", "json_schema": {"schema": {}}, "schema": "{}"},
                {"type": "json_object", "schema": 5},
            ],
        ),
        ("guided_json", [5, []]),
        ("guided_regex", ["", 5]),
        ("guided_choice", [[], [""], "a", [1]]),
        ("guided_grammar", ["", {}]),
        ("tools", [{}, [{"type": "x"}], [{"type": "function"}], [tool("a b")], [tool("")], [tool("x" * 65)]]),
        ("tool_choice", ["x", {}, {"type": "function"}, 5]),
        ("parallel_tool_calls", ["yes"]),
    ],
)
def test_refused_by_name(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequest) as caught:
            chat(**{name: value})
        assert caught.value.param is not None
        assert caught.value.param.startswith(name)
        assert name in caught.value.message
        assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"top_logprobs": 3}, "'logprobs' is true"),
        ({"stream_options": {"include_usage": True}}, "'stream' is true"),
        ({"tools": [tool("f"), tool("f")]}, "'f' is defined more than once"),
        ({"tool_choice": "required"}, "only allowed when 'tools' are given"),
        ({"tool_choice": "auto", "tools": []}, "only allowed when 'tools' are given"),
        ({"tools": [tool("f")], "tool_choice": named("g")}, "names 'g', which is not among the tools"),
        ({"tools": [tool("f")], "tool_choice": "required", "guided_regex": "a"}, "cannot be combined"),
        ({"tools": [tool("f")], "tool_choice": named("f"), "ignore_eos": True}, "cannot be combined"),
        ({"functions": [{"name": "f"}]}, "use 'tools'"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "at most one may shape the output"),
        ({"guided_json": {}, "response_format": {"type": "json_object"}}, "at most one may shape the output"),
        ({"guided_json": {}, "ignore_eos": True}, "'ignore_eos' cannot be combined with 'guided_json'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "needs the field 'text'"),
        (
            {"messages": [{**USER, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": ""}}]}]},
            "only assistant messages",
        ),
    ],
)
def test_fields_that_contradict_each_other(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        chat(**fields)


def test_what_is_not_served_says_so() -> None:
    image = {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}],
    }
    with pytest.raises(InvalidRequest, match="'image_url' is not supported") as caught:
        chat(messages=[USER, image])
    assert caught.value.param == "messages[1].content[1]"
    assert caught.value.code == "unsupported_feature"
    with pytest.raises(InvalidRequest, match="'functions'") as caught:
        chat(functions=[{"name": "f"}])
    assert caught.value.code == "unsupported_feature"


def test_which_tools_may_be_called() -> None:
    tools = [tool("f"), tool("g")]

    def callable_names(**fields: Any) -> list[str]:
        return [item.function.name for item in chat(tools=tools, **fields).callable_tools]

    assert (
        callable_names() == callable_names(tool_choice="auto") == callable_names(tool_choice="required") == ["f", "g"]
    )
    assert callable_names(tool_choice="none") == []
    assert callable_names(tool_choice=named("g")) == ["g"]
    forced = [chat(tools=tools, tool_choice=choice).forces_tools for choice in (None, "none", "auto", "required")]
    assert forced == [False, False, False, True]
    assert chat(tools=tools, tool_choice=named("g")).forces_tools


def test_output_limit_prefers_the_newer_name() -> None:
    assert chat().output_limit is None
    assert chat(max_tokens=5).output_limit == 5
    assert chat(max_tokens=5, max_completion_tokens=7).output_limit == 7


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hi", ["hi"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts(prompt: Any, prompts: list[Any]) -> None:
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize("prompt", [None, 5, [], [[]], ["a", 1], [1, "a"], [[1], "a"], [-1], [2**32], ["a"] * 257, {}])
def test_prompts_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion(prompt=prompt)
    assert (caught.value.param or "").startswith("prompt")


@pytest.mark.parametrize(
    "fields",
    [
        {"suffix": "x"},
        {"best_of": 2},
        {"best_of": 1, "n": 2},
        {"logprobs": 6},
        {"logprobs": True},
        {"echo": True, "logprobs": 1},
    ],
)
def test_completion_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        completion(**fields)


def test_completion_accepted() -> None:
    assert completion(suffix=None, best_of=2, n=2, logprobs=5, echo=False).logprobs == 5


BROKEN = [
    b"",
    b"null",
    b"[]",
    b"{",
    b"\xff\xfe",
    b'{"messages": [{"role": "user", "content": "\xff"}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": ' + b"[" * 100_000,
    b'{"x": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    b'{"seed": ' + b"9" * 10_000 + b"}",
    b'{"seed": 1e999}',
]


@pytest.mark.parametrize("body", BROKEN, ids=range(len(BROKEN)))
def test_broken_bodies(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_body(ChatCompletionRequest, body)
    assert len(caught.value.message) < 400
