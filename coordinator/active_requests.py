"""Requests from acceptance to their last event: who gets which tokens, and what is measured of them on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tpserve.coordinator.metrics import Metrics
from tpserve.coordinator.request import TokenEvent
from tpserve.coordinator.step_log import StepLog
from tpserve.coordinator.tracing import RequestSpans
from tpserve.proto.messages import FinishReason

MAX_GROUPS_LOST = 5
"""A request ends with the last of so many groups, lost in a row before it had `PROGRESS_TOKENS` more tokens."""
PROGRESS_TOKENS = 4
"""More than a request gets that breaks every group soon after its prompt, which gives a token each time."""

EventSink = Callable[[Sequence["OutputEvent"]], None]
"""Takes the events of one step that belong to one session; must not block."""


@dataclass(frozen=True, slots=True)
class OutputEvent:
    """New tokens of one choice, by the session's own request id."""

    client_id: int
    event: TokenEvent
    detail: str = ""


@dataclass(slots=True)
class _Active:
    """A request from its acceptance to its last event."""

    client_id: int
    sink: EventSink
    accepted_at: float
    num_prompt_tokens: int
    first_token_at: list[float | None]
    """By choice."""
    num_tokens: list[int]
    """Output tokens by choice."""
    open_choices: set[int]
    started_at: list[float | None]
    """When the first step of each choice was planned."""
    last_token_at: list[float]
    """By choice; of no meaning before the first token."""
    finished: list[str]
    """Why each choice that has ended did."""
    spans: RequestSpans | None = None
    """If the request is traced."""
    num_groups_lost: int = 0
    """In a row, each before the request had `PROGRESS_TOKENS` more tokens."""
    num_tokens_at_loss: int = 0
    """Of all choices, when the latest group was lost."""


