"""From token events to text: the choices of one HTTP request, from submission to the last token.

Knows nothing of HTTP or of how an answer is written.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpserve.coordinator.gateway.engine_client import EngineClient
from tpserve.coordinator.gateway.engine_types import EngineRequest, Mailbox, TokenEvent
from tpserve.coordinator.gateway.errors import (
    ClientDisconnected,
    EngineUnavailable,
    InvalidRequest,
    RequestTimeout,
)
from tpserve.coordinator.gateway.metering import Meter
from tpserve.coordinator.gateway.stop import StopMatcher
from tpserve.coordinator.gateway.tokenizer import Tokenizer
from tpserve.coordinator.relay import Progress
from tpserve.proto.messages import FinishReason, TokenLogprobs


@dataclass(slots=True)
class Update:
    """What is new in one choice."""

    index: int
    text: str
    """May be empty, while a character or a stop string is open."""
    token_ids: Sequence[int]
    """Shown tokens, for log-probabilities; the end-of-sequence token is not among them."""
    logprobs: Sequence[TokenLogprobs]
    """Parallel to `token_ids`, or empty."""
    offsets: Sequence[int]
    """Characters before each token, parallel to `logprobs`."""
    finish: str | None
    """`stop` or `length`, in the choice's last update."""


@dataclass(slots=True)
class Usage:
    """Token counts of one HTTP request."""

    num_prompt_tokens: int
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return OpenAI's usage object."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


_NOBODY = 0
"""No engine request has this id."""
_LAST_FINISH = FinishReason.LENGTH.value


