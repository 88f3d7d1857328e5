"""When to leave a replica alone for a while. Pure: the clock is given.

closed     requests go there. `failures_to_open` failures in a row open it.
open       no request goes there for `open_s`, twice as long after each failed probe, `max_open_s` at most.
half-open  then one request goes there, as a probe: its success closes the breaker, its failure opens it again.

A failure is a connection that cannot be had or breaks, and silence; an answer of any status is a success, since the
replica speaks. A probe loses no request: what fails there before an answer is sent is sent elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum


class BreakerState(Enum):
    """See the module."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """The breaker of one replica.

    Parameters
    ----------
    on_change
        Called with the new state and the reason.
    clock
        Seconds, monotonic.
    """

    def __init__(
        self,
        *,
        failures_to_open: int,
        open_s: float,
        max_open_s: float,
        clock: Callable[[], float],
        on_change: Callable[[BreakerState, str], None] = lambda state, why: None,
    ) -> None:
        self._failures_to_open = failures_to_open
        self._first_open_s = open_s
        self._max_open_s = max_open_s
        self._clock = clock
        self._on_change = on_change
        self._state = BreakerState.CLOSED
        self._num_failures = 0
        self._open_s = open_s
        self._open_until = 0.0
        self._is_probing = False

    @property
    def state(self) -> BreakerState:
        """The state as of now."""
        if self._state is BreakerState.OPEN and self._clock() >= self._open_until:
            self._set(BreakerState.HALF_OPEN, f"{self._open_s:g} s have passed")
        return self._state

    @property
    def allows(self) -> bool:
        """Whether a request may go there now."""
        state = self.state
        return state is BreakerState.CLOSED or (state is BreakerState.HALF_OPEN and not self._is_probing)

    def begin(self) -> None:
        """Note that a request goes there; half-open, it is the probe. It must be followed by one of the below."""
        if self.state is BreakerState.HALF_OPEN:
            self._is_probing = True

    def succeed(self) -> None:
        """Note that the replica has answered."""
        self._num_failures = 0
        self._is_probing = False
        self._open_s = self._first_open_s
        if self._state is not BreakerState.CLOSED:
            self._set(BreakerState.CLOSED, "it has answered")

    def fail(self, why: str) -> None:
        """Note a failure."""
        self._num_failures += 1
        self._is_probing = False
        if self._state is BreakerState.HALF_OPEN:
            self._open_s = min(2 * self._open_s, self._max_open_s)
            self._open(f"the probe failed: {why}")
        elif self._state is BreakerState.CLOSED and self._num_failures >= self._failures_to_open:
            self._open(f"{self._num_failures} failures in a row, the last: {why}")

    def leave(self) -> None:
        """Note a request that ended without telling anything of the replica, as when its client has left."""
        self._is_probing = False

    def came_back(self) -> None:
        """Note that a replica that was gone is ready: it need not wait for its probe."""
        if self._state is BreakerState.OPEN:
            self._open_s = self._first_open_s
            self._set(BreakerState.HALF_OPEN, "it is ready again")

    def _open(self, why: str) -> None:
        self._open_until = self._clock() + self._open_s
        self._set(BreakerState.OPEN, why)

    def _set(self, state: BreakerState, why: str) -> None:
        self._state = state
        self._is_probing = False
        self._on_change(state, why)
