"""What a request wants its output to look like: its grammar, and how its text is split into what the answer names.

Turns `response_format`, `guided_*`, `tools` and a template's reasoning into one grammar and one parser. Whether the
grammar compiles is checked in `grammar`.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tpserve.coordinator.gateway.chat_template import ChatTemplate
from tpserve.coordinator.gateway.errors import InvalidRequest, UnsupportedFeature
from tpserve.coordinator.gateway.grammar import MAX_SOURCE_BYTES
from tpserve.coordinator.gateway.json_schema import Schema, SchemaError, enforceable
from tpserve.coordinator.gateway.protocol import ChatCompletionRequest, CompletionRequest, NamedToolChoice
from tpserve.coordinator.gateway.tools.formats import (
    CallableTool,
    Format,
    ToolFormat,
    calls_format,
    schema_format,
    text_or_calls_format,
)
from tpserve.coordinator.gateway.tools.parser import THINK, THINK_END, OutputParser, ReasoningMode, ToolParser
from tpserve.proto.messages import Grammar, GrammarKind

ANY_OBJECT: Schema = {"type": "object", "additionalProperties": {}}


@dataclass(frozen=True, slots=True)
class Shape:
    """The form of a request's output."""

    grammar: Grammar | None = None
    param: str = ""
    """The field that asks for the grammar."""
    reasoning: ReasoningMode = ReasoningMode.NONE
    tool_format: ToolFormat | None = None
    """None: nothing may be called."""
    tool_names: frozenset[str] = frozenset()
    max_calls: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether all text is content."""
        return self.reasoning is ReasoningMode.NONE and self.tool_format is None

    @property
    def visible_tokens(self) -> tuple[str, ...]:
        """Special tokens whose text the parser needs."""
        tools = () if self.tool_format is None else self.tool_format.visible_tokens
        return tools if self.reasoning is ReasoningMode.NONE else (*tools, THINK, THINK_END)

    def new_parser(self, ids: random.Random) -> OutputParser:
        """Return a parser for one choice, whose calls get their ids from `ids`."""
        tools = None
        if self.tool_format is not None:
            tools = ToolParser(self.tool_format, self.tool_names, self.max_calls, ids)
        return OutputParser(self.reasoning, tools)


def completion_shape(request: CompletionRequest, stop_token_ids: Sequence[int]) -> Shape:
    """Return the form of a text completion.

    Raises
    ------
    InvalidRequest
        If a constraint cannot be enforced; names the field.
    """
    content = _content(request)
    if content is None:
        return Shape()
    return Shape(_plain_grammar(*content, tuple(stop_token_ids)), request.constraints[0])


def chat_shape(
    request: ChatCompletionRequest, template: ChatTemplate, prompt: str, stop_token_ids: Sequence[int]
) -> Shape:
    """Return the form of a chat answer.

    Parameters
    ----------
    prompt
        As rendered; it may have opened the reasoning, or closed it.

    Raises
    ------
    InvalidRequest
        If a constraint, or a tool's parameters, cannot be enforced; names the field.
    """
    stops = tuple(stop_token_ids)
    reasoning = reasoning_mode(template, prompt)
    content = _content(request)
    tools = request.callable_tools
    kind = template.tool_format if tools else None
    param = request.constraints[0] if request.constraints else "tools"
    only_one = request.parallel_tool_calls is False or isinstance(request.tool_choice, NamedToolChoice)
    form: Format | None = None
    if kind is None:
        if content is not None:
            if reasoning is ReasoningMode.NONE:
                return Shape(_plain_grammar(*content, stops), param)
            form = _format(*content)
    else:
        callables = _callable_tools(request)
        if request.forces_tools:
            form = calls_format(kind, callables, only_one=only_one)
        elif content is not None or any(tool.function.strict for tool in tools):
            form = text_or_calls_format(
                kind, callables, only_one=only_one, content=None if content is None else _format(*content)
            )
    if form is None:
        grammar = None
    else:
        tag = {"type": "structural_tag", "format": _after_reasoning(form, reasoning)}
        grammar = Grammar(GrammarKind.STRUCTURAL_TAG, json.dumps(tag, ensure_ascii=False), stops)
    names = frozenset(tool.function.name for tool in tools)
    return Shape(grammar, param, reasoning, kind, names, 1 if only_one else None)


def reasoning_mode(template: ChatTemplate, prompt: str) -> ReasoningMode:
    """Tell from the template and the rendered prompt whether the answer may begin with reasoning."""
    if not template.reasons:
        return ReasoningMode.NONE
    tail = prompt.rstrip()
    if tail.endswith(THINK):
        return ReasoningMode.OPENED
    # Qwen3 closes an empty one in the prompt where thinking is switched off.
    return ReasoningMode.NONE if tail.endswith(THINK_END) else ReasoningMode.POSSIBLE


def _content(request: ChatCompletionRequest | CompletionRequest) -> tuple[GrammarKind, Any] | None:
    """Return what the text of the answer must match: a kind, and a schema, a text, or a list of choices."""
    asked = request.response_format
    if asked is not None and asked.type == "json_schema":
        assert asked.json_schema is not None
        return GrammarKind.JSON_SCHEMA, _schema(asked.json_schema.json_schema, "response_format")
    if asked is not None and asked.type == "json_object":
        given = asked.object_schema
        return GrammarKind.JSON_SCHEMA, ANY_OBJECT if given is None else _schema(given, "response_format")
    if request.guided_json is not None:
        return GrammarKind.JSON_SCHEMA, _schema(request.guided_json, "guided_json")
    if request.guided_regex is not None:
        return GrammarKind.REGEX, request.guided_regex
    if request.guided_choice is not None:
        return GrammarKind.STRUCTURAL_TAG, request.guided_choice
    if request.guided_grammar is not None:
        return GrammarKind.EBNF, request.guided_grammar
    return None


def _schema(given: str | Schema | bool | None, param: str) -> Schema | bool:
    text = given if isinstance(given, str) else json.dumps({} if given is None else given)
    if len(text) > MAX_SOURCE_BYTES:
        raise InvalidRequest(
            f"{param}: the schema has {len(text)} characters; at most {MAX_SOURCE_BYTES} are allowed", param=param
        )
    try:
        return _enforceable(text)
    except SchemaError as error:
        raise UnsupportedFeature(f"{param}: schema at {error}", param=param) from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{param}: the schema is not valid JSON: {error}", param=param) from None


@functools.lru_cache(maxsize=1024)
def _enforceable(text: str) -> Schema | bool:
    """Return the enforceable form of a schema's text; the result is shared, and nobody writes to it."""
    given = json.loads(text)
    if not isinstance(given, dict | bool):
        raise ValueError("it must be an object")
    return enforceable(given)


