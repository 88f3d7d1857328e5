"""What passes between a request's handler and the engine session, as plain data."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from tpserve.coordinator.gateway.errors import ApiError
from tpserve.proto.messages import FinishReason, Grammar, SamplingParams, TokenLogprobs
from tpserve.proto.pb import engine_pb2


class EngineStatus(Enum):
    """The coordinator's states, and two that only its client can see."""

    STARTING = "starting"
    READY = "ready"
    REBUILDING = "rebuilding"
    DRAINING = "draining"
    STALLED = "stalled"
    DEAD = "dead"
    DISCONNECTED = "disconnected"
    """No session."""
    UNRESPONSIVE = "unresponsive"
    """A session, but the coordinator does not answer in time."""


@dataclass(frozen=True, slots=True)
class EngineState:
    """What the engine is doing."""

    status: EngineStatus
    detail: str = ""

    @classmethod
    def from_pb(cls, pb: engine_pb2.EngineState) -> EngineState:
        """Read the protobuf form."""
        return cls(EngineStatus[engine_pb2.EngineState.Status.Name(pb.status)], pb.detail)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """The limits of the engine, fixed for the life of a session."""

    max_model_len: int
    vocab_size: int
    version: str


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One prompt and how to continue it."""

    name: str
    """The API's request id, for logs."""
    prompt_token_ids: Sequence[int]
    n: int
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: Sequence[int]
    grammar: Grammar | None = None
    """What each choice must match, known to compile."""
    emitted: Sequence[Sequence[int]] = ()
    """By choice, output tokens that another replica gave; empty: none."""


@dataclass(slots=True)
class TokenEvent:
    """New tokens of one choice."""

    request_id: int
    choice: int
    token_ids: Sequence[int]
    logprobs: list[TokenLogprobs]
    """Parallel to `token_ids`, or empty."""
    finish: FinishReason | None
    detail: str
    num_cached_tokens: int


class Mailbox:
    """Where one HTTP request waits for the engine: first for acceptance, then for events. One reader.

    Parameters
    ----------
    num_requests
        Engine requests that share this mailbox; each is to be accepted.
    """

    __slots__ = ("_error", "_events", "_num_pending", "_waiter")

    def __init__(self, num_requests: int) -> None:
        self._num_pending = num_requests
        self._events: list[TokenEvent] = []
        self._error: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def accept(self) -> None:
        """Note that one engine request was accepted."""
        self._num_pending -= 1
        self._wake()

    def put(self, event: TokenEvent) -> None:
        """Add an event."""
        self._events.append(event)
        self._wake()

    def fail(self, error: ApiError) -> None:
        """End the wait with an error; the first one stays."""
        self._error = self._error or error
        self._wake()

    async def wait_accepted(self) -> None:
        """Wait until every engine request is accepted; raise what `fail` was given."""
        while self._num_pending and self._error is None:
            await self._wait()
        if self._error is not None:
            raise self._error

    async def take(self) -> list[TokenEvent]:
        """Return all events that have arrived, at least one; raise what `fail` was given."""
        while not self._events and self._error is None:
            await self._wait()
        if self._error is not None:
            raise self._error
        events, self._events = self._events, []
        return events

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
