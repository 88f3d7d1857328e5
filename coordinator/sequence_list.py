"""Sequences kept in arrival order: the waiting, the prefilling and the running ones."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from tpserve.coordinator.request import Sequence

_ORDER = attrgetter("order")


class SequenceList:
    """A sorted list: adding and removing search in O(log n) and move only pointers."""

    __slots__ = ("_items",)

    def __init__(self) -> None:
        self._items: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        """Iterate over a copy, so that the loop may add and remove."""
        return iter(tuple(self._items))

    def __contains__(self, sequence: Sequence) -> bool:
        index = bisect_left(self._items, sequence.order, key=_ORDER)
        return index < len(self._items) and self._items[index] is sequence

    @property
    def latest(self) -> Sequence:
        """The sequence that arrived last."""
        return self._items[-1]

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at its place in arrival order."""
        insort(self._items, sequence, key=_ORDER)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out that is in the list."""
        index = bisect_left(self._items, sequence.order, key=_ORDER)
        assert self._items[index] is sequence
        del self._items[index]

    def clear(self) -> None:
        """Take all sequences out."""
        self._items.clear()
