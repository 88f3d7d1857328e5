"""Splits an answer's text, as it streams, into reasoning, content and tool calls. Nothing of it is lost on the way."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum

from tpserve.coordinator.gateway.tools.formats import ToolFormat
from tpserve.coordinator.gateway.tools.scanner import CallScanner, Malformed

_SPACE = " \t\r\n"
THINK, THINK_END = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of what the model thought before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, as JSON text."""

    index: int
    text: str


Part = Content | Reasoning | CallStart | CallArguments


class ReasoningMode(Enum):
    """What is known of an answer's reasoning before it comes."""

    NONE = "none"
    """The model was not asked to think, or does not know how."""
    POSSIBLE = "possible"
    """It may open with `<think>`."""
    OPENED = "opened"
    """The prompt has opened it."""


class ReasoningSplitter:
    """Cuts `<think>...</think>` from the beginning of a text, without the white space around what is in it."""

    __slots__ = ("_begun", "_held", "_mode")

    def __init__(self, mode: ReasoningMode) -> None:
        self._mode: ReasoningMode | str = mode
        self._begun = False
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """Take text; return (reasoning, answer), both perhaps empty."""
        if self._mode is ReasoningMode.NONE:
            return "", text
        self._held += text
        reasoning = ""
        if self._mode is ReasoningMode.POSSIBLE:
            start = self._held.lstrip(_SPACE)
            if not start.startswith(THINK):
                if THINK.startswith(start):
                    return "", ""  # it may still become the mark
                self._mode = ReasoningMode.NONE
                return "", self._take(len(self._held))
            self._held = start[len(THINK) :]
            self._mode = ReasoningMode.OPENED
        if self._mode is ReasoningMode.OPENED:
            if not self._begun:
                self._held = self._held.lstrip(_SPACE)
                self._begun = bool(self._held)
            end = self._held.find(THINK_END)
            if end < 0:
                body = self._held[: len(self._held) - _open_suffix(self._held, THINK_END)]
                return self._take(len(body.rstrip(_SPACE))), ""
            reasoning = self._take(end).rstrip(_SPACE)
            self._held = self._held[len(THINK_END) :]
            self._mode = "after"
        self._held = self._held.lstrip(_SPACE)  # between the reasoning and the answer
        if self._held:
            self._mode = ReasoningMode.NONE
        return reasoning, self._take(len(self._held))

    def flush(self) -> tuple[str, str]:
        """Return what is left at the end of the text."""
        held = self._take(len(self._held))
        return (held, "") if self._mode is ReasoningMode.OPENED else ("", held)

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken


