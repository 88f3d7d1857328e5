"""What steps of each captured size take, as ranks say when they start. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from tpserve.proto.rank import SizeTime


class StepSizes:
    """Of steps of one kind: of decodes alone, or of any tokens."""

    __slots__ = ("sizes", "step_us")

    def __init__(self, times: Sequence[SizeTime]) -> None:
        ordered = sorted((each.num_tokens, each.step_us) for each in times)
        self.sizes = [num_tokens for num_tokens, _ in ordered]
        self.step_us = [step_us for _, step_us in ordered]

    def place(self, num_tokens: int) -> int | None:
        """Return which is the smallest step that holds so many tokens; None if none does."""
        place = bisect_left(self.sizes, num_tokens)
        return place if place < len(self.sizes) else None

    def us(self, num_tokens: int) -> int:
        """Return the microseconds of that step; 0 if there is none."""
        place = self.place(num_tokens)
        return 0 if place is None else self.step_us[place]