class ActiveRequests:
    """All requests that the engine has accepted and that have not ended, by the engine's keys.

    Parameters
    ----------
    on_empty
        Called when the last one has ended.
    """

    def __init__(self, metrics: Metrics, on_empty: Callable[[], None]) -> None:
        self._metrics = metrics
        self._on_empty = on_empty
        self._active: dict[int, _Active] = {}
        self._step_log: StepLog | None = None
        self._unreported: list[RequestSpans] = []
        """Of requests that have ended, while not all ranks have reported their last steps."""

    def __len__(self) -> int:
        return len(self._active)

    def add(
        self, key: int, client_id: int, sink: EventSink, num_prompt_tokens: int, n: int, spans: RequestSpans | None
    ) -> None:
        """Take a request of `n` choices; its events go to `sink` under `client_id`."""
        self._active[key] = _Active(
            client_id=client_id,
            sink=sink,
            accepted_at=time.perf_counter(),
            num_prompt_tokens=num_prompt_tokens,
            first_token_at=[None] * n,
            num_tokens=[0] * n,
            open_choices=set(range(n)),
            started_at=[None] * n,
            last_token_at=[0.0] * n,
            finished=[],
            spans=spans,
        )

    def abort(self, key: int, choice: int | None) -> bool:
        """End a request, or one of its choices, without an event; return whether it was there."""
        active = self._active.get(key)
        if active is None:
            return False
        ended = active.open_choices if choice is None else active.open_choices & {choice}
        for _ in ended:
            self._metrics.count_finish("aborted")
            active.finished.append("aborted")
        active.open_choices -= set(ended)
        if not active.open_choices:
            self._forget(key)
        return True

    def fail_all(self, detail: str) -> list[int]:
        """End every request with an error event; return their keys."""
        keys = list(self._active)
        for key in keys:
            self._fail(key, detail)
        return keys

    def count_lost_group(self, detail: str) -> list[int]:
        """Account for the loss of a group; end, with an error event, the requests that may have caused too many.

        Returns
        -------
        list[int]
            The keys of those that were ended.
        """
        ended = []
        for key, active in self._active.items():
            if not any(active.started_at):
                continue
            num_tokens = sum(active.num_tokens)
            got_on = num_tokens - active.num_tokens_at_loss >= PROGRESS_TOKENS
            active.num_groups_lost = 1 if got_on else active.num_groups_lost + 1
            active.num_tokens_at_loss = num_tokens
            if active.num_groups_lost == MAX_GROUPS_LOST:
                ended.append(key)
        for key in ended:
            self._fail(
                key, f"{detail}; the request was on the last {MAX_GROUPS_LOST} groups that were lost and got nowhere"
            )
        return ended

    def _fail(self, key: int, detail: str) -> None:
        """End a request with an error event."""
        active = self._active[key]
        batch = [
            OutputEvent(active.client_id, TokenEvent(key, choice, (), finish=FinishReason.FAILED), detail)
            for choice in sorted(active.open_choices)
        ]
        for _ in batch:
            self._metrics.count_finish("failed")
            active.finished.append("failed")
        self._forget(key)
        active.sink(batch)

    # ---- steps on the ranks, for spans

    def begin_group(self, log: StepLog) -> None:
        """Take steps from a new group's log."""
        self.end_group()
        self._step_log = log

    def note_reported(self) -> None:
        """Take in that a rank has reported a step."""
        if self._unreported and self._step_log is not None:
            log = self._step_log
            self._unreported = [spans for spans in self._unreported if not spans.flush(log)]

    def end_group(self) -> None:
        """Emit what there is: the ranks report nothing more."""
        if self._step_log is not None:
            for spans in self._unreported:
                spans.flush(self._step_log, is_last=True)
        self._unreported.clear()

    # ---- events

    def note_started(self, choices: Iterable[tuple[int, int]]) -> None:
        """Note which choices of which keys have just entered the batch for the first time."""
        now = time.perf_counter()
        for key, choice in choices:
            active = self._active.get(key)
            if active is None or choice not in active.open_choices:
                continue
            if active.spans is not None and not any(active.started_at):
                active.spans.started()
            active.started_at[choice] = now
            self._metrics.queue_time.observe(now - active.accepted_at)

    def publish(self, events: Sequence[TokenEvent], step_id: int) -> None:
        """Give each session its events of a step, and account for them."""
        now = time.perf_counter()
        # A gateway writes one after the other: first those whose clients wait for a first token, or ask again after the
        # last.
        by_sink: dict[EventSink, tuple[list[OutputEvent], list[OutputEvent]]] = {}
        # Sequences that step together get their tokens together, so few latencies differ: count equal ones at once.
        previous: dict[float, int] = {}
        num_tokens = 0
        for event in events:
            active = self._active.get(event.request_id)
            choice = event.choice
            if active is None or choice not in active.open_choices:
                continue  # aborted meanwhile
            goes_on = active.first_token_at[choice] is not None and event.finish is None
            by_sink.setdefault(active.sink, ([], []))[goes_on].append(
                OutputEvent(active.client_id, event, event.detail)
            )
            if active.first_token_at[choice] is None:
                self._first_token(active, event, now)
            else:
                last = active.last_token_at[choice]
                previous[last] = previous.get(last, 0) + 1
            active.last_token_at[choice] = now
            active.num_tokens[choice] += len(event.token_ids)
            # Not as sampled: a step that was sent before a stop was known runs over it, and that token is nobody's.
            num_tokens += len(event.token_ids)
            if active.spans is not None and self._step_log is not None:
                active.spans.step(step_id, self._step_log)
            if event.finish is not None:
                self._close_choice(event.request_id, active, event, now)
        self._metrics.generation_tokens.inc(num_tokens)
        for last, count in previous.items():
            self._metrics.itl.observe(now - last, count)
        for sink, (first, rest) in by_sink.items():
            sink(first + rest)

    def _first_token(self, active: _Active, event: TokenEvent, now: float) -> None:
        if active.spans is not None and not any(active.first_token_at):
            active.spans.first_token()
        active.first_token_at[event.choice] = now
        self._metrics.ttft.observe(now - active.accepted_at)
        self._metrics.count_prompt(active.num_prompt_tokens, event.num_cached_tokens)
        started = active.started_at[event.choice]
        if started is not None:
            self._metrics.prefill_time.observe(now - started)

    def _close_choice(self, key: int, active: _Active, event: TokenEvent, now: float) -> None:
        assert event.finish is not None
        first, count = active.first_token_at[event.choice], active.num_tokens[event.choice]
        if first is not None:
            self._metrics.decode_time.observe(now - first)
            if count > 1:
                self._metrics.tpot.observe((now - first) / (count - 1))
        started = active.started_at[event.choice]
        if started is not None:
            self._metrics.inference_time.observe(now - started)
        self._metrics.e2e.observe(now - active.accepted_at)
        self._metrics.request_generation_tokens.observe(count)
        self._metrics.count_finish(event.finish.name.lower())
        active.finished.append(event.finish.name.lower())
        active.open_choices.discard(event.choice)
        if not active.open_choices:
            self._forget(key)

    def _forget(self, key: int) -> None:
        active = self._active.pop(key)
        if active.spans is not None:
            active.spans.end(active.finished, sum(active.num_tokens))
            self._unreported.append(active.spans)
            self.note_reported()
        if not self._active:
            self._on_empty()