class ToolParser:
    """Finds the calls of one format; text that only looks like a call is content.

    Parameters
    ----------
    names
        Of the functions that may be called.
    max_calls
        Later calls are dropped; None is no limit.
    ids
        Where the ids of calls are drawn from.
    """

    def __init__(self, kind: ToolFormat, names: Collection[str], max_calls: int | None, ids: random.Random) -> None:
        self._kind = kind
        self._names = names
        self._max_calls = max_calls
        self._ids = ids
        self._text = ""
        """Not yet dealt with."""
        self._raw = ""
        """What was read since the mark, in case it is no call."""
        self._state: Callable[[list[Part]], bool] = self._at_start if kind is ToolFormat.LLAMA3 else self._in_text
        self._scanner = CallScanner()
        self._started = False
        """The call that is being read has been told of."""
        self._in_array = False
        self.num_calls = 0

    def push(self, text: str) -> list[Part]:
        """Take text; return what is certain now."""
        self._text += text
        parts: list[Part] = []
        while self._state(parts):
            pass
        return parts

    def flush(self) -> list[Part]:
        """Return what is left at the end of the text."""
        parts: list[Part] = []
        held = self._raw + self._text if self._state != self._after_call else ""
        self._raw = self._text = ""
        if held and not self._started and (held.strip(_SPACE) or not self.num_calls):
            parts.append(Content(held))
        return parts

    # ---- states: each deals with some text and says whether it got any further

    def _at_start(self, parts: list[Part]) -> bool:
        """See whether the answer is a call from its first character (Llama)."""
        start = self._text.lstrip(_SPACE)
        if not start or (start != self._kind.marker and self._kind.marker.startswith(start)):
            return False
        if start.startswith("{"):
            self._begin_call()
        else:
            self._state = self._in_text
        return True

    def _in_text(self, parts: list[Part]) -> bool:
        marker = self._kind.marker
        at = self._text.find(marker)
        if at < 0:
            # A mark may have begun, and spaces before one are not content.
            keep = _open_suffix(self._text, marker)
            body = self._text[: len(self._text) - keep]
            shown = body.rstrip(_SPACE)
            self._add_content(parts, shown)
            self._text = self._text[len(shown) :]
            return False
        shown = self._text[:at].rstrip(_SPACE)
        self._add_content(parts, shown)
        self._raw, self._text = self._text[len(shown) : at] + marker, self._text[at + len(marker) :]
        self._state = self._after_marker
        return True

    def _after_marker(self, parts: list[Part]) -> bool:
        body = self._text.lstrip(_SPACE)
        if not body:
            return False
        self._in_array = False
        if self._kind is ToolFormat.MISTRAL_ARGS and body[0] not in "[{":
            self._state = self._in_name
        elif body[0] == "[" and self._kind in (ToolFormat.MISTRAL, ToolFormat.MISTRAL_ARGS):
            self._raw += self._text[: len(self._text) - len(body) + 1]
            self._text = body[1:]
            self._in_array = True
            self._begin_call()
        else:
            self._begin_call()
        return True

    def _in_name(self, parts: list[Part]) -> bool:
        """`f[ARGS]{...}`: read as `{"name": "f", "arguments": {...}`, closed by itself."""
        end = min((at for mark in ("[ARGS]", "{") if (at := self._text.find(mark)) >= 0), default=-1)
        if end < 0 or (self._text[end] == "[" and self._text == self._text[:end] + "[ARGS]"):
            return False
        name = self._text[:end].strip(_SPACE)
        rest = self._text[end:].removeprefix("[ARGS]")
        self._raw += self._text[: len(self._text) - len(rest)]
        self._text = rest
        if name not in self._names:
            return self._give_up(parts)
        self._begin_call()
        self._scanner.push(f'{{"name": "{name}", "arguments":')
        return True

    def _begin_call(self) -> None:
        self._scanner, self._started, self._state = CallScanner(), False, self._in_call

    def _in_call(self, parts: list[Part]) -> bool:
        if not self._text:
            return False
        bare = self._kind is ToolFormat.MISTRAL_ARGS and not self._in_array and self._scanner.name is not None
        try:
            used = self._scanner.push(self._text, stop_after_arguments=bare)
        except Malformed:
            return self._give_up(parts)
        self._raw, self._text = self._raw + self._text[:used], self._text[used:]
        scanner = self._scanner
        if not self._started and scanner.name is not None:
            if scanner.name not in self._names:
                return self._give_up(parts)
            self._started, self._raw = True, ""
            if self._counts:
                parts.append(CallStart(self.num_calls, self._kind.new_call_id(self._ids), scanner.name))
        if self._started:
            self._raw = ""
            if (arguments := scanner.take_arguments()) and self._counts:
                parts.append(CallArguments(self.num_calls, arguments))
        if scanner.done or (bare and scanner.has_arguments):
            if not self._started:
                return self._give_up(parts)
            self.num_calls += 1
            self._state = self._after_call
        return bool(self._text)

    def _after_call(self, parts: list[Part]) -> bool:
        """Between calls, or behind the last one."""
        self._started = False
        text = self._text.lstrip(_SPACE)
        closer = {ToolFormat.HERMES: "</tool_call>", ToolFormat.LLAMA3: ";"}.get(self._kind)
        if closer is not None and text.startswith(closer):
            self._text = text[len(closer) :]
            self._state = self._at_start if closer == ";" else self._in_text
            return True
        if not text or (closer is not None and closer.startswith(text)):
            return False
        if self._in_array and text[0] in ",]":
            self._text = text[1:]
            if text[0] == ",":
                self._begin_call()
            else:
                self._in_array = False
            return True
        self._state = self._in_text
        return True

    def _give_up(self, parts: list[Part]) -> bool:
        """Show what was read: it is no call."""
        if not self._started:
            self._add_content(parts, self._raw)
        self._raw = ""
        self._started = False
        self._state = self._in_text
        return True

    def _add_content(self, parts: list[Part], text: str) -> None:
        if text:
            parts.append(Content(text))

    @property
    def _counts(self) -> bool:
        return self._max_calls is None or self.num_calls < self._max_calls


class OutputParser:
    """Splits one choice's text.

    Parameters
    ----------
    tools
        None: nothing may be called.
    """

    def __init__(self, reasoning: ReasoningMode, tools: ToolParser | None) -> None:
        self._reasoning = ReasoningSplitter(reasoning)
        self._tools = tools

    @property
    def has_calls(self) -> bool:
        """Whether a call was found."""
        return self._tools is not None and self._tools.num_calls > 0

    def push(self, text: str) -> list[Part]:
        """Take text; return what is certain now."""
        return self._split(*self._reasoning.push(text))

    def flush(self) -> list[Part]:
        """Return what is left at the end of the text."""
        parts = self._split(*self._reasoning.flush())
        return parts if self._tools is None else parts + self._tools.flush()

    def _split(self, reasoning: str, answer: str) -> list[Part]:
        parts: list[Part] = [Reasoning(reasoning)] if reasoning else []
        if answer:
            parts += [Content(answer)] if self._tools is None else self._tools.push(answer)
        return parts


def _open_suffix(text: str, mark: str) -> int:
    """Return how long the longest end of `text` is that `mark` could go on from."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-size:])), 0)
