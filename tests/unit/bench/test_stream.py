from __future__ import annotations

from typing import Any

import pytest

from tpserve.coordinator.bench.definitions import Record
from tpserve.coordinator.bench.stream import events, http_error, read_into
from unit.bench.virtual import sse

END = [(9.0, sse({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}})), (9.0, b"data: [DONE]\n\n")]


def chunk(text: str = "", usage: int | None = None, **choice: Any) -> bytes:
    counted = None if usage is None else {"prompt_tokens": 7, "completion_tokens": usage}
    return sse({"choices": [{"index": 0, "text": text, **choice}], "usage": counted})


def read(reads: list[tuple[float, bytes]], *, cut_off: bool = False) -> Record:
    record = Record(0, "measured", 7, 5, end_s=None if cut_off else 9.0)
    read_into(record, reads, cut_off=cut_off)
    return record


def test_an_event_has_the_time_of_its_last_byte_however_it_is_cut() -> None:
    data = b"data: one\n\n: comment\n\ndata:two\r\n\r\nevent: x\ndata: three\ndata: four\n\n"
    whole = [data for _, data in events([(1.0, data)])]
    assert whole == [b"one", b"two", b"three\nfour"]
    by_byte = list(events([(float(place), data[place : place + 1]) for place in range(len(data))]))
    assert [data for _, data in by_byte] == whole
    assert by_byte[0][0] == 10.0
    assert list(events([(1.0, b"data: cut")])) == []


def test_counts_by_chunk() -> None:
    """The first chunk has three tokens; a chunk without text has one; a repeated count is no token."""
    reads = [(1.0, chunk("abc", 3)), (2.0, chunk("", 4)), (2.5, chunk("", 4)), (3.0, chunk("d", 5)), *END]
    record = read(reads)
    assert record.error is None
    assert (record.chunk_times_s, record.chunk_tokens) == ([1.0, 2.0, 3.0], [3, 1, 1])
    assert (record.num_prompt_tokens, record.num_output_tokens) == (7, 5)
    assert record.tpot_s == pytest.approx(2.0 / 2)


def test_without_counts_text_shows_tokens_and_roles_and_ends_do_not() -> None:
    def delta(**fields: Any) -> bytes:
        return sse({"choices": [{"index": 0, "delta": fields}]})

    reads = [
        (0.5, delta(role="assistant", content="")),
        (1.0, delta(content="a")),
        (2.0, delta(reasoning_content="b")),
        (3.0, delta(tool_calls=[{"index": 0}])),
        (4.0, delta()),
        (5.0, b": keep-alive\n\n"),
        *END,
    ]
    record = read(reads)
    assert record.error is None
    assert (record.chunk_times_s, record.chunk_tokens) == ([1.0, 2.0, 3.0], None)
    assert record.first_chunk_is_assumed


def test_cached_tokens() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 4}}
    record = read([(1.0, chunk("a")), (2.0, sse({"choices": [], "usage": usage})), (2.0, b"data: [DONE]\n\n")])
    assert record.num_cached_tokens == 4


@pytest.mark.parametrize(
    ("reads", "error"),
    [
        ([(1.0, chunk("a", 1)), (2.0, sse({"error": {"message": "engine lost", "code": 503}}))], "stream: engine lost"),
        ([(1.0, chunk("a", 1))], "stream: ended without [DONE]"),
        ([(1.0, chunk("a")), (2.0, b"data: [DONE]\n\n")], "stream: no usage at its end"),
        ([(1.0, b"data: {broken\n\n")], "stream: not JSON"),
        ([(1.0, b"data: 17\n\n")], "stream: not an object"),
        (END, "stream: no tokens"),
        ([], "stream: ended without [DONE]"),
    ],
)
def test_what_is_wrong_with_a_stream(reads: list[tuple[float, bytes]], error: str) -> None:
    record = read(reads)
    assert record.error is not None
    assert record.error.startswith(error)
    assert not record.succeeded


def test_a_request_that_was_cut_off_keeps_what_came() -> None:
    record = read([(1.0, chunk("ab", 2)), (2.0, chunk("c", 3)), (2.5, b"data: {")], cut_off=True)
    assert record.error is None
    assert (record.num_received_tokens, record.num_prompt_tokens) == (3, 7)


def test_http_errors() -> None:
    assert http_error(429, b'{"error": {"message": "queue full"}}') == "HTTP 429: queue full"
    assert http_error(400, b'{"detail": "x"}') == "HTTP 400: {'detail': 'x'}"
    assert http_error(502, b"<html>") == "HTTP 502"
