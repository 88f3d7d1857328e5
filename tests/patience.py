"""How much longer tests wait on a machine that is slow just now.

Machines that run tests are shared with others and differ: a limit in seconds that means something on one of them fails
on the next. Limits are written for a quick one, whose Python takes `QUICK_S` for `_work`; where that takes longer,
because of the processor or of those who use it too, they grow by as much.
"""

from __future__ import annotations

import time

QUICK_S = 0.01
"""What `_work` takes on a quick machine."""


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
    """A deadline that moves if the machine turns out to be slow; asked often, it costs nothing until the limit."""

    def __init__(self, within_s: float) -> None:
        self._within_s = within_s
        self._begin = time.monotonic()

    def is_over(self) -> bool:
        """Say whether the limit has passed, as long as it is on this machine."""
        waited_s = time.monotonic() - self._begin
        return waited_s > self._within_s and waited_s > patient(self._within_s)
