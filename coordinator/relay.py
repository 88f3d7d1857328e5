r"""What a router and a gateway say to each other, so that a stream can go on at another replica.

A router that shares a secret with its gateways sends, with each streamed request, what makes its answer this one and no
other (`Identity`). The gateway then follows each group of events by a mark: a comment of the event stream, which the
router keeps and does not pass on, with the tokens that the events so far stand for.

    data: {...}\n\n
    : tpserve [NUM_CACHED, [[CHOICE, FINISH, [TOKEN, ...]], ...]]\n\n

To go on elsewhere, the router sends the request again with all marks. The other gateway feeds them, step by step as
they came, through the same path that makes text of tokens (stop strings, parsers, ids, usage), and sends what comes
after them: a client gets each event once. A mark commits the events before it: what came after the last one is dropped,
and is made again. What follows the last token has no mark; the end of the response commits it. A failure that another
replica need not have is told by the mark `: tpserve lost`; the error event behind it is for the client only if nobody
can go on.
"""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass, field
from typing import Any

import orjson

SECRET_HEADER = "x-tpserve-router"
"""The shared secret; who sends it may say where an answer begins."""
STREAM_HEADER = "x-tpserve-stream"
"""`Identity` as JSON, and with `body_bytes` the length of the client's body, behind which the marks follow."""
MARK = b": tpserve "
END = b"\n\n"
LOST = MARK + b"lost" + END
_HEX_128 = 32


class RelayError(ValueError):
    """The other side's words cannot be read; the message says what is wrong with them."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What of an answer does not follow from its request: all of it, so that it can be made again."""

    key: str
    """32 hexadecimal digits, of which the answer's ids are made."""
    created: int
    """Unix time, seconds."""
    seed: int
    """Of requests that give none; 64 bits."""

    @classmethod
    def fresh(cls, created: int, seed: int) -> Identity:
        """Return one with a new key."""
        return cls(uuid.uuid4().hex, created, seed)

    def random(self, purpose: str) -> random.Random:
        """Return a source of further ids: the same each time, and another for each purpose."""
        return random.Random(f"{purpose} {self.key}")

    def to_header(self, body_bytes: int | None = None) -> bytes:
        """Return the value of `STREAM_HEADER`."""
        fields: dict[str, Any] = {"key": self.key, "created": self.created, "seed": self.seed}
        if body_bytes is not None:
            fields["body_bytes"] = body_bytes
        return orjson.dumps(fields)


@dataclass(frozen=True, slots=True)
class Step:
    """New tokens of one choice, as the engine gave them at once."""

    choice: int
    """Over all prompts."""
    finish: int
    """Number of the finish reason; 0: not finished."""
    token_ids: tuple[int, ...]


@dataclass(slots=True)
class Progress:
    """How far a stream is: as a gateway was told, or as it goes on telling."""

    steps: list[Step] = field(default_factory=list)
    num_cached_tokens: int = 0
    """Of the prompt, by the replica that began."""
    resumed: bool = False
    """The events of `steps`, and whatever stands before the first, have been sent."""

    def add(self, choice: int, finish: int, token_ids: tuple[int, ...]) -> None:
        """Note what the next mark has to tell."""
        self.steps.append(Step(choice, finish, token_ids))

    def take_mark(self, num_cached_tokens: int) -> bytes:
        """Return the mark for what was added since the last one."""
        steps = [(step.choice, step.finish, step.token_ids) for step in self.steps]
        self.steps.clear()
        return MARK + orjson.dumps((num_cached_tokens, steps)) + END


def read_header(value: bytes) -> tuple[Identity, int | None]:
    """Return what `STREAM_HEADER` says: the identity, and the length of the client's body if marks follow it.

    Raises
    ------
    RelayError
        If it is not what a router sends.
    """
    try:
        fields = orjson.loads(value)
        identity = Identity(fields["key"], fields["created"], fields["seed"])
        body_bytes = fields.get("body_bytes")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RelayError(f"{STREAM_HEADER} is not a JSON object with key, created and seed") from None
    good = isinstance(identity.key, str) and len(identity.key) == _HEX_128 and identity.key.isalnum()
    if not (good and _is_count(identity.created) and _is_count(identity.seed) and identity.seed < 2**64):
        raise RelayError(f"{STREAM_HEADER} has a key, a time or a seed that no router makes")
    if body_bytes is not None and not _is_count(body_bytes):
        raise RelayError(f"{STREAM_HEADER} has a body_bytes that is no length")
    return identity, body_bytes


def read_marks(text: bytes) -> Progress:
    """Return the progress that a router sends: the JSON list of all marks.

    Raises
    ------
    RelayError
        If it is not what a router sends.
    """
    progress = Progress(resumed=True)
    try:
        for num_cached_tokens, steps in orjson.loads(text):
            progress.num_cached_tokens = num_cached_tokens
            for choice, finish, token_ids in steps:
                if not all(map(_is_count, (num_cached_tokens, choice, finish, *token_ids))):
                    raise RelayError("a mark has something else than counts")
                progress.add(choice, finish, tuple(token_ids))
    except RelayError:
        raise
    except (ValueError, TypeError) as error:
        raise RelayError(f"the marks cannot be read: {error}") from None
    return progress


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
