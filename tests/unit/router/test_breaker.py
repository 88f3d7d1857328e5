"""When a replica is left alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tpserve.coordinator.router.breaker import Breaker, BreakerState


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock, changes: list[tuple[str, str]] | None = None) -> Breaker:
    seen = [] if changes is None else changes
    return Breaker(
        failures_to_open=3,
        open_s=1.0,
        max_open_s=4.0,
        clock=clock,
        on_change=lambda state, why: seen.append((state.value, why)),
    )


def test_it_opens_probes_and_closes() -> None:
    clock, changes = Clock(), list[tuple[str, str]]()
    breaker = make(clock, changes)
    for _ in range(2):
        breaker.fail("no connection")
    breaker.succeed()
    for _ in range(2):
        breaker.fail("no connection")
        assert breaker.allows
    breaker.fail("it was reset")
    assert not breaker.allows
    for wait_s in (1.0, 2.0, 4.0, 4.0):
        clock.now += wait_s - 0.01
        assert breaker.state.value == "open"
        clock.now += 0.01
        assert breaker.state.value == "half_open"
        assert breaker.allows
        breaker.begin()
        assert not breaker.allows, "one probe at a time"
        breaker.fail("no connection")
    clock.now += 4
    breaker.begin()
    breaker.leave()
    assert breaker.allows, "a client that left was no probe"
    breaker.begin()
    breaker.succeed()
    assert breaker.state.value == "closed"
    assert changes[0] == ("open", "3 failures in a row, the last: it was reset")
    assert changes[-1] == ("closed", "it has answered")
    for _ in range(3):
        breaker.fail("again")
    clock.now += 1.0
    assert breaker.state.value == "half_open", "the wait begins anew"


def test_a_replica_that_is_back_is_probed_at_once() -> None:
    clock = Clock()
    breaker = make(clock)
    breaker.came_back()
    assert breaker.state.value == "closed"
    for _ in range(3):
        breaker.fail("gone")
    breaker.came_back()
    assert breaker.state.value == "half_open"


@given(st.lists(st.sampled_from(["begin", "fail", "succeed", "leave", "back", "wait"]), max_size=60))
def test_it_never_shuts_a_replica_out_for_good_and_never_lets_a_failing_one_have_two(moves: list[str]) -> None:
    clock = Clock()
    breaker = make(clock)
    num_open = 0
    for move in moves:
        if move == "begin" and breaker.allows:
            num_open += 1
            breaker.begin()
            if breaker.state is not BreakerState.CLOSED:
                assert not breaker.allows
        elif move in ("fail", "succeed", "leave") and num_open:
            num_open -= 1
            {"fail": lambda: breaker.fail("x"), "succeed": breaker.succeed, "leave": breaker.leave}[move]()
        elif move == "back":
            breaker.came_back()
        elif move == "wait":
            clock.now += 1.5
    while num_open:
        num_open -= 1
        breaker.leave()
    clock.now += 4
    assert breaker.allows
