"""Slots of the worker's batch: who sits where now, and who sat there in the steps still in flight.

Owns the attribution of results to sequences. Knows nothing of pages or budgets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush

from tpserve.coordinator.request import Sequence
from tpserve.proto.messages import StepResult


class ResultMismatch(RuntimeError):
    """A worker answered something else than what the oldest plan in flight asks for: the group cannot go on."""


@dataclass(slots=True)
class _Step:
    """One plan whose result is not known yet."""

    step_id: int
    num_sampled: int
    departed: dict[int, Sequence] = field(default_factory=dict)
    """Owners of slots at the time of the plan that have left them since."""


class SlotTable:
    """Slots 0 ... num_slots - 1; the lowest free one is given first, which keeps the worker's batch dense.

    A plan does not list the slots that it decodes, and remembering them would cost as much as what runs. So a step
    in flight remembers only the owners that leave later, and everybody else is still in place when its result comes.
    """

    __slots__ = ("_free", "_owners", "_removed", "_steps")

    def __init__(self, num_slots: int) -> None:
        self._owners: list[Sequence | None] = [None] * num_slots
        self._free = list(range(num_slots))
        self._removed: list[int] = []
        self._steps: deque[_Step] = deque()

    @property
    def num_free(self) -> int:
        """Slots that can be acquired for the next plan."""
        return len(self._free)

    @property
    def num_in_flight(self) -> int:
        """Plans without a result."""
        return len(self._steps)

    def acquire(self, sequence: Sequence) -> int:
        """Seat a sequence for the plan being made, and return its slot."""
        slot = heappop(self._free)
        self._owners[slot] = sequence
        sequence.slot = slot
        return slot

    def release(self, sequence: Sequence) -> None:
        """Unseat a sequence: the next plan removes its slot, and may give it to another."""
        slot = sequence.slot
        assert slot is not None
        assert self._owners[slot] is sequence
        for step in self._steps:
            step.departed.setdefault(slot, sequence)
        self._owners[slot] = None
        sequence.slot = None
        heappush(self._free, slot)
        self._removed.append(slot)

    def take_removed(self) -> tuple[int, ...]:
        """Return the slots that the plan being made has to remove."""
        removed = tuple(self._removed)
        self._removed.clear()
        return removed

    def open_step(self, step_id: int, num_sampled: int) -> None:
        """Note that a plan is made whose result will hold `num_sampled` tokens."""
        self._steps.append(_Step(step_id, num_sampled))

    def close_step(self, result: StepResult) -> list[Sequence]:
        """Return the sequences to which the tokens of a result belong, parallel to its slots.

        Raises
        ------
        ResultMismatch
            The result is not that of the oldest plan in flight, or does not hold its tokens.
        """
        if not self._steps or self._steps[0].step_id != result.step_id:
            expected = self._steps[0].step_id if self._steps else None
            raise ResultMismatch(f"result of step {result.step_id}, expected that of {expected}")
        step = self._steps.popleft()
        num_tokens = sum(result.counts) if result.counts else len(result.slots)
        if len(result.slots) != step.num_sampled or len(result.token_ids) != num_tokens:
            raise ResultMismatch(
                f"step {step.step_id} samples {step.num_sampled} slots, its result has {len(result.slots)} slots "
                f"and {len(result.token_ids)} tokens where {num_tokens} are counted"
            )
        if len(set(result.slots)) != step.num_sampled or max(result.slots, default=0) >= len(self._owners):
            raise ResultMismatch(f"step {step.step_id} has slots twice, or past {len(self._owners)}: {result.slots}")
        owners = self._owners
        departed = step.departed
        sequences = [owners[slot] for slot in result.slots]
        if departed:
            sequences = [departed.get(slot, owner) for slot, owner in zip(result.slots, sequences, strict=True)]
        found = [sequence for sequence in sequences if sequence is not None]
        if len(found) != len(sequences):
            empty = [slot for slot, sequence in zip(result.slots, sequences, strict=True) if sequence is None]
            raise ResultMismatch(f"step {step.step_id} has tokens of empty slots {empty}")
        return found

    def reset(self) -> None:
        """Forget the steps in flight and unseat everybody, because the workers start with an empty batch."""
        for sequence in self._owners:
            if sequence is not None:
                sequence.slot = None
        self._owners = [None] * len(self._owners)
        self._free = list(range(len(self._owners)))
        self._removed.clear()
        self._steps.clear()

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Raise AssertionError unless exactly the running sequences have a slot, each its own."""
        seated = {slot: owner for slot, owner in enumerate(self._owners) if owner is not None}
        expected = {sequence.slot: sequence for sequence in running}
        assert seated == expected, f"slots in use {sorted(seated)}, slots of running sequences {list(expected)}"
        assert sorted([*self._free, *seated]) == list(range(len(self._owners))), (
            f"free slots {sorted(self._free)} and used slots {sorted(seated)} are not all slots, each once"
        )
        assert len(self._removed) == len(set(self._removed)), f"slots removed twice: {self._removed}"
