"""Reads a stream of server-sent events, whose bytes carry their times of arrival, into a record.

Reading is apart from receiving, and done after the request has ended, so that parsing delays no time stamp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from tpserve.coordinator.bench.definitions import Record

_MAX_MESSAGE_CHARS = 200


def events(reads: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Yield the data of each event with the time at which its last byte arrived.

    Comments, other fields and line ends of all three kinds are as the standard of server-sent events has them.

    Parameters
    ----------
    reads
        Bytes as received, cut anywhere, with their times.
    """
    rest = b""
    for time_s, data in reads:
        rest += data
        if rest.endswith(b"\r"):  # half of a line end, perhaps
            continue
        *blocks, rest = rest.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n\n")
        for block in blocks:
            lines = [line[5:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"data:")]
            if lines:
                yield time_s, b"\n".join(lines)


def read_into(record: Record, reads: Sequence[tuple[float, bytes]], *, cut_off: bool = False) -> None:
    """Fill in the times and counts of a record; what is wrong with the stream becomes its error.

    Parameters
    ----------
    cut_off
        The client itself ended the request early: a stream without its end is no error.
    """
    times: list[float] = []
    counted: list[int] = []
    num_counted = 0
    done = counts_by_chunk = False
    for time_s, data in events(reads):
        if data == b"[DONE]":
            done = True
            break
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            record.error = f"stream: not JSON: {data[:80]!r}"
            break
        if not isinstance(chunk, dict):
            record.error = f"stream: not an object: {data[:80]!r}"
            break
        if chunk.get("error") is not None:
            record.error = f"stream: {_message(chunk['error'])}"
            break
        usage = chunk.get("usage")
        choices = chunk.get("choices") or ()
        if usage is None:
            if any(map(_carries_tokens, choices)):
                times.append(time_s)
                counted.append(0)
            continue
        total = int(usage.get("completion_tokens") or 0)
        if choices:
            counts_by_chunk = True
            if total > num_counted:
                times.append(time_s)
                counted.append(total - num_counted)
                num_counted = total
        else:
            _take_usage(record, usage)
        if counts_by_chunk and record.num_output_tokens is None:
            record.num_prompt_tokens = usage.get("prompt_tokens")
    record.chunk_times_s = times
    record.chunk_tokens = counted if counts_by_chunk and all(counted) else None
    if cut_off or record.error is not None:
        return
    if not done:
        record.error = "stream: ended without [DONE]"
    elif record.num_output_tokens is None:
        record.error = "stream: no usage at its end, so tokens cannot be counted"
    elif not times:
        record.error = "stream: no tokens"


def _take_usage(record: Record, usage: dict[str, Any]) -> None:
    record.num_prompt_tokens = usage.get("prompt_tokens")
    record.num_output_tokens = usage.get("completion_tokens")
    record.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def _carries_tokens(choice: dict[str, Any]) -> bool:
    """Whether a chunk without counts shows tokens: text of any kind, token ids or a tool call; a role alone is none."""
    if choice.get("text") or choice.get("token_ids"):
        return True
    delta = choice.get("delta") or {}
    return any(delta.get(key) for key in ("content", "reasoning_content", "reasoning", "refusal", "tool_calls"))


def _message(error: Any) -> str:
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:_MAX_MESSAGE_CHARS]


def http_error(status: int, body: bytes) -> str:
    """Return one line for an answer that is not 200."""
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return f"HTTP {status}"
    error = parsed.get("error", parsed) if isinstance(parsed, dict) else parsed
    return f"HTTP {status}: {_message(error)}"
