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