class _Choice:
    """The text of one choice so far, as far as it is still open."""

    __slots__ = ("_detokenizer", "_matcher", "finished", "num_chars")

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...], shown: Mapping[int, bytes]) -> None:
        self._detokenizer = tokenizer.detokenizer(shown)
        self._matcher = StopMatcher(stops) if stops else None
        self.num_chars = 0
        """Decoded so far, held back or not."""
        self.finished = False

    def push(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        """Take tokens; return the text to show and whether a stop string was completed."""
        return self._match(self._detokenizer.push(token_ids))

    def flush(self) -> tuple[str, bool]:
        """Return the rest of the text at the end of the tokens, and whether it completes a stop string."""
        text, stopped = self._match(self._detokenizer.flush())
        if self._matcher is not None and not stopped:
            text += self._matcher.flush()
        return text, stopped

    def _match(self, text: str) -> tuple[str, bool]:
        self.num_chars += len(text)
        return (text, False) if self._matcher is None else self._matcher.push(text)


class Generation:
    """All choices of one HTTP request, from submission to the last token.

    Choices are numbered over all prompts: prompt p's choice c has index p * n + c.

    Parameters
    ----------
    requests
        One per prompt, all with the same `n`.
    stops
        Stop strings.
    visible_tokens
        Special tokens that stand in the text by their name.
    timeout_s
        Time for the whole of it.
    progress
        Of a stream that may move: what a router has of it, from which it goes on.
    meter
        Of the client's key, if it has one.
    """

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        requests: Sequence[EngineRequest],
        *,
        stops: tuple[str, ...],
        visible_tokens: Iterable[str] = (),
        timeout_s: float,
        progress: Progress | None = None,
        meter: Meter | None = None,
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._n = requests[0].n
        self.progress = progress
        """Takes note of each step, if a router is to have marks."""
        self.is_replaying = progress is not None and progress.resumed
        """Whether `updates` gives what the client has already."""
        shown = tokenizer.special_texts(visible_tokens)
        self._choices = [_Choice(tokenizer, stops, shown) for request in requests for _ in range(request.n)]
        # Only with these does it matter which token of an event did what.
        self._token_by_token = bool(stops) or requests[0].sampling.num_logprobs is not None
        self._num_open = len(self._choices)
        self._timeout_s = timeout_s
        self._is_over = False
        self._mailbox = Mailbox(len(requests))
        self._first_index: dict[int, int] = {}
        self._cached: dict[int, int] = {}
        self._watch: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.usage = Usage(sum(len(request.prompt_token_ids) for request in requests))
        self._replayed: list[Update] = []
        self._emitted: list[list[int]] = [[] for _ in self._choices]
        self._meter: Meter | None = None
        if progress is not None and progress.resumed:
            self._replay(progress)
        self._meter = meter  # what is replayed was charged where it was made

    @property
    def num_choices(self) -> int:
        """Choices over all prompts."""
        return len(self._choices)

    @property
    def is_over(self) -> bool:
        """Whether `updates` has given everything."""
        return self._is_over

    async def start(self, receive: Callable[[], Awaitable[Mapping[str, Any]]], accept_timeout_s: float) -> None:
        """Submit the requests and wait until all are accepted.

        Parameters
        ----------
        receive
            The ASGI channel, whose body has been read; a disconnect ends the generation.

        Raises
        ------
        ApiError
            If one is rejected or not answered in time. `close` must be called in any case.
        """
        if self._meter is not None:
            self._meter.take_prompt(self.usage.num_prompt_tokens)
        self._watch = asyncio.create_task(self._watch_client(receive))
        timeout = RequestTimeout(f"The request took longer than {self._timeout_s:g} s")
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._mailbox.fail, timeout)
        for number, request in enumerate(self._requests):
            self._submit(number, request)
        try:
            async with asyncio.timeout(accept_timeout_s):
                await self._mailbox.wait_accepted()
        except TimeoutError:
            raise EngineUnavailable(
                f"The engine did not accept the request within {accept_timeout_s:g} s", retry_after_s=1
            ) from None

    async def updates(self) -> AsyncIterator[list[Update]]:
        """Yield what is new, all that has arrived at once, until every choice has finished.

        Raises
        ------
        ApiError
            If the engine fails the request, the client leaves, or time is up.
        """
        for number, update in enumerate(self._replayed):
            if number % 256 == 255:
                await asyncio.sleep(0)  # let others have a turn
            yield [update]
        self._replayed.clear()
        self.is_replaying = False
        while self._num_open:
            updates = []
            for event in await self._mailbox.take():
                index = self._first_index[event.request_id] + event.choice
                if not self._choices[index].finished:
                    if self.progress is not None:
                        finish = 0 if event.finish is None else event.finish.value
                        self.progress.add(index, finish, tuple(event.token_ids))
                    updates.append(self._update(index, event))
            if updates:
                yield updates
        self._is_over = True

    def close(self) -> None:
        """Abort what still runs, and forget the requests."""
        if self._watch is not None:
            self._watch.cancel()
        if self._timer is not None:
            self._timer.cancel()
        for request_id, first in self._first_index.items():
            if not all(choice.finished for choice in self._choices[first : first + self._n]):
                self._engine.abort(request_id)
            self._engine.release(request_id)

    async def _watch_client(self, receive: Callable[[], Awaitable[Mapping[str, Any]]]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._mailbox.fail(ClientDisconnected("The client closed the connection"))

    def _replay(self, progress: Progress) -> None:
        """Take the steps that another replica made, as they came, so that everything is as it was there.

        Raises
        ------
        InvalidRequest
            If they do not belong to this request.
        """
        self.usage.num_cached_tokens = progress.num_cached_tokens
        for step in progress.steps:
            if step.choice >= len(self._choices) or self._choices[step.choice].finished or step.finish > _LAST_FINISH:
                raise InvalidRequest(f"a mark has a step of choice {step.choice} that this request cannot have made")
            finish = FinishReason(step.finish) if step.finish else None
            event = TokenEvent(_NOBODY, step.choice, step.token_ids, [], finish, "", 0)
            self._replayed.append(self._update(step.choice, event))
            self._emitted[step.choice] += step.token_ids
        progress.steps.clear()  # from here on for the next marks

    def _submit(self, number: int, request: EngineRequest) -> None:
        """Send one prompt's request; of one that goes on, only what has not finished."""
        first = number * self._n
        if not self.is_replaying:
            self._first_index[self._engine.submit(request, self._mailbox)] = first
            return
        finished = [self._choices[first + choice].finished for choice in range(self._n)]
        if all(finished):
            self._mailbox.accept()
            return
        emitted = self._emitted[first : first + self._n]
        if any(emitted):
            rest = [() if done else token_ids for done, token_ids in zip(finished, emitted, strict=True)]
            request = dataclasses.replace(request, emitted=rest)
        request_id = self._engine.submit(request, self._mailbox)
        self._first_index[request_id] = first
        if any(emitted):
            # What was cached here is nothing to the client, who knows what was where the answer began.
            self._cached[request_id] = sys.maxsize
        for choice, done in enumerate(finished):
            if done:
                self._engine.abort(request_id, choice)

    def _update(self, index: int, event: TokenEvent) -> Update:
        """Turn one event into text and count its tokens."""
        if event.finish in (FinishReason.FAILED, FinishReason.ABORTED):
            detail = event.detail or event.finish.name.lower()
            raise EngineUnavailable(f"The engine could not finish the request: {detail}", retry_after_s=1)
        choice = self._choices[index]
        if event.num_cached_tokens:
            self._count_cached(event)
        ended = event.finish is not None
        # The stop token is counted and not shown.
        shown = event.token_ids[:-1] if event.finish is FinishReason.STOP else event.token_ids
        stopped = False
        offsets: list[int] = []
        if self._token_by_token:
            parts = []
            for token in shown:
                offsets.append(choice.num_chars)
                text, stopped = choice.push((token,))
                parts.append(text)
                if stopped:
                    break
            text = "".join(parts)
            num_shown = len(offsets)
        else:
            text, _ = choice.push(shown)
            num_shown = len(shown)
        if ended and not stopped:
            rest, stopped = choice.flush()
            text += rest
            num_used = len(event.token_ids)
        else:
            num_used = num_shown
        self.usage.num_completion_tokens += num_used
        if self._meter is not None:
            self._meter.take_output(num_used)
        if ended or stopped:
            choice.finished = True
            self._num_open -= 1
            if not ended:
                self._engine.abort(event.request_id, event.choice)
        finish = "stop" if stopped else _FINISH_NAMES[event.finish] if event.finish is not None else None
        return Update(index, text, shown[:num_shown], event.logprobs[:num_shown], offsets, finish)

    def _count_cached(self, event: TokenEvent) -> None:
        """Count a prompt's cached tokens once, whichever choice reports them."""
        known = self._cached.get(event.request_id, 0)
        if event.num_cached_tokens > known:
            self._cached[event.request_id] = event.num_cached_tokens
            self.usage.num_cached_tokens += event.num_cached_tokens - known


_FINISH_NAMES = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
