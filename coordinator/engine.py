"""The coordinator's loop: schedule -> send -> result -> update -> publish; and the life of the TP group around it.

Owns requests from acceptance to their last event. Never sees text or a tensor.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from tpserve.coordinator.client import RankState, WorkerGroup
from tpserve.coordinator.cluster import Cluster
from tpserve.coordinator.errors import ClusterError, RankLost
from tpserve.coordinator.metrics import EngineCollector, Metrics
from tpserve.coordinator.request import QueueFull, Request, RequestInvalid, TokenEvent
from tpserve.coordinator.scheduler import Scheduler, SchedulerStats
from tpserve.proto.messages import FinishReason, Grammar, SamplingParams, StepResult

logger = logging.getLogger(__name__)


class EngineStatus(Enum):
    """What the engine can do now; values are those of `engine.proto`."""

    STARTING = 0
    READY = 1
    REBUILDING = 2
    DRAINING = 3
    STALLED = 4
    DEAD = 5


class Unavailable(RuntimeError):
    """The engine takes no requests now; the message says why."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Deadlines of the engine."""

    step_timeout_s: float = 30.0
    """A step without a result for longer loses the group; the late rank is named."""
    stall_after_s: float = 5.0
    """A step without a result for longer makes the engine report STALLED."""
    replay_timeout_s: float = 6.0
    """Requests of a lost group that cannot run again by then end with an error, and new ones are refused until then."""
    max_rebuilds_in_a_row: int = 3
    """Rebuilds that fail before the engine is DEAD."""


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
    """An accepted request."""

    client_id: int
    sink: EventSink
    accepted_at: float
    num_prompt_tokens: int
    first_token_at: list[float | None]
    """By choice."""
    num_tokens: list[int]
    """Output tokens by choice."""
    open_choices: set[int]


