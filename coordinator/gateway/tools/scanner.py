"""Reads one tool call, a JSON object, from text that arrives in pieces, and lets its arguments through as they come."""

from __future__ import annotations

import json

_SPACE = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")


class Malformed(ValueError):
    """The text is no tool call."""


class CallScanner:
    """Reads `{"name": "f", "arguments": {...}}`; keys come in any order, `parameters` is another name of `arguments`.

    Attributes
    ----------
    name : str or None
        Once it is known.
    done : bool
        The object is closed.
    """

    __slots__ = (
        "_arguments",
        "_depth",
        "_escaped",
        "_has_arguments",
        "_held",
        "_in_string",
        "_key",
        "_state",
        "_streams",
        "done",
        "name",
    )

    def __init__(self) -> None:
        self.name: str | None = None
        self.done = False
        self._state = "open"
        self._key = ""
        self._held = ""
        """Text of the key or value that is being read."""
        self._arguments = ""
        """Text of the arguments that nobody has taken yet."""
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._streams = False
        self._has_arguments = False

    def take_arguments(self) -> str:
        """Return what has come of the arguments' JSON text since the last call."""
        text, self._arguments = self._arguments, ""
        return text

    @property
    def has_arguments(self) -> bool:
        """Whether the arguments are complete."""
        return self._has_arguments

    def push(self, text: str, *, stop_after_arguments: bool = False) -> int:
        """Take text; return how much of it belongs to the call.

        Parameters
        ----------
        stop_after_arguments
            The call ends with its arguments, not with a brace of its own.

        Raises
        ------
        Malformed
            If it is not one.
        """
        for index, char in enumerate(text):
            self._take(char)
            if self.done or (stop_after_arguments and self._has_arguments):
                return index + 1
        return len(text)

    def _take(self, char: str) -> None:
        match self._state:
            case "open":
                if char == "{":
                    self._state = "key"
                elif char not in _SPACE:
                    raise Malformed
            case "key":
                if char == '"':
                    self._state, self._held, self._escaped = "in key", char, False
                elif char == "}":
                    self.done = True
                elif char not in _SPACE + ",":
                    raise Malformed
            case "in key":
                self._held += char
                if char == '"' and not self._escaped:
                    self._key, self._held, self._state = _string(self._held), "", "colon"
                self._escaped = char == "\\" and not self._escaped
            case "colon":
                if char == ":":
                    self._state = "value"
                elif char not in _SPACE:
                    raise Malformed
            case "value":
                if char in _SPACE:
                    return
                self._depth, self._in_string, self._escaped = 0, False, False
                self._state = "in value"
                self._streams = self._key in _ARGUMENTS and char == "{"
                self._take_value(char)
            case "in value":
                self._take_value(char)

    def _take_value(self, char: str) -> None:
        """Take one character of a value; objects and texts end themselves, numbers and words before what follows."""
        if self._in_string:
            if char == '"' and not self._escaped:
                self._in_string = False
            self._escaped = char == "\\" and not self._escaped
        elif char == '"':
            self._in_string, self._escaped = True, False
        elif char in "{[":
            self._depth += 1
        elif self._depth == 0 and char in ",}]" + _SPACE:
            self._end_value()
            self._take(char)
            return
        elif char in "}]":
            self._depth -= 1
        if self._streams:
            self._arguments += char
        else:
            self._held += char
        if self._depth == 0 and not self._in_string and char in '"}]':
            self._end_value()

    def _end_value(self) -> None:
        held, self._held, self._state = self._held, "", "key"
        if self._key == "name":
            self.name = _string(held)
        self._has_arguments = self._has_arguments or self._key in _ARGUMENTS
        if self._key in _ARGUMENTS and not self._streams:
            # Some models write the arguments' JSON as a text.
            self._arguments = _string(held) if held.startswith('"') else "{}" if held == "null" else held
        self._streams = False


def _string(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        raise Malformed from None
    if not isinstance(value, str):
        raise Malformed
    return value
