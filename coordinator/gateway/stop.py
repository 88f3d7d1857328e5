"""Finds stop strings in text that arrives in pieces. Knows nothing of tokens."""

from __future__ import annotations


class StopMatcher:
    """Lets text through up to the first stop string.

    Holds back only the longest suffix that could still become a stop string. When two stop strings end up in the
    text, the one that is complete first (in arrival order) wins; of those complete at once, the one that starts first.

    Parameters
    ----------
    stops
        Stop strings, each non-empty.
    """

    __slots__ = ("_held", "_max_len", "_stops")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._max_len = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece of text.

        Returns
        -------
        tuple[str, bool]
            What may be shown now, and whether a stop string was found; it and what follows it are dropped.
        """
        if not text:
            return "", False
        window = self._held + text
        found = min((at for stop in self._stops if (at := window.find(stop)) >= 0), default=None)
        if found is not None:
            self._held = ""
            return window[:found], True
        keep = self._open_suffix(window)
        self._held = window[keep:]
        return window[:keep], False

    def flush(self) -> str:
        """Return what is still held back, once no more text can come."""
        held, self._held = self._held, ""
        return held

    def _open_suffix(self, window: str) -> int:
        """Return where the longest suffix begins that a stop string could start with."""
        for at in range(max(0, len(window) - self._max_len + 1), len(window)):
            tail = window[at:]
            if any(stop.startswith(tail) for stop in self._stops):
                return at
        return len(window)