class Engine:
    """Runs one TP group and the requests on it."""

    def __init__(
        self,
        config: EngineConfig,
        scheduler: Scheduler,
        cluster: Cluster,
        metrics: Metrics,
        model_name: str,
    ) -> None:
        self._config = config
        self._scheduler = scheduler
        self._cluster = cluster
        self._metrics = metrics
        self._group: WorkerGroup | None = None
        self._active: dict[int, _Active] = {}
        self._next_key = 1
        self._wake = asyncio.Event()
        self._status = EngineStatus.STARTING
        self._detail = "starting the TP group"
        self._watchers: list[Callable[[], None]] = []
        self._draining = False
        self._drained = asyncio.Event()
        self._give_up: asyncio.TimerHandle | None = None
        """Set while a lost group is rebuilt: when its requests have waited long enough."""
        self._gave_up = False
        metrics.registry.register(EngineCollector(model_name, self))

    # ---- what sessions use

    @property
    def status(self) -> tuple[EngineStatus, str]:
        """The state and its detail; STALLED is seen from the age of the oldest step."""
        if self._status in (EngineStatus.READY, EngineStatus.DRAINING) and self._group is not None:
            age = self._group.oldest_step_age_s()
            if age > self._config.stall_after_s:
                return EngineStatus.STALLED, f"no step has finished for {age:.1f} s"
        return self._status, self._detail

    def watch_status(self, watcher: Callable[[], None]) -> Callable[[], None]:
        """Call `watcher` after each change of the state; return the function that ends it."""
        self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher)

    def submit(
        self,
        client_id: int,
        sink: EventSink,
        prompt_token_ids: tuple[int, ...],
        n: int,
        sampling: SamplingParams,
        max_tokens: int,
        stop_token_ids: frozenset[int],
        grammar: Grammar | None = None,
    ) -> int:
        """Accept a request; its events go to `sink` under `client_id`.

        Returns
        -------
        int
            The key for `abort`.

        Raises
        ------
        RequestInvalid, QueueFull, Unavailable
        """
        if self._draining or self._gave_up or self._status is EngineStatus.DEAD:
            self._metrics.count_rejection("unavailable")
            raise Unavailable(f"the engine is {self._status.name.lower()}: {self._detail}")
        key = self._next_key
        try:
            self._scheduler.add_request(
                Request(key, prompt_token_ids, sampling, max_tokens, n, stop_token_ids, grammar)
            )
        except QueueFull:
            self._metrics.count_rejection("queue_full")
            raise
        except RequestInvalid:
            self._metrics.count_rejection("invalid")
            raise
        self._next_key += 1
        self._active[key] = _Active(
            client_id=client_id,
            sink=sink,
            accepted_at=time.perf_counter(),
            num_prompt_tokens=len(prompt_token_ids),
            first_token_at=[None] * n,
            num_tokens=[0] * n,
            open_choices=set(range(n)),
        )
        self._metrics.prompt_tokens.inc(len(prompt_token_ids))
        self._metrics.request_prompt_tokens.observe(len(prompt_token_ids))
        self._wake.set()
        return key

    def abort(self, key: int, choice: int | None = None) -> None:
        """End a request or one of its choices; its pages are free with the next plan. Sends no event."""
        active = self._active.get(key)
        if active is None:
            return
        ended = active.open_choices if choice is None else active.open_choices & {choice}
        for _ in ended:
            self._metrics.count_finish("aborted")
        self._scheduler.abort(key, choice)
        active.open_choices -= set(ended)
        if not active.open_choices:
            self._forget(key)
        self._wake.set()

    # ---- gauges

    def scheduler_stats(self) -> SchedulerStats:
        """See EngineGauges."""
        return self._scheduler.stats()

    def states(self) -> Iterable[tuple[str, bool]]:
        """See EngineGauges."""
        present = self.status[0]
        return [(status.name.lower(), status is present) for status in EngineStatus]

    def ranks(self) -> Sequence[RankState]:
        """See EngineGauges."""
        return self._group.ranks if self._group is not None else []

    # ---- the loop

    async def run(self) -> None:
        """Serve until cancelled.

        Raises
        ------
        ClusterError
            If the group cannot be started, or not be rebuilt `max_rebuilds_in_a_row` times.
        """
        failures = 0
        while True:
            try:
                await self._start_group()
            except ClusterError as error:
                failures += 1
                if self._status is EngineStatus.STARTING or failures >= self._config.max_rebuilds_in_a_row:
                    self._set_status(EngineStatus.DEAD, str(error))
                    self._fail_all(str(error))
                    raise
                logger.error("rebuild %d of the TP group failed: %s", failures, error)
                continue
            failures = 0
            try:
                await self._serve()
            except RankLost as lost:
                logger.error("lost %s; rebuilding the TP group, %d requests wait", lost, len(self._active))
                self._metrics.count_lost_rank(lost.rank)
                self._metrics.rebuilds.inc()
                self._set_status(EngineStatus.REBUILDING, f"lost {lost}")
                self._give_up = asyncio.get_running_loop().call_later(
                    self._config.replay_timeout_s, self._fail_after_replay_timeout
                )
            finally:
                await self._end_group()
            self._scheduler.reset_after_group_loss()

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for those that run; return whether all ended in time."""
        self._draining = True
        self._set_status(EngineStatus.DRAINING, "shutting down")
        self._wake.set()
        if not self._active:
            return True
        try:
            await asyncio.wait_for(self._drained.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def _start_group(self) -> None:
        try:
            addresses = await self._cluster.start_ranks()
        except ClusterError:
            await self._cluster.kill_ranks()
            raise
        if self._give_up is not None:
            self._give_up.cancel()
        self._gave_up = False
        self._group = WorkerGroup(
            [address.target for address in addresses], self._config.step_timeout_s, on_lost=self._wake.set
        )
        self._set_status(EngineStatus.DRAINING if self._draining else EngineStatus.READY, "")

    async def _end_group(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            await group.close()
        await self._cluster.kill_ranks()

    async def _serve(self) -> None:
        """Run steps on the present group until it loses a rank."""
        group, scheduler = self._group, self._scheduler
        assert group is not None
        events: list[TokenEvent] = []
        while True:
            # Keep the ranks fed first; what the last step brought is published while they work.
            while (plan := scheduler.schedule()) is not None:
                await group.send(plan)
            if events:
                self._publish(events)
                events = []
            if scheduler.num_in_flight_steps == 0:
                self._wake.clear()
                group.raise_if_lost()
                await self._wake.wait()
                continue
            result = await group.next_result()
            events = scheduler.update(result)
            self._observe(result)

    def _observe(self, result: StepResult) -> None:
        self._metrics.step.observe(result.step_us / 1e6)
        self._metrics.step_tokens.observe(len(result.slots))
        if result.mask_us:
            self._metrics.grammar_mask_seconds.inc(result.mask_us / 1e6)

    def _publish(self, events: Sequence[TokenEvent]) -> None:
        """Give each session its events of a step, and account for them."""
        now = time.perf_counter()
        by_sink: dict[EventSink, list[OutputEvent]] = {}
        for event in events:
            active = self._active.get(event.request_id)
            if active is None or event.choice not in active.open_choices:
                continue  # aborted meanwhile
            by_sink.setdefault(active.sink, []).append(OutputEvent(active.client_id, event, event.detail))
            if active.first_token_at[event.choice] is None:
                active.first_token_at[event.choice] = now
                self._metrics.ttft.observe(now - active.accepted_at)
            active.num_tokens[event.choice] += len(event.token_ids)
            # Not as sampled: a step that was sent before a stop was known runs over it, and that token is nobody's.
            self._metrics.generation_tokens.inc(len(event.token_ids))
            if event.finish is not None:
                self._close_choice(event.request_id, active, event, now)
        for sink, batch in by_sink.items():
            sink(batch)

    def _close_choice(self, key: int, active: _Active, event: TokenEvent, now: float) -> None:
        assert event.finish is not None
        first, count = active.first_token_at[event.choice], active.num_tokens[event.choice]
        if first is not None and count > 1:
            self._metrics.tpot.observe((now - first) / (count - 1))
        self._metrics.e2e.observe(now - active.accepted_at)
        self._metrics.request_generation_tokens.observe(count)
        self._metrics.count_finish(event.finish.name.lower())
        active.open_choices.discard(event.choice)
        if not active.open_choices:
            self._forget(key)

    def _forget(self, key: int) -> None:
        del self._active[key]
        if self._draining and not self._active:
            self._drained.set()

    # ---- failure

    def _fail_after_replay_timeout(self) -> None:
        """While a lost group is rebuilt, let nobody wait longer than promised, however often the rebuild fails."""
        self._gave_up = True
        self._fail_all(f"{self._detail}; it was not rebuilt within {self._config.replay_timeout_s:g} s")

    def _fail_all(self, detail: str) -> None:
        """End every request with an error event."""
        for key, active in list(self._active.items()):
            self._scheduler.abort(key)
            batch = [
                OutputEvent(active.client_id, TokenEvent(key, choice, (), finish=FinishReason.FAILED), detail)
                for choice in sorted(active.open_choices)
            ]
            for _ in batch:
                self._metrics.count_finish("failed")
            self._forget(key)
            active.sink(batch)

    def _set_status(self, status: EngineStatus, detail: str) -> None:
        self._status = status
        self._detail = detail
        logger.info("engine is %s%s", status.name, f": {detail}" if detail else "")
        for watcher in list(self._watchers):
            watcher()
