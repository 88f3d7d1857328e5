"""The replicas as the router knows them, and the line of requests that wait for one with room.

Owns which replica a request is at. Knows nothing of HTTP: `proxy` talks to replicas, `health` asks how they are.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from tpserve.coordinator.gateway.errors import ApiError, EngineUnavailable, QueueFull
from tpserve.coordinator.router.breaker import Breaker, BreakerState
from tpserve.coordinator.router.choice import Chooser, Load, PrefixIndex
from tpserve.coordinator.router.config import RouterConfig, parse_backend
from tpserve.coordinator.router.metrics import Reading, RouterMetrics
from tpserve.coordinator.router.prompt import Prompt
from tpserve.coordinator.router.upstream import Upstream

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 1
Outcome = Literal["answered", "refused", "lost", "left"]


@dataclass(slots=True, eq=False)
class Backend:
    """One replica."""

    name: str
    """`host:port`, for logs and metrics."""
    upstream: Upstream
    breaker: Breaker
    load: Load
    is_ready: bool = False
    detail: str = "not asked yet"
    """Why it is not ready."""
    life: int = 0
    """How often it has become ready: who failed in an earlier life may do well in this one."""
    num_failed_polls: int = 0
    """In a row."""


@dataclass(slots=True, eq=False)
class Lease:
    """One request at one replica."""

    replicas: Replicas
    backend: Backend
    life: int
    num_new_blocks: int
    _has_answered: bool = False
    _has_ended: bool = False

    def answered(self) -> None:
        """Note the first sign of the answer: the prompt has been computed."""
        if not self._has_answered:
            self._has_answered = True
            self.backend.load.num_pending_blocks -= self.num_new_blocks
            self.backend.breaker.succeed()

    def end(self, outcome: Outcome, why: str = "") -> None:
        """Note that the replica has nothing more to do with the request; later calls count for nothing."""
        if self._has_ended:
            return
        self._has_ended = True
        backend = self.backend
        backend.load.num_in_flight -= 1
        if not self._has_answered:
            backend.load.num_pending_blocks -= self.num_new_blocks
        if outcome == "lost":
            backend.breaker.fail(why)
        elif outcome == "left":
            backend.breaker.leave()
        else:
            backend.breaker.succeed()
        self.replicas.ended(backend, outcome)


@dataclass(slots=True)
class Tried:
    """Replicas, each in one life, that a request has tried."""

    refused: set[tuple[str, int]] = field(default_factory=set)
    """Not asked again."""
    lost: set[tuple[str, int]] = field(default_factory=set)
    """Asked again only if no other is ready."""


@dataclass(slots=True, eq=False)
class _Waiter:
    prompt: Prompt
    tried: Tried
    granted: asyncio.Future[Lease]


async def _look_away(backend: Backend) -> None:
    """Nobody watches."""


class Replicas:
    """All replicas, the choice among them, and who waits."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._chooser = Chooser(config.policy)
        self._waiters: deque[_Waiter] = deque()
        self.metrics = RouterMetrics(self._read)
        self.was_ready = False
        """Whether any replica has ever been ready."""
        self.look: Callable[[Backend], Awaitable[None]] = _look_away
        """Asks a replica at once how it is; whoever watches over health sets it."""
        self.backends = [self._make(url) for url in config.backends]

    def _make(self, url: str) -> Backend:
        host, port = parse_backend(url)
        name = f"{host}:{port}"

        def on_change(state: BreakerState, why: str) -> None:
            logger.log(
                logging.INFO if state is BreakerState.CLOSED else logging.WARNING,
                "replica %s: its breaker is %s: %s",
                name,
                state.value.replace("_", "-"),
                why,
            )
            self.metrics.breaker_change(name, state.value)

        breaker = Breaker(
            failures_to_open=self._config.breaker_failures,
            open_s=self._config.breaker_open_s,
            max_open_s=self._config.breaker_max_open_s,
            clock=time.monotonic,
            on_change=on_change,
        )
        self.metrics.make_backend(name)
        return Backend(name, Upstream(host, port), breaker, Load(PrefixIndex(self._config.prefix_blocks)))

    @property
    def num_ready(self) -> int:
        """Replicas that take requests."""
        return sum(backend.is_ready for backend in self.backends)

    @property
    def num_in_flight(self) -> int:
        """Requests at replicas, or waiting for one."""
        return sum(backend.load.num_in_flight for backend in self.backends) + len(self._waiters)

    def set_ready(self, backend: Backend, is_ready: bool, detail: str) -> None:
        """Take in what a replica's health says."""
        if is_ready and not backend.is_ready:
            backend.life += 1
            backend.breaker.came_back()
            logger.info("replica %s is ready", backend.name)
        elif backend.is_ready and not is_ready:
            logger.warning("replica %s takes no requests: %s", backend.name, detail)
        backend.is_ready, backend.detail = is_ready, detail
        self.was_ready |= is_ready
        self.dispatch()

    async def acquire(self, prompt: Prompt, tried: Tried, *, goes_on: bool) -> Lease | None:
        """Wait for a replica with room; None if all that are ready have refused the request.

        Parameters
        ----------
        goes_on
            Its answer has begun: it goes before all others, whatever the queue's length.

        Raises
        ------
        ApiError
            429 or 503 if there is no room in the queue, or none at any replica within the queue's time.
        """
        begin = time.perf_counter()
        lease = None if self._waiters and not goes_on else self._grant(prompt, tried)
        if lease is None:
            ready = {(backend.name, backend.life) for backend in self.backends if backend.is_ready}
            if ready and ready <= tried.refused:
                return None
            lease = await self._wait(prompt, tried, goes_on)
        self.metrics.wait(time.perf_counter() - begin)
        return lease

    async def _wait(self, prompt: Prompt, tried: Tried, goes_on: bool) -> Lease:
        if not goes_on and len(self._waiters) >= self._config.max_queued:
            raise self._rejection("queue_full", f"{len(self._waiters)} requests wait already")
        waiter = _Waiter(prompt, tried, asyncio.get_running_loop().create_future())
        if goes_on:
            self._waiters.appendleft(waiter)
        else:
            self._waiters.append(waiter)
        self.dispatch()
        try:
            async with asyncio.timeout(self._config.queue_timeout_s):
                return await waiter.granted
        except TimeoutError:
            if waiter.granted.done() and not waiter.granted.cancelled():
                return waiter.granted.result()
            timeout_s = self._config.queue_timeout_s
            raise self._rejection("queue_timeout", f"no replica had room within {timeout_s:g} s") from None
        except asyncio.CancelledError:
            if waiter.granted.done() and not waiter.granted.cancelled():
                waiter.granted.result().end("left")
            raise
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _rejection(self, reason: str, message: str) -> ApiError:
        if not self.num_ready:
            self.metrics.reject("no_backend")
            why = "; ".join(f"{backend.name}: {backend.detail}" for backend in self.backends)
            return EngineUnavailable(f"No replica is ready ({why})", retry_after_s=_RETRY_AFTER_S)
        self.metrics.reject(reason)
        return QueueFull(f"All replicas are busy: {message}", retry_after_s=_RETRY_AFTER_S)

    def dispatch(self) -> None:
        """Give waiting requests, in order, to replicas with room."""
        for waiter in list(self._waiters):
            if waiter.granted.done():
                continue
            if not any(self._open(set())):
                return
            if (lease := self._grant(waiter.prompt, waiter.tried)) is not None:
                self._waiters.remove(waiter)
                waiter.granted.set_result(lease)

    def _open(self, but: set[tuple[str, int]]) -> Iterator[Backend]:
        """Yield the replicas that may take a request now."""
        for backend in self.backends:
            if (
                backend.is_ready
                and backend.load.num_in_flight < self._config.max_in_flight_per_backend
                and (backend.name, backend.life) not in but
                and backend.breaker.allows
            ):
                yield backend

    def _grant(self, prompt: Prompt, tried: Tried) -> Lease | None:
        but = tried.refused
        others = {(backend.name, backend.life) for backend in self.backends if backend.is_ready} - tried.refused
        if others - tried.lost:
            but = tried.refused | tried.lost
        found = list(self._open(but))
        if not found:
            return None
        number, num_matched = self._chooser.choose([backend.load for backend in found], prompt.blocks)
        backend = found[number]
        backend.breaker.begin()
        num_new = len(prompt.blocks) - num_matched
        backend.load.num_in_flight += 1
        backend.load.num_pending_blocks += num_new
        backend.load.prefix.add(prompt.blocks)
        self.metrics.match(len(prompt.blocks), num_matched)
        return Lease(self, backend, backend.life, num_new)

    def ended(self, backend: Backend, outcome: Outcome) -> None:
        """Note the end of a lease; somebody else may have its place."""
        self.metrics.backend_request(backend.name, outcome)
        self.dispatch()

    def _read(self) -> Iterator[Reading]:
        yield Reading("router_queued", (), len(self._waiters))
        for backend in self.backends:
            yield Reading("router_backend_ready", (backend.name,), float(backend.is_ready))
        for backend in self.backends:
            yield Reading("router_backend_in_flight", (backend.name,), backend.load.num_in_flight)
        for backend in self.backends:
            for state in BreakerState:
                active = float(backend.breaker.state is state)
                yield Reading("router_breaker_state", (backend.name, state.value), active)
