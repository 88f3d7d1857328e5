"""What a router keeps of a relayed stream, however the network cuts it."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpserve.coordinator.relay import LOST, Progress, RelayError, read_header, read_marks
from tpserve.coordinator.router.marks import KEEP_ALIVE, MarkedStream

TEXTS = st.lists(st.sampled_from(["\n", ": tpserve ", "lost", "[", "a", "é", '"']), max_size=8).map("".join)
STEPS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.lists(st.integers(0, 9), max_size=3)), max_size=3)
GROUPS = st.lists(st.tuples(st.lists(TEXTS, min_size=1, max_size=3), STEPS), max_size=6)


def event(text: str) -> bytes:
    return b"data: " + orjson.dumps({"text": text}) + b"\n\n"


def mark(steps: list[tuple[int, int, list[int]]], num_cached: int = 0) -> bytes:
    progress = Progress()
    for choice, finish, token_ids in steps:
        progress.add(choice, finish, tuple(token_ids))
    return progress.take_mark(num_cached)


def cut(text: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(text) + 1) for place in places} | {len(text)})
    return [text[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


@given(GROUPS, TEXTS, st.lists(st.integers(0, 10_000), max_size=8))
def test_events_pass_when_their_mark_has_come_and_never_twice(
    groups: list[tuple[list[str], list[tuple[int, int, list[int]]]]], tail: str, places: list[int]
) -> None:
    """And a replica that goes on is told the steps of what has passed: no less and no more."""
    wire = b"".join(b"".join(map(event, texts)) + mark(steps) for texts, steps in groups)
    committed = [b"".join(map(event, texts)) for texts, _ in groups]
    stream = MarkedStream()
    passed = b""
    for part in cut(wire + event(tail), places):
        passed += stream.feed(part)
        num_groups = next(n for n in range(len(groups) + 1) if b"".join(committed[:n]) == passed)
        told = read_marks(stream_marks(stream))
        assert [(s.choice, s.finish, list(s.token_ids)) for s in told.steps] == [
            step for _, steps in groups[:num_groups] for step in steps
        ]
    assert passed == b"".join(committed)
    assert stream.finish() == event(tail)
    assert stream.has_begun == bool(groups)


def stream_marks(stream: MarkedStream) -> bytes:
    """Look at the marks without forgetting what is open."""
    twin = MarkedStream()
    twin._marks = list(stream._marks)
    return twin.restart()


@given(st.lists(st.integers(0, 10_000), max_size=8))
def test_a_gateway_that_cannot_go_on_is_not_the_clients_affair(places: list[int]) -> None:
    stream = MarkedStream()
    wire = event("a") + mark([(0, 0, [5])]) + LOST + event("the error")
    passed = b"".join(stream.feed(part) for part in cut(wire, places))
    assert passed == event("a")
    assert stream.failure == event("the error")
    assert orjson.loads(stream.restart()) == [[0, [[0, 0, [5]]]]]
    assert stream.failure is None
    assert stream.feed(event("b") + mark([])) == event("b")


def test_a_keep_alive_passes_at_once_and_not_within_open_events() -> None:
    stream = MarkedStream()
    assert stream.feed(KEEP_ALIVE) == KEEP_ALIVE
    assert stream.feed(event("a")) == b""
    assert stream.feed(KEEP_ALIVE) == b""
    assert stream.feed(mark([])) == event("a") + KEEP_ALIVE


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"[1]", b"[[0]]", b"[[0,[[0,0]]]]", b'[[0,[[0,0,["x"]]]]]', b"[[0,[[-1,0,[1]]]]]", b"[[true,[]]]x"],
)
def test_marks_that_no_router_sends(text: bytes) -> None:
    if text == b"{}":
        assert read_marks(text).steps == []
        return
    with pytest.raises(RelayError):
        read_marks(text)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b'{"key":"x","created":1,"seed":1}',
        b'{"key":"%s","created":-1,"seed":1}' % (b"0" * 32),
        b'{"key":"%s","created":1,"seed":18446744073709551616}' % (b"0" * 32),
        b'{"key":"%s","created":1,"seed":1,"body_bytes":"1"}' % (b"0" * 32),
    ],
)
def test_a_header_that_no_router_sends(text: bytes) -> None:
    with pytest.raises(RelayError):
        read_header(text)
