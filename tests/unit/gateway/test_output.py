"""From a request and a template to a grammar and a parser: which of them, and that the grammar compiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from text_models import EOS, write_byte_tokenizer
from tpserve.coordinator.gateway.chat_template import ChatTemplate
from tpserve.coordinator.gateway.errors import InvalidRequest
from tpserve.coordinator.gateway.output import Shape, chat_shape, completion_shape
from tpserve.coordinator.gateway.protocol import ChatCompletionRequest, CompletionRequest, parse_body
from tpserve.coordinator.gateway.tools.formats import ToolFormat
from tpserve.coordinator.gateway.tools.parser import ReasoningMode
from tpserve.proto.grammar import GrammarCompiler
from tpserve.proto.messages import Grammar, GrammarKind

PLAIN = "{{ messages[0].content }}"
# The marks of the real templates, and as much of them as matters here.
QWEN = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}<tool_call></tool_call>{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.reasoning_content %}({{ m.reasoning_content }})"
    "{% endif %}{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{{ '\\n' }}{% endfor %}assistant: "
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}"
)
R1 = "{{ messages[0].content }}<think>\n"
LLAMA = "{% if tools %}{{ tools[0].function.name }}{% endif %}<|python_tag|>{{ messages[0].content }}"
MISTRAL = "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}[TOOL_CALLS]{{ messages[0].content }}"
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    },
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> GrammarCompiler:
    folder: Path = tmp_path_factory.mktemp("text")
    size = write_byte_tokenizer(folder, special=("[TOOL_CALLS]",), added=("<think>", "</think>", "<tool_call>"))
    return GrammarCompiler(folder, size)


def shape(template: str, **fields: Any) -> Shape:
    request = parse_body(
        ChatCompletionRequest, json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode()
    )
    made = ChatTemplate(template, {})
    tools = [{"type": "function", "function": {"name": tool.function.name}} for tool in request.tools or ()]
    prompt = made.render([{"role": "user", "content": "hi"}], tools, request.chat_template_kwargs)
    return chat_shape(request, made, prompt, [EOS])


def accepts(compiler: GrammarCompiler, grammar: Grammar | None, text: str) -> bool:
    assert grammar is not None
    matcher = compiler.matcher(compiler.compile(grammar), grammar.stop_token_ids)
    return bool(matcher.accept_string(text, False) and matcher.is_completed())


@pytest.mark.parametrize(
    ("fields", "kind", "yes", "no"),
    [
        ({"response_format": {"type": "json_object"}}, GrammarKind.JSON_SCHEMA, '{"x": [1]}', "[1]"),
        ({"guided_json": SCHEMA}, GrammarKind.JSON_SCHEMA, '{"a": true}', '{"a": 1}'),
        ({"guided_json": json.dumps(SCHEMA)}, GrammarKind.JSON_SCHEMA, '{"a": true}', "{}"),
        ({"guided_regex": "a+"}, GrammarKind.REGEX, "aa", "b"),
        ({"guided_choice": ['say "a"', "b\n"]}, GrammarKind.STRUCTURAL_TAG, 'say "a"', "b"),
        ({"guided_grammar": 'root ::= "x" | "y"'}, GrammarKind.EBNF, "y", "z"),
    ],
)
def test_constraints_of_plain_chats_and_completions(
    compiler: GrammarCompiler, fields: dict[str, Any], kind: GrammarKind, yes: str, no: str
) -> None:
    made = shape(PLAIN, **fields)
    text = completion_shape(parse_body(CompletionRequest, json.dumps({"prompt": "x", **fields}).encode()), [EOS])
    assert made.grammar == text.grammar
    assert made.grammar is not None
    assert (made.grammar.kind, made.grammar.stop_token_ids) == (kind, (EOS,))
    assert made.param == next(iter(fields))
    assert made.is_plain
    assert accepts(compiler, made.grammar, yes)
    assert not accepts(compiler, made.grammar, no)


def test_no_grammar_where_nothing_is_asked_for() -> None:
    assert shape(PLAIN).grammar is None
    assert shape(PLAIN, response_format={"type": "text"}).grammar is None
    assert shape(QWEN, tools=[TOOL]).grammar is None
    assert shape(QWEN, tools=[TOOL], tool_choice="none").tool_format is None
    assert shape(PLAIN, tools=[TOOL]).tool_format is ToolFormat.HERMES


@pytest.mark.parametrize(
    ("template", "kwargs", "mode"),
    [
        (PLAIN, None, ReasoningMode.NONE),
        (QWEN.replace("<think>", "").replace("</think>", ""), None, ReasoningMode.NONE),
        (QWEN, None, ReasoningMode.POSSIBLE),
        (QWEN, {"enable_thinking": True}, ReasoningMode.POSSIBLE),
        (QWEN, {"enable_thinking": False}, ReasoningMode.NONE),
        (R1, None, ReasoningMode.OPENED),
    ],
)
def test_reasoning_is_told_from_the_prompt(template: str, kwargs: Any, mode: ReasoningMode) -> None:
    assert shape(template, chat_template_kwargs=kwargs).reasoning is mode


def test_the_grammar_begins_behind_the_reasoning(compiler: GrammarCompiler) -> None:
    possible = shape(QWEN, guided_json=SCHEMA).grammar
    for text in ('{"a": true}', '<think>\n{"x\n</think>\n\n{"a": true}', '<think></think>{"a": false}'):
        assert accepts(compiler, possible, text), text
    assert not accepts(compiler, possible, "<think>a</think>no")
    opened = shape(R1, guided_regex="yes").grammar
    assert accepts(compiler, opened, "so</think>\nyes")
    assert not accepts(compiler, opened, "yes")
    assert not accepts(compiler, opened, "so</think>no")
    switched_off = shape(QWEN, guided_regex="yes", chat_template_kwargs={"enable_thinking": False}).grammar
    assert switched_off is not None
    assert switched_off.kind is GrammarKind.REGEX


@pytest.mark.parametrize(
    ("template", "call"),
    [
        (QWEN, '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'),
        (LLAMA, '{"name": "f", "parameters": {"x": 1}}'),
        (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}]'),
        (PLAIN, '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'),
    ],
)
def test_forced_calls_are_written_as_the_template_does(compiler: GrammarCompiler, template: str, call: str) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        made = shape(template, tools=[TOOL], tool_choice=choice)
        assert accepts(compiler, made.grammar, call)
        assert not accepts(compiler, made.grammar, call.replace("1", '"1"'))
        assert not accepts(compiler, made.grammar, "Just text")
        assert made.max_calls == (None if choice == "required" else 1)
    assert shape(template, tools=[TOOL], tool_choice="required", parallel_tool_calls=False).max_calls == 1


def test_strict_functions_bind_calls_of_the_models_own_accord(compiler: GrammarCompiler) -> None:
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}  # type: ignore[dict-item]  # a literal
    loose = {"type": "function", "function": {"name": "g", "parameters": {"not": {}}}}  # never enforced, so not refused
    made = shape(QWEN, tools=[strict, loose])
    text = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'
    assert accepts(compiler, made.grammar, "Only text.")
    assert accepts(compiler, made.grammar, "Well: " + text.format("f", '{"x": 1}'))
    assert not accepts(compiler, made.grammar, text.format("f", '{"x": "1"}'))
    assert accepts(compiler, made.grammar, text.format("g", '{"any": [1]}'))
    with pytest.raises(InvalidRequest, match=r"tools\[1\]\.function\.parameters: schema at #: 'not'"):
        shape(QWEN, tools=[strict, loose], tool_choice="required")


def test_json_or_a_call(compiler: GrammarCompiler) -> None:
    made = shape(QWEN, tools=[TOOL], guided_json=SCHEMA, chat_template_kwargs={"enable_thinking": False})
    assert accepts(compiler, made.grammar, '{"a": true}')
    assert accepts(compiler, made.grammar, '<tool_call>\n{"name": "f", "arguments": {"x": "loose"}}\n</tool_call>')
    assert not accepts(compiler, made.grammar, "text")


def test_special_markers_show_where_they_are_needed() -> None:
    assert shape(MISTRAL, tools=[TOOL]).visible_tokens == ("[TOOL_CALLS]",)
    assert shape(MISTRAL).visible_tokens == ()
    assert set(shape(QWEN, tools=[TOOL]).visible_tokens) >= {"<think>", "<tool_call>"}


def test_templates_get_tools_history_and_variables() -> None:
    template = ChatTemplate(QWEN, {})
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    prompt = template.render(messages, [TOOL], {"enable_thinking": False, "messages": "overwritten"})
    assert prompt.startswith('{"type": "function"')
    assert '(hm)<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>' in prompt
    assert prompt.endswith("tool: 2\nassistant: <think>\n\n</think>\n\n")
    assert template.render(messages[:1]) == "user: hi\nassistant: "


def test_tools_are_written_out_for_templates_that_know_none() -> None:
    template = ChatTemplate("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}", {})
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Wait.", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "2"},
    ]
    prompt = template.render(messages, [TOOL])
    assert prompt.startswith("[system] Be brief.\n\nYou can call functions.")
    assert json.dumps(TOOL) in prompt
    assert '[assistant] Wait.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n' in prompt
    assert "[user] <tool_response>\n2\n</tool_response>" in prompt
    assert template.render(messages[1:2], [TOOL]).startswith("[system] You can call functions.")
    assert template.render(messages[1:2]) == "[user] hi\n"


def test_a_folder_may_have_a_template_for_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools }}[TOOL_CALLS]"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.tool_format is ToolFormat.MISTRAL
    assert template.render([]) == "plain"
    assert template.render([], [{"a": 1}]).endswith("[TOOL_CALLS]")
