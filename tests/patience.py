"""How much longer tests wait on a machine that is slow just now.

Machines that run tests are shared with others and differ: a limit in seconds that means something on one of them fails
on the next. Limits are written for a quick one, whose Python takes `QUICK_S` for `_work`; where that takes longer,
because of the processor or of those who use it too, they grow by as much.
"""

from __future__ import annotations

import threading
import time
from typing import Self

QUICK_S = 0.01
"""What `_work` takes on a quick machine."""
_LONGEST_PAUSE_S = 1.0


def _work() -> int:
    total = 0
    for number in range(200_000):
        total += number * number
    return total


def slowness() -> float:
    """Return how many times slower than a quick machine this one is now; never below 1."""
    begin = time.perf_counter()
    _work()
    return max(1.0, (time.perf_counter() - begin) / QUICK_S)


def patient(limit: float) -> float:
    """Return what `limit`, a time on a quick machine, is on this one now."""
    return limit * slowness()


class Patience:
    """A deadline that moves if the machine turns out to be slow; asked often, it costs nothing until the limit.

    A pause between two questions counts for a second at most: a machine that stood still has given nobody any time.
    """

    def __init__(self, within_s: float) -> None:
        self._within_s = within_s
        self._last = time.monotonic()
        self._waited_s = 0.0
        self._slowness = 1.0

    def is_over(self) -> bool:
        """Say whether the limit has passed, as long as it is on this machine at its slowest."""
        now = time.monotonic()
        self._waited_s += min(now - self._last, _LONGEST_PAUSE_S)
        self._last = now
        if self._waited_s > self._within_s * self._slowness:
            self._slowness = max(self._slowness, slowness())
        return self._waited_s > self._within_s * self._slowness


class SlownessMeter:
    """Measures all the while, in a thread of its own, how slow this machine is at its slowest."""

    def __init__(self) -> None:
        self.most = 1.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.25):
            self.most = max(self.most, slowness())