def _callable_tools(request: ChatCompletionRequest) -> list[CallableTool]:
    out = []
    for index, tool in enumerate(request.tools or ()):
        if tool not in request.callable_tools:
            continue
        function, param = tool.function, f"tools[{index}].function.parameters"
        parameters: Any = {"type": "object", "properties": {}, "additionalProperties": False}
        if function.parameters and not (request.tool_choice in (None, "auto") and function.strict is not True):
            parameters = _schema({"type": "object", **function.parameters}, param)
        elif function.parameters:
            parameters = ANY_OBJECT  # called of the model's own accord, and not to the letter
        if parameters.get("type") != "object":
            raise InvalidRequest(f"{param}: the parameters of a function must be an object", param=param)
        out.append(CallableTool(function.name, parameters))
    return out


def _format(kind: GrammarKind, given: Any) -> Format:
    makers: dict[GrammarKind, Callable[[Any], Format]] = {
        GrammarKind.JSON_SCHEMA: schema_format,
        GrammarKind.REGEX: lambda pattern: {"type": "regex", "pattern": pattern},
        GrammarKind.EBNF: lambda grammar: {"type": "grammar", "grammar": grammar},
        GrammarKind.STRUCTURAL_TAG: lambda choices: {
            "type": "or",
            "elements": [{"type": "const_string", "value": choice} for choice in choices],
        },
    }
    return makers[kind](given)


def _plain_grammar(kind: GrammarKind, given: Any, stops: tuple[int, ...]) -> Grammar:
    if kind is GrammarKind.STRUCTURAL_TAG:
        given = {"type": "structural_tag", "format": _format(kind, given)}
    return Grammar(kind, given if isinstance(given, str) else json.dumps(given, ensure_ascii=False), stops)


def _after_reasoning(form: Format, mode: ReasoningMode) -> Format:
    """Leave reasoning free, and begin the grammar behind it."""
    if mode is ReasoningMode.NONE:
        return form
    opened = mode is ReasoningMode.OPENED
    thought = {"type": "tag", "begin": "" if opened else THINK, "content": {"type": "any_text"}, "end": THINK_END}
    space = {"type": "regex", "pattern": r"\n{0,2}"}
    before = {"type": "sequence", "elements": [thought, space]}
    return {"type": "sequence", "elements": [before if opened else {"type": "optional", "content": before}, form]}
