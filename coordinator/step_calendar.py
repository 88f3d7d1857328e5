"""Which sequences have something due in which step."""

from __future__ import annotations

from tpserve.coordinator.request import Sequence


class StepCalendar:
    """At most one entry for each sequence; a sequence that leaves is taken out, so that nothing ended is kept alive."""

    __slots__ = ("_due",)

    def __init__(self) -> None:
        self._due: dict[int, dict[int, Sequence]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._due.values()))

    def add(self, step: int, sequence: Sequence) -> None:
        """Note that something is due for a sequence in a step."""
        self._due.setdefault(step, {})[sequence.order] = sequence

    def discard(self, step: int, sequence: Sequence) -> None:
        """Take an entry out, if it is there."""
        due = self._due.get(step)
        if due is not None and due.pop(sequence.order, None) is not None and not due:
            del self._due[step]

    def pop(self, step: int) -> list[Sequence]:
        """Take out and return what is due in a step, in arrival order."""
        due = self._due.pop(step, {})
        return [due[order] for order in sorted(due)]

    def clear(self) -> None:
        """Take everything out."""
        self._due.clear()
