from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tpserve.coordinator.gateway.stop import StopMatcher

PIECES = st.lists(st.text(alphabet="abc", max_size=4), max_size=12)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4).map(tuple)


def naive(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, int | None]:
    """Search the whole text after each piece; return the text shown and the piece that ended it."""
    text = ""
    for number, piece in enumerate(pieces):
        text += piece
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)], number
    return text, None


@given(STOPS, PIECES)
def test_same_as_a_search_of_the_whole_text(stops: tuple[str, ...], pieces: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown, ended = "", None
    for number, piece in enumerate(pieces):
        text, stopped = matcher.push(piece)
        shown += text
        if stopped:
            ended = number
            break
    else:
        shown += matcher.flush()
    assert (shown, ended) == naive(stops, pieces)


@given(STOPS, PIECES)
def test_holds_back_only_what_could_become_a_stop_string(stops: tuple[str, ...], pieces: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for number, piece in enumerate(pieces):
        text, stopped = matcher.push(piece)
        shown += text
        if stopped:
            return
        held = "".join(pieces[: number + 1])[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_partial_match_inside_a_match() -> None:
    matcher = StopMatcher(("aab",))
    assert [matcher.push(char) for char in "aaab"] == [("", False), ("", False), ("a", False), ("", True)]
