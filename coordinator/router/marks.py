"""Reads a relayed stream: which events may go to the client, and what to tell the replica that goes on with it.

Knows the marks of `relay` and nothing of HTTP or of what events say.
"""

from __future__ import annotations

from tpserve.coordinator.relay import END, MARK

KEEP_ALIVE = b": keep-alive\n\n"
_LINE_MARK = b"\n" + MARK
_LOST = b"lost"


def _find_mark(text: bytes, begin: int) -> int | None:
    """Return where the next line begins that is a mark; `begin` is where a line begins."""
    if text.startswith(MARK, begin):
        return begin
    found = text.find(_LINE_MARK, begin)
    return None if found < 0 else found + 1


class MarkedStream:
    """What has come of one stream, over all replicas that have had it."""

    __slots__ = ("_marks", "_open", "failure")

    def __init__(self) -> None:
        self._marks: list[bytes] = []
        self._open = b""
        self.failure: bytes | None = None
        """The error event of a gateway that cannot go on, as far as it has come; None: none has said so."""

    @property
    def has_begun(self) -> bool:
        """Whether any events are committed."""
        return bool(self._marks)

    def feed(self, data: bytes) -> bytes:
        """Take what has come; return the events that are committed by it.

        Within events, a line break is always escaped: a line that begins as a mark is one.
        """
        if self.failure is not None:
            self.failure += data
            return b""
        text = self._open + data
        parts: list[bytes] = []
        begin = 0
        while (at := _find_mark(text, begin)) is not None:
            end = text.find(END, at)
            if end < 0:
                break
            word = text[at + len(MARK) : end]
            if word == _LOST:
                self.failure = text[end + len(END) :]
                self._open = b""
                return b"".join(parts)
            self._marks.append(word)
            parts.append(text[begin:at])
            begin = end + len(END)
        self._open = text[begin:]
        if self._open == KEEP_ALIVE:
            parts.append(KEEP_ALIVE)
            self._open = b""
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def finish(self) -> bytes:
        """Return the last events: those of a stream that ended as it should need no mark."""
        rest, self._open = self._open, b""
        return rest

    def restart(self) -> bytes:
        """Forget what is not committed; return all marks as one JSON list, for the replica that goes on."""
        self._open = b""
        self.failure = None
        return b"[" + b",".join(self._marks) + b"]"
