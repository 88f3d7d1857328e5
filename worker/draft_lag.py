"""How far a draft on a GPU may be behind the slots that it drafts for, as the host counts it. Plain numpy.

Hangs on plans alone, so that all ranks count the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tpserve.proto.messages import SlotAdd
from tpserve.worker.arrays import Array

_LEFT_OUT_BY_ROUND = 2
"""The last token of all, which nobody has run, and the last draft token if all were accepted."""


class DraftLag:
    """By slot, how many of its last tokens the draft may not have run.

    Slots that do not speculate are never behind: the draft computes nothing for them, however long they decode.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._num_missing = np.zeros(max_num_seqs, np.int32)
        self._speculates = np.zeros(max_num_seqs, np.int32)

    def add(self, added_slots: Sequence[SlotAdd]) -> None:
        """Take sequences that enter slots; the draft computes their prompts beside the model."""
        for added in added_slots:
            self._speculates[added.slot] = added.max_len > 0
            self._num_missing[added.slot] = self._speculates[added.slot]

    def plain_step(self, slots: Array) -> None:
        """Note a step in which slots, (B,) int32, move on by one token without the draft."""
        self._num_missing[slots] += self._speculates[slots]

    def prompt_step(self, slots: Array) -> None:
        """Note one whose tokens run through the draft, too: what was left out before lies one token further back."""
        self._num_missing[slots] += self._num_missing[slots] > 1

    def take(self, slots: Array) -> int:
        """Return the most that is missing of one of the slots, (B,) int32, before a round with all of them."""
        most = int(self._num_missing[slots].max(initial=0))
        self._num_missing[slots] = _LEFT_OUT_BY_ROUND * self._speculates[slots]
        return most


def smallest_window(num_missing: int, windows: Sequence[int]) -> int:
    """Return the first of the windows, fewest tokens first, that covers what is missing; the last if none does."""
    return next((size for size in windows if num_missing <= size), windows[-1])


def passes_before(window: int, num_missing: int, most: int) -> list[tuple[int, int]]:
    """Return the passes over what is missing before a round's window.

    Parameters
    ----------
    most
        Tokens of each slot that a pass may take.

    Returns
    -------
    Of each, its tokens of each slot and how many tokens lie behind those; the earliest tokens first. They may take more
    than is missing: powers of two give steps of captured sizes, for which the allocator's pool has memory.
    """
    left = num_missing - window
    if left <= 0:
        return []
    size = min(1 << (left - 1).bit_length(), most)
    return [(size, behind) for behind in reversed(range(window, num_missing, size))]
