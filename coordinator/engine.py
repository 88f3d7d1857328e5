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

from tpserve.coordinator.active_requests import ActiveRequests, EventSink
from tpserve.coordinator.client import RankState, WorkerGroup
from tpserve.coordinator.cluster import Cluster
from tpserve.coordinator.errors import ClusterError, RankLost
from tpserve.coordinator.metrics import Metrics
from tpserve.coordinator.request import QueueFull, Request, RequestInvalid, TokenEvent
from tpserve.coordinator.scheduler import Scheduler
from tpserve.coordinator.scheduler_stats import SchedulerStats
from tpserve.coordinator.step_log import StepLog, StepTrace
from tpserve.coordinator.step_pace import StepPace
from tpserve.coordinator.tracing import RequestSpans, Tracing
from tpserve.proto.messages import Grammar, SamplingParams, StepResult

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
    replay_timeout_s: float = 45.0
    """Requests of a lost group end with an error if no step has ended by then; while there is no group, new ones are
    refused from then on."""
    max_rebuilds_in_a_row: int = 3
    """Rebuilds that fail before the engine is DEAD."""
    plan_lead_s: float = 0.001
    """Least time before a step's expected end, when the next one is planned; see `StepPace`."""


class Engine:
    """Runs one TP group and the requests on it."""

    def __init__(
        self,
        config: EngineConfig,
        scheduler: Scheduler,
        cluster: Cluster,
        metrics: Metrics,
        tracing: Tracing | None = None,
    ) -> None:
        self._config = config
        self._scheduler = scheduler
        self._cluster = cluster
        self._metrics = metrics
        self._group: WorkerGroup | None = None
        self._active = ActiveRequests(metrics, self._on_empty)
        self._next_key = 1
        self._wake = asyncio.Event()
        self._status = EngineStatus.STARTING
        self._detail = "starting the TP group"
        self.was_ready = False
        """Whether it has ever been READY."""
        self._watchers: list[Callable[[], None]] = []
        self._draining = False
        self._drained = asyncio.Event()
        self._give_up: asyncio.TimerHandle | None = None
        """Set from the loss of a group until steps end again: when its requests have waited long enough."""
        self._loss = ""
        """The latest rank that was lost, and how."""
        self._gave_up = False
        self._tracing = tracing
        self._step_log: StepLog | None = None
        """Of the present group's ranks, but a draft's own."""
        self._num_model_ranks = 0
        """Of the present group; a draft's own ranks have the numbers behind them."""
        self._trace = StepTrace()
        self._collectives = "none"
        """By which the ranks of the latest group exchange activations."""
        self._pace = StepPace(config.plan_lead_s)
        self._after_idle: set[int] = set()
        """Steps in flight before which there was nothing to run."""
        self._last_end_us = 0
        """When rank 0 ended its latest step, Unix time."""
        metrics.read_from(self)

    # ---- what sessions use

    @property
    def status(self) -> tuple[EngineStatus, str]:
        """The state and its detail; STALLED is seen from the age of the oldest step."""
        if self._status in (EngineStatus.READY, EngineStatus.DRAINING) and self._group is not None:
            age = self._group.oldest_step_age_s()
            if age > self._config.stall_after_s:
                late = self._group.least_advanced()
                ranks = f"; rank {late.name} has finished step {late.last_step}" if len(self._group.ranks) > 1 else ""
                return EngineStatus.STALLED, f"no step has finished for {age:.1f} s{ranks}"
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
        name: str = "",
        traceparent: str = "",
        emitted: tuple[tuple[int, ...], ...] = (),
    ) -> int:
        """Accept a request; its events go to `sink` under `client_id`.

        Parameters
        ----------
        name
            The API's id of the request, for its spans.
        traceparent
            W3C trace context of the caller's span; empty: not traced.
        emitted
            See `Request`.

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
                Request(key, prompt_token_ids, sampling, max_tokens, n, stop_token_ids, grammar, emitted)
            )
        except QueueFull:
            self._metrics.count_rejection("queue_full")
            raise
        except RequestInvalid:
            self._metrics.count_rejection("invalid")
            raise
        self._next_key += 1
        self._pace.arrived()
        spans = None
        if self._tracing is not None and traceparent:
            spans = RequestSpans(self._tracing, traceparent, name, len(prompt_token_ids))
        self._active.add(key, client_id, sink, len(prompt_token_ids), n, spans)
        metrics = self._metrics
        metrics.prompt_tokens.inc(len(prompt_token_ids))
        metrics.request_prompt_tokens.observe(len(prompt_token_ids))
        metrics.request_n.observe(n)
        metrics.request_max_tokens.observe(max_tokens)
        self._wake.set()
        return key

    def abort(self, key: int, choice: int | None = None) -> None:
        """End a request or one of its choices; its pages are free with the next plan. Sends no event."""
        if not self._active.abort(key, choice):
            return
        self._scheduler.abort(key, choice)
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

    def plan_lead_s(self) -> float:
        """See EngineGauges."""
        return self._pace.lead_s if self._pace.waits else 0.0

    def collectives(self) -> str:
        """See EngineGauges."""
        return self._collectives

    async def trace(self, num_steps: int, timeout_s: float) -> str:
        """Record the next steps in Chrome's trace event format; see `StepTrace.record`."""
        return await self._trace.record(num_steps, [rank.name for rank in self.ranks()], timeout_s)

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
                self._metrics.count_lost_rank(lost.name)
                self._metrics.rebuilds.inc()
                self._loss = f"lost {lost}"
                self._set_status(EngineStatus.REBUILDING, self._loss)
                if self._give_up is None:
                    self._give_up = asyncio.get_running_loop().call_later(
                        self._config.replay_timeout_s, self._fail_after_replay_timeout
                    )
            finally:
                await self._end_group()
            self._scheduler.reset_after_group_loss()
            for key in self._active.count_lost_group(self._loss):
                self._scheduler.abort(key)

    async def drain(self, timeout_s: float, why: str = "shutting down") -> bool:
        """Take no more requests and wait for those that run; return whether all ended in time."""
        self._draining = True
        self._set_status(EngineStatus.DRAINING, why)
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
        if not self._active:
            self._stop_giving_up()
        self._gave_up = False
        self._num_model_ranks = sum(address.draft_rank is None for address in addresses)
        self._step_log = StepLog(self._num_model_ranks)
        self._active.begin_group(self._step_log)
        self._metrics.make_ranks([address.name for address in addresses])
        self._collectives = addresses[0].collectives
        if times := addresses[0].size_times:
            sizes = [f"{each.num_tokens} decodes" if each.decode_only else str(each.num_tokens) for each in times]
            took = ", ".join(f"{size} {each.step_us / 1e3:.2f}" for size, each in zip(sizes, times, strict=True))
            logger.info("steps without attention take, by tokens, in ms: %s", took)
        self._scheduler.learn_size_times(times)
        self._pace.begin_group(times)
        self._group = WorkerGroup(
            [address.target for address in addresses],
            self._config.step_timeout_s,
            on_lost=self._wake.set,
            on_result=self._on_rank_result,
            stall_after_s=self._config.stall_after_s,
            on_stall=self._on_stall,
            token=addresses[0].token,
            tls=addresses[0].tls,
            nodes=[address.node if address.is_away else "" for address in addresses],
            names=[address.name for address in addresses],
            num_draft_ranks=len(addresses) - self._num_model_ranks,
        )
        self._set_status(EngineStatus.DRAINING if self._draining else EngineStatus.READY, "")

    async def _end_group(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            await group.close()
        self._active.end_group()
        await self._cluster.kill_ranks()

    async def _serve(self) -> None:
        """Run steps on the present group until it loses a rank."""
        group, scheduler = self._group, self._scheduler
        assert group is not None
        events: list[TokenEvent] = []
        step_id = 0
        idle = True
        clock, trace, pace = time.perf_counter, self._trace, self._pace
        self._after_idle.clear()
        while True:
            # Keep the ranks fed first; what the last step brought is published while they work.
            while True:
                begun = clock()
                wait_s = pace.wait_s(begun, may_plan=not scheduler.is_full)
                plan = None if wait_s else scheduler.schedule()
                if plan is None:
                    break
                trace.host("schedule", begun, plan.step_id)
                if scheduler.speculates:
                    self._metrics.count_drafting(plan.num_draft_tokens, len(plan.undrafted_slots))
                if idle:
                    self._after_idle.add(plan.step_id)
                    idle = False
                begun = clock()
                await group.send(plan)
                trace.host("send", begun, plan.step_id)
                pace.planned(scheduler.latest_size, clock())
                if plan.added_slots:
                    self._active.note_started(scheduler.take_started())
            if events:
                begun = clock()
                self._active.publish(events, step_id)
                trace.host("publish", begun, step_id)
                events = []
            if scheduler.num_in_flight_steps == 0:
                idle = True
                self._wake.clear()
                group.raise_if_lost()
                await self._wake.wait()
                continue
            result = await (group.result_within(wait_s) if wait_s else group.next_result())
            if result is None:
                continue  # it is time to plan
            begun = clock()
            step_id = result.step_id
            events = scheduler.update(result)
            trace.host("update", begun, step_id)
            self._observe(result)

    def _on_rank_result(self, result: StepResult) -> None:
        """Take in what any rank says of a step, rank 0 included."""
        if not result.num_tokens:
            return
        assert self._step_log is not None
        self._metrics.observe_rank(result)
        self._trace.rank(result)
        if result.rank >= self._num_model_ranks:
            return  # a draft's, which takes part in no collective of the model's
        ranks = self._step_log.add(result)
        self._active.note_reported()
        if ranks is not None and len(ranks) > 1:
            self._metrics.observe_group(ranks)
            longest_us = max(each.step_us for each in ranks)  # of one that was late to begin, the step itself is short
            if longest_us > self._config.stall_after_s * 1e6:
                last = min(ranks, key=lambda each: each.collective_us)  # who comes last waits least
                logger.warning("step %d took %.1f s: rank %d came last", result.step_id, longest_us / 1e6, last.rank)

    def _observe(self, result: StepResult) -> None:
        """Account for a step by rank 0's word, in order."""
        fresh = result.step_id in self._after_idle
        self._after_idle.discard(result.step_id)
        gap_us = None if fresh or not result.num_tokens else max(0, result.started_us - self._last_end_us)
        # Beside a grammar's masks, which wait for the tokens before, the device has the forward pass to do.
        self._pace.ended(result.step_us, None if result.mask_us else gap_us, time.perf_counter())
        if not result.num_tokens:
            return
        self._stop_giving_up()
        self._last_end_us = result.started_us + result.step_us
        self._metrics.observe_step(result, gap_us)
        if result.mask_us:
            self._metrics.grammar_mask_seconds.inc(result.mask_us / 1e6)

    # ---- failure

    def _on_stall(self) -> None:
        """Tell gateways at once that steps stand still, or go on."""
        status, detail = self.status
        logger.log(
            logging.WARNING if status is EngineStatus.STALLED else logging.INFO,
            "engine is %s%s",
            status.name,
            f": {detail}" if detail else "",
        )
        self._tell_watchers()

    def _fail_after_replay_timeout(self) -> None:
        """Let nobody wait longer than promised, however often the rebuild fails or a new group is lost in its turn."""
        self._give_up = None
        self._gave_up = self._status is EngineStatus.REBUILDING
        self._fail_all(f"{self._loss}; no step has ended within {self._config.replay_timeout_s:g} s of the first loss")

    def _stop_giving_up(self) -> None:
        """Cancel `_fail_after_replay_timeout`: steps end again, or nobody waits for one."""
        if self._give_up is not None:
            self._give_up.cancel()
            self._give_up = None

    def _fail_all(self, detail: str) -> None:
        """End every request with an error event."""
        for key in self._active.fail_all(detail):
            self._scheduler.abort(key)

    def _on_empty(self) -> None:
        if self._draining:
            self._drained.set()

    def _set_status(self, status: EngineStatus, detail: str) -> None:
        self._status = status
        self._detail = detail
        self.was_ready |= status is EngineStatus.READY
        logger.info("engine is %s%s", status.name, f": {detail}" if detail else "")
        self._tell_watchers()

    def _tell_watchers(self) -> None:
        for watcher in list(self._watchers):
            watcher()
