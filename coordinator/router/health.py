"""Asks each replica, again and again, whether it takes requests; and gives up on exchanges that have fallen silent."""

from __future__ import annotations

import asyncio
import contextlib

import orjson

from tpserve.coordinator.router.config import RouterConfig
from tpserve.coordinator.router.replicas import Backend, Replicas
from tpserve.coordinator.router.upstream import UpstreamLost

_SLOW_POLLS = 3
"""A replica that listens may be late to answer, on a busy machine; only the third time in a row it counts as gone."""


class HealthWatch:
    """One task for each replica."""

    def __init__(self, config: RouterConfig, replicas: Replicas) -> None:
        self._config = config
        self._replicas = replicas
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to ask."""
        self._replicas.look = self._look
        self._tasks = [asyncio.create_task(self._watch(backend)) for backend in self._replicas.backends]

    async def close(self) -> None:
        """Stop asking."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _watch(self, backend: Backend) -> None:
        while True:
            await self._look(backend)
            backend.upstream.lose_silent(self._config.silent_after_s, even_whole=bool(backend.num_failed_polls))
            self._replicas.dispatch()  # a breaker may have become half-open by the time alone
            await asyncio.sleep(self._config.health_interval_s)

    async def _look(self, backend: Backend) -> None:
        """Ask once, and take in the answer."""
        try:
            is_ready, detail = await self._ask(backend)
        except UpstreamLost as error:
            backend.num_failed_polls += 1
            if not error.was_sent:
                backend.load.prefix.clear()  # nobody listens: when somebody does, its cache will be empty
            if not error.was_sent or backend.num_failed_polls >= _SLOW_POLLS:
                self._replicas.set_ready(backend, False, str(error))
        else:
            backend.num_failed_polls = 0
            self._replicas.set_ready(backend, is_ready, detail)

    async def _ask(self, backend: Backend) -> tuple[bool, str]:
        """Return whether it takes requests, and why not; raise UpstreamLost if it does not say."""
        timeout_s = self._config.health_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                response = await backend.upstream.request(b"GET", b"/health/ready", [])
                try:
                    body = await response.body()
                finally:
                    response.close()
        except TimeoutError:
            raise UpstreamLost(f"its health did not answer within {timeout_s:g} s", was_sent=True) from None
        detail = f"its health answered {response.status}"
        with contextlib.suppress(ValueError, AttributeError):
            fields = orjson.loads(body)
            detail = ": ".join(filter(None, (str(fields.get("status")), str(fields.get("detail") or ""))))
        return response.status == 200, detail
