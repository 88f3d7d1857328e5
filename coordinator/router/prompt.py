"""What the router reads of a request's body: whether it streams, and its prompt as a chain of blocks.

A prompt is cut into blocks of `BLOCK_CHARS` characters, and block i has the hash of blocks 0 to i: so two prompts share
exactly their leading equal hashes. It is text as the client sent it, not what a template makes of it, nor tokens: equal
text means equal tokens, which is all that is needed. A body that cannot be read has no blocks: the replica says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

BLOCK_CHARS = 128
"""About 30 tokens, two pages of a replica's cache."""
MAX_BLOCKS = 8192
"""More of a prompt is not looked at: a million characters."""

GENERATION_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
"""Whose streams can move."""
_PROMPT_PATHS = frozenset({*GENERATION_PATHS, "/v1/embeddings"})


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is known of a request before it is sent."""

    blocks: tuple[int, ...] = ()
    """Chained hashes, of this process only."""
    is_stream: bool = False


def read_prompt(path: str, body: bytes) -> Prompt:
    """Return what the body tells."""
    if path not in _PROMPT_PATHS:
        return Prompt()
    try:
        fields = orjson.loads(body)
    except ValueError:
        return Prompt()
    if not isinstance(fields, dict):
        return Prompt()
    return Prompt(tuple(_hashes("".join(_texts(fields)))), fields.get("stream") is True)


def _hashes(text: str) -> Iterator[int]:
    """Yield the hashes of whole blocks, and of the tail: a short prompt is a block too."""
    value = 0
    for begin in range(0, min(len(text), MAX_BLOCKS * BLOCK_CHARS), BLOCK_CHARS):
        # Python's own hash has a secret of this process in it: nobody can make two prompts meet.
        value = hash((value, text[begin : begin + BLOCK_CHARS]))
        yield value


def _texts(fields: dict[str, Any]) -> Iterator[str]:
    """Yield the prompt in the order in which templates write it; wrong types are the replica's to refuse."""
    yield str(fields.get("model"))
    if tools := fields.get("tools"):
        yield _json(tools)
    if instructions := fields.get("instructions"):
        yield f"\0system\0{instructions}"
    yield from _messages(fields.get("messages"))
    given = fields.get("prompt", fields.get("input"))
    if isinstance(given, str):
        yield given
    elif isinstance(given, list) and any(isinstance(item, dict) for item in given):
        yield from _messages(given)
    elif given is not None:
        yield _json(given)


def _messages(messages: object) -> Iterator[str]:
    if not isinstance(messages, list):
        return
    for message in messages:
        if isinstance(message, dict):
            content = message.get("content")
            yield f"\0{message.get('role')}\0"
            yield content if isinstance(content, str) else "".join(_parts(content))
            if calls := message.get("tool_calls"):
                yield _json(calls)


def _parts(content: object) -> Iterable[str]:
    if not isinstance(content, list):
        return ()
    return (str(part.get("text")) for part in content if isinstance(part, dict))


def _json(value: object) -> str:
    return orjson.dumps(value).decode(errors="replace")
