"""The calendar of steps."""

from __future__ import annotations

from builders import make_request
from tpserve.coordinator.request import make_group
from tpserve.coordinator.step_calendar import StepCalendar


def test_gives_what_is_due_once_in_arrival_order() -> None:
    calendar = StepCalendar()
    first, second, third = make_group(make_request(1, n=3), 0, 64, 1, False).sequences
    for sequence in (third, first, second):
        calendar.add(7, sequence)
    calendar.discard(7, second)
    calendar.discard(8, first)
    assert len(calendar) == 2
    assert calendar.pop(6) == []
    assert calendar.pop(7) == [first, third]
    assert calendar.pop(7) == []
    assert len(calendar) == 0
