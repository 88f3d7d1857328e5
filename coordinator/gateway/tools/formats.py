"""The ways in which models write tool calls: which one a chat template means, and the grammar that forces it.

=============  =================================================================================================
hermes         `<tool_call>` line end `{"name": "f", "arguments": {...}}` line end `</tool_call>` (Qwen, Hermes)
llama3         `{"name": "f", "parameters": {...}}` as the whole answer, perhaps after `<|python_tag|>`
mistral        `[TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]`
mistral_args   `[TOOL_CALLS]f[ARGS]{...}`, once for each call (since Tekken v11)
=============  =================================================================================================
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tpserve.proto.grammar import MAX_WHITESPACE

Format = dict[str, Any]
"""A format of xgrammar's structural tags."""


class ToolFormat(Enum):
    """How a model writes tool calls."""

    HERMES = "hermes"
    LLAMA3 = "llama3"
    MISTRAL = "mistral"
    MISTRAL_ARGS = "mistral_args"

    @property
    def marker(self) -> str:
        """What stands before a call, where it is not the whole answer."""
        return {"hermes": "<tool_call>", "llama3": "<|python_tag|>"}.get(self.value, "[TOOL_CALLS]")

    @property
    def visible_tokens(self) -> tuple[str, ...]:
        """Tokens that must show in the text for a call to be found, should they be special ones."""
        return {
            ToolFormat.HERMES: ("<tool_call>", "</tool_call>"),
            ToolFormat.LLAMA3: ("<|python_tag|>",),
            ToolFormat.MISTRAL: ("[TOOL_CALLS]",),
            ToolFormat.MISTRAL_ARGS: ("[TOOL_CALLS]", "[ARGS]"),
        }[self]

    def new_call_id(self, ids: random.Random) -> str:
        """Return a fresh id for a call, drawn from `ids`, as the format's templates accept it in a history."""
        if self in (ToolFormat.MISTRAL, ToolFormat.MISTRAL_ARGS):  # nine letters and digits, say its templates
            return "".join(ids.choice(string.ascii_letters + string.digits) for _ in range(9))
        return f"call_{ids.getrandbits(96):024x}"


def format_of(template_source: str) -> ToolFormat:
    """Return the format that a chat template writes in its histories; `HERMES` where it has none."""
    if "[TOOL_CALLS]" in template_source:
        return ToolFormat.MISTRAL_ARGS if "[ARGS]" in template_source else ToolFormat.MISTRAL
    if "<tool_call>" in template_source:
        return ToolFormat.HERMES
    if "<|python_tag|>" in template_source or '"parameters": ' in template_source:
        return ToolFormat.LLAMA3
    return ToolFormat.HERMES


@dataclass(frozen=True, slots=True)
class CallableTool:
    """A function that may be called."""

    name: str
    parameters: dict[str, Any]
    """A schema that `json_schema.enforceable` has returned."""


def calls_format(kind: ToolFormat, tools: Sequence[CallableTool], *, only_one: bool) -> Format:
    """Return the grammar of an answer that is one call, or several in a row, and nothing else."""
    tags = [_call_tag(kind, tool) for tool in tools]
    separator = {ToolFormat.HERMES: "\n", ToolFormat.LLAMA3: "; ", ToolFormat.MISTRAL: ", "}.get(kind, "")
    calls: Format = {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": separator,
        "at_least_one": True,
        "stop_after_first": only_one,
    }
    if kind is ToolFormat.MISTRAL:
        ends = [{"type": "const_string", "value": value} for value in ("[TOOL_CALLS][", "]")]
        return {"type": "sequence", "elements": [ends[0], calls, ends[1]]}
    return calls


def text_or_calls_format(
    kind: ToolFormat, tools: Sequence[CallableTool], *, only_one: bool, content: Format | None
) -> Format:
    """Return the grammar of an answer that may call, and whose calls are right if it does.

    Parameters
    ----------
    content
        What the answer must be if it is no call; None is any text.
    """
    calls = calls_format(kind, tools, only_one=only_one)
    if content is not None:
        return {"type": "or", "elements": [calls, content]}
    if kind is ToolFormat.LLAMA3:  # its calls have no mark of their own: an answer that opens a brace is one
        return {"type": "or", "elements": [calls, {"type": "regex", "pattern": r"(?:[^{\s<][^\x00]*)?"}]}
    if kind is ToolFormat.HERMES:
        return {
            "type": "triggered_tags",
            "triggers": [kind.marker],
            "tags": calls["tags"],
            "stop_after_first": only_one,
        }
    text: Format = {"type": "any_text", "excludes": [kind.marker]}
    return {"type": "sequence", "elements": [text, {"type": "optional", "content": calls}]}


def _call_tag(kind: ToolFormat, tool: CallableTool) -> Format:
    key = "parameters" if kind is ToolFormat.LLAMA3 else "arguments"
    begin, end = f'{{"name": "{tool.name}", "{key}": ', "}"
    if kind is ToolFormat.HERMES:
        begin, end = f"<tool_call>\n{begin}", f"{end}\n</tool_call>"
    elif kind is ToolFormat.MISTRAL_ARGS:
        begin, end = f"[TOOL_CALLS]{tool.name}[ARGS]", ""
    return {"type": "tag", "begin": begin, "content": schema_format(tool.parameters), "end": end}


def schema_format(schema: dict[str, Any] | bool) -> Format:
    """Return the grammar of JSON of an enforceable schema."""
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": MAX_WHITESPACE}
