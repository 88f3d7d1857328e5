"""Tool calls and reasoning in streamed text, in every format and however the text is cut."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from text_models import EOS, write_byte_tokenizer
from tpserve.coordinator.gateway.tools.formats import (
    CallableTool,
    ToolFormat,
    calls_format,
    format_of,
    text_or_calls_format,
)
from tpserve.coordinator.gateway.tools.parser import (
    CallArguments,
    CallStart,
    Content,
    OutputParser,
    Reasoning,
    ReasoningMode,
    ToolParser,
)
from tpserve.proto.grammar import GrammarCompiler
from tpserve.proto.messages import Grammar, GrammarKind
from tpserve.worker.arrays import aligned_zeros, as_tensor

HERMES, LLAMA3 = ToolFormat.HERMES, ToolFormat.LLAMA3
MISTRAL, MISTRAL_ARGS = ToolFormat.MISTRAL, ToolFormat.MISTRAL_ARGS
NONE = ReasoningMode.NONE
NAMES = ("get_weather", "now")
ROME = '{"city": "Rome", "note": "say \\"}\\" {"}'


def parse(
    pieces: list[str],
    kind: ToolFormat | None,
    reasoning: ReasoningMode = NONE,
    max_calls: int | None = None,
) -> tuple[str, str, list[tuple[str, str]]]:
    """Return content, reasoning, and (name, arguments) of the calls; checks how parts follow each other."""
    tools = None if kind is None else ToolParser(kind, NAMES, max_calls, random.Random(0))
    parser = OutputParser(reasoning, tools)
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.flush()
    content = thought = ""
    calls: list[tuple[str, str]] = []
    ids = set()
    for part in parts:
        match part:
            case Content():
                assert part.text
                content += part.text
            case Reasoning():
                thought += part.text
            case CallStart():
                assert part.index == len(calls)
                ids.add(part.call_id)
                calls.append((part.name, ""))
            case CallArguments():
                assert part.index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + part.text)
    assert len(ids) == len(calls)
    assert parser.has_calls is bool(calls) or pieces
    return content, thought, calls


def cuts(text: str) -> list[list[str]]:
    """The text whole, by character, and in pieces of several sizes."""
    return [[text], *([text[at : at + size] for at in range(0, len(text), size)] for size in (1, 2, 3, 5, 7, 11))]


CALLS = [
    (HERMES, f'<tool_call>\n{{"name": "get_weather", "arguments": {ROME}}}\n</tool_call>', "", [("get_weather", ROME)]),
    (
        HERMES,
        'Sure.\n\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n<tool_call>\n{"arguments": {"city": 1}, '
        '"name": "get_weather"}\n</tool_call>\n',
        "Sure.",
        [("now", "{}"), ("get_weather", '{"city": 1}')],
    ),
    (HERMES, '<tool_call>{"name": "now"}</tool_call>', "", [("now", "")]),
    (HERMES, '<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [("now", "{}")]),
    (HERMES, '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("now", '{"a": 1}')]),
    (HERMES, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call> Done.', "Done.", [("now", "{}")]),
    (LLAMA3, f'{{"name": "get_weather", "parameters": {ROME}}}', "", [("get_weather", ROME)]),
    (LLAMA3, ' <|python_tag|>{"name": "now", "parameters": {}}', "", [("now", "{}")]),
    (
        LLAMA3,
        '{"name": "now", "parameters": {}}; {"name": "get_weather", "parameters": {"city": "A"}}',
        "",
        [("now", "{}"), ("get_weather", '{"city": "A"}')],
    ),
    (MISTRAL, f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {ROME}}}]', "", [("get_weather", ROME)]),
    (
        MISTRAL,
        'Well. [TOOL_CALLS] [{"name": "now", "arguments": {}}, {"name": "now", "arguments": {"a": [1, {"b": 2}]}}]',
        "Well.",
        [("now", "{}"), ("now", '{"a": [1, {"b": 2}]}')],
    ),
    (MISTRAL, '[TOOL_CALLS]{"name": "now", "arguments": {}}', "", [("now", "{}")]),
    (MISTRAL_ARGS, f"[TOOL_CALLS]get_weather[ARGS]{ROME}", "", [("get_weather", ROME)]),
    (
        MISTRAL_ARGS,
        '[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]get_weather{"city": 1}',
        "",
        [("now", "{}"), ("get_weather", '{"city": 1}')],
    ),
    (MISTRAL_ARGS, '[TOOL_CALLS][{"name": "now", "arguments": {}}]', "", [("now", "{}")]),
]


@pytest.mark.parametrize(("kind", "text", "content", "calls"), CALLS)
def test_calls_are_found(kind: ToolFormat, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    for pieces in cuts(text):
        found, _, made = parse(pieces, kind)
        assert (found.strip(), made) == (content, calls), pieces


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (HERMES, "Just text, with a < b and <tool_cal and {braces}."),
        (HERMES, "<tool_call>\nnot json\n</tool_call>"),
        (HERMES, '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"name": 5}\n</tool_call>'),
        (HERMES, "ends in a mark: <tool_call>"),
        (HERMES, '<tool_call>\n{"arguments": {"half'),
        (LLAMA3, '{"city": "Rome", "temperature": 5}'),
        (LLAMA3, '{"name": "unknown", "parameters": {}}'),
        (LLAMA3, 'I would say {"name": "now", "parameters": {}}'),
        (LLAMA3, "{not json"),
        (MISTRAL, "[TOOL_CALLS] none"),
        (MISTRAL, "a list: [1, 2]"),
        (MISTRAL_ARGS, "[TOOL_CALLS]unknown[ARGS]{}"),
    ],
)
def test_what_is_no_call_is_content_and_nothing_is_lost(kind: ToolFormat, text: str) -> None:
    for pieces in cuts(text):
        content, _, calls = parse(pieces, kind)
        assert calls == []
        assert content.replace("\n", "").replace(" ", "") == text.replace("\n", "").replace(" ", "")
        assert content.strip() == text.strip() or content.strip(" \n") == text.strip(" \n")


def test_arguments_come_as_they_are_written() -> None:
    parser = ToolParser(HERMES, NAMES, None, random.Random(0))
    assert parser.push('<tool_call>\n{"name": "get_') == []
    (start,) = parser.push('weather", ')
    assert isinstance(start, CallStart)
    assert parser.push('"arguments": {"ci') == [CallArguments(0, '{"ci')]
    assert parser.push('ty": "R') == [CallArguments(0, 'ty": "R')]
    assert parser.push('"}') == [CallArguments(0, '"}')]
    assert parser.push("}") == []
    assert parser.num_calls == 1


def test_an_unfinished_call_keeps_what_came() -> None:
    for pieces in cuts('<tool_call>\n{"name": "now", "arguments": {"a": 1'):
        assert parse(pieces, HERMES) == ("", "", [("now", '{"a": 1')])


def test_at_most_one_call_where_one_was_asked_for() -> None:
    text = '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name": "get_weather", "arguments": {}}]'
    for pieces in cuts(text):
        assert parse(pieces, MISTRAL, max_calls=1) == ("", "", [("now", "{}")])


@pytest.mark.parametrize(
    ("mode", "text", "reasoning", "content"),
    [
        (ReasoningMode.POSSIBLE, "<think>\nHmm, 1 < 2.\n</think>\n\nYes.", "Hmm, 1 < 2.", "Yes."),
        (ReasoningMode.POSSIBLE, "\n<think>a</think>b", "a", "b"),
        (ReasoningMode.POSSIBLE, "No thought <think> here", "", "No thought <think> here"),
        (ReasoningMode.POSSIBLE, "<thin", "", "<thin"),
        (ReasoningMode.POSSIBLE, "<think>never ends </thi", "never ends </thi", ""),
        (ReasoningMode.OPENED, "so it is</think>\nYes", "so it is", "Yes"),
        (ReasoningMode.OPENED, "</think>Yes </think>", "", "Yes </think>"),
        (ReasoningMode.NONE, "<think>a</think>b", "", "<think>a</think>b"),
    ],
)
def test_reasoning_is_split_from_the_answer(mode: ReasoningMode, text: str, reasoning: str, content: str) -> None:
    for pieces in cuts(text):
        found, thought, _ = parse(pieces, None, mode)
        assert (thought, found) == (reasoning, content), pieces


def test_a_call_behind_reasoning_is_found_and_one_inside_is_not() -> None:
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for pieces in cuts(f"<think>I could {call}</think>\n{call}"):
        content, thought, calls = parse(pieces, HERMES, ReasoningMode.POSSIBLE)
        assert (content, thought, calls) == ("", f"I could {call}", [("now", "{}")])


def test_ids_are_what_templates_accept() -> None:
    ids = random.Random(0)
    assert all(len(MISTRAL.new_call_id(ids)) == 9 and MISTRAL_ARGS.new_call_id(ids).isalnum() for _ in range(50))
    assert len({HERMES.new_call_id(ids) for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("{{ '<tool_call>' }}", HERMES),
        ("{{ '<|python_tag|>' }}", LLAMA3),
        ("""{{ '"parameters": ' }}""", LLAMA3),
        ("[TOOL_CALLS] {{ x }}", MISTRAL),
        ("[TOOL_CALLS]{{ name }}[ARGS]", MISTRAL_ARGS),
        ("nothing", HERMES),
    ],
)
def test_the_template_decides_the_format(source: str, kind: ToolFormat) -> None:
    assert format_of(source) is kind


TOOLS = [
    CallableTool(
        "get_weather",
        {
            "type": "object",
            "properties": {"city": {"type": "string", "pattern": "^[A-Z][a-z]{1,6}$"}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    ),
    CallableTool("now", {"type": "object", "properties": {}, "additionalProperties": False}),
]


class Writer:
    """Writes random texts of a structural tag's format."""

    def __init__(self, folder: Path) -> None:
        size = write_byte_tokenizer(folder, special=("[TOOL_CALLS]", "[ARGS]"), added=("<tool_call>", "</tool_call>"))
        self.compiler = GrammarCompiler(folder, size)
        self._size = size
        self._mask = aligned_zeros((1, -(-size // 32)), np.int32)
        self._tensor = as_tensor(self._mask)
        self._texts = [bytes(text) for text in self.compiler._info.decoded_vocab()]

    def compile(self, form: dict[str, Any]) -> Any:
        tag = json.dumps({"type": "structural_tag", "format": form})
        return self.compiler.compile(Grammar(GrammarKind.STRUCTURAL_TAG, tag, (EOS,)))

    def write(self, compiled: Any, rng: np.random.Generator, max_tokens: int = 400) -> str | None:
        matcher = self.compiler.matcher(compiled, (EOS,))
        out = b""
        for _ in range(max_tokens):
            matcher.fill_next_token_bitmask(self._tensor, 0, False)
            bits = np.unpackbits(self._mask[0].view(np.uint8), bitorder="little")[: self._size]
            allowed = np.flatnonzero(bits)
            weights = np.where(np.isin(allowed, _SPACES), 0.02, 1.0)
            weights[allowed == EOS] = max(1.0, weights.sum() / 4)
            token = int(rng.choice(allowed, p=weights / weights.sum()))
            if token == EOS:
                return out.decode(errors="surrogateescape")
            assert matcher.accept_token(token, False)
            out += self._texts[token]
        return None


_SPACES = [
    3 + sorted(chr(c) for c in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144))).index(c) for c in "ĠĊčĉ"
]


@pytest.mark.parametrize("kind", list(ToolFormat))
@pytest.mark.parametrize("only_one", [False, True])
def test_forced_calls_always_parse(tmp_path: Path, kind: ToolFormat, only_one: bool) -> None:
    writer = Writer(tmp_path)
    compiled = writer.compile(calls_format(kind, TOOLS, only_one=only_one))
    rng = np.random.default_rng(1)
    numbers = {0}
    for _ in range(25):
        text = writer.write(compiled, rng)
        if text is None:
            continue
        content, _, calls = parse([text], kind)
        assert content == ""
        assert calls
        numbers.add(len(calls))
        for name, arguments in calls:
            value = json.loads(arguments)
            assert isinstance(value.get("city", ""), str)
            assert (name == "now") is (value == {})
    assert 1 in numbers
    if only_one:
        assert numbers == {0, 1}
    two = {
        HERMES: '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n' * 2,
        LLAMA3: '{"name": "now", "parameters": {}}; ' * 2,
        MISTRAL: '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]',
        MISTRAL_ARGS: "[TOOL_CALLS]now[ARGS]{}" * 2,
    }[kind]
    matcher = writer.compiler.matcher(compiled, (EOS,))
    assert (matcher.accept_string(two.rstrip("\n; "), False) and matcher.is_completed()) is not only_one


@pytest.mark.parametrize("kind", list(ToolFormat))
def test_a_free_answer_may_call_and_then_does_it_right(tmp_path: Path, kind: ToolFormat) -> None:
    writer = Writer(tmp_path)
    compiled = writer.compile(text_or_calls_format(kind, TOOLS, only_one=False, content=None))
    call = {
        HERMES: '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        LLAMA3: '{"name": "now", "parameters": {}}',
        MISTRAL: '[TOOL_CALLS][{"name": "now", "arguments": {}}]',
        MISTRAL_ARGS: "[TOOL_CALLS]now[ARGS]{}",
    }[kind]
    texts = {"Just text.": True, call: True, call.replace("now", "nonsense"): False, "": True}
    if kind is not LLAMA3:
        texts[f"Let me see. {call}"] = True
    for text, right in texts.items():
        matcher = writer.compiler.matcher(compiled, (EOS,))
        assert (matcher.accept_string(text, False) and matcher.is_completed()) is right, text


def test_an_answer_is_json_or_a_call(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    content = {"type": "json_schema", "json_schema": {"type": "integer"}}
    compiled = writer.compile(text_or_calls_format(HERMES, TOOLS, only_one=True, content=content))
    texts = {"12": True, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>': True, "text": False}
    for text, right in texts.items():
        matcher = writer.compiler.matcher(compiled, (EOS,))
        assert (matcher.accept_string(text, False) and matcher.is_completed()) is right, text


def test_every_cut_of_a_long_answer_gives_the_same() -> None:
    text = "".join(itertools.chain.from_iterable(item[1] for item in CALLS if item[0] is HERMES))
    results = {json.dumps(parse(pieces, HERMES)) for pieces in cuts(text)}
    assert len(results) == 1
