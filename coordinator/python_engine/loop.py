"""One event loop in a thread of its own, which every engine of this process shares.

gRPC's asyncio side wants one loop per process, and a user's own loop may come and go or be blocked for seconds; the
session with the coordinator shall notice neither. The thread lives until the process ends, also because processes
that it starts get SIGTERM when the thread that started them ends.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_START_LOCK = threading.Lock()
_shared: BackgroundLoop | None = None


class BackgroundLoop:
    """A running event loop to which other threads give work."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="tpserve-engine", daemon=True).start()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Run a coroutine there and wait for its result.

        Raises
        ------
        TimeoutError
            If it takes longer; it is cancelled.
        """
        future = self.submit(coroutine)
        try:
            return future.result(timeout_s)
        except BaseException:  # also Ctrl-C here shall end the work there
            future.cancel()
            raise

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine there; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Call a function there, soon."""
        self._loop.call_soon_threadsafe(function, *args)


def shared_loop() -> BackgroundLoop:
    """Return the loop of this process, started when first asked for."""
    global _shared  # one per process is its purpose
    with _START_LOCK:
        if _shared is None:
            _shared = BackgroundLoop()
        return _shared
