"""How far a draft on a GPU is behind the slots that it drafts for, as the host counts it. Plain numpy.

Hangs on plans alone, so that all ranks count the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tpserve.proto.messages import SlotAdd
from tpserve.worker.arrays import Array


class DraftLag:
    """Plain steps without prompts, by slot, since the draft last ran for it.

    Slots that do not speculate are never behind: the draft computes nothing for them, however long they decode.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._num_steps = np.zeros(max_num_seqs, np.int32)
        self._speculates = np.zeros(max_num_seqs, np.int32)

    def add(self, added_slots: Sequence[SlotAdd]) -> None:
        """Take sequences that enter slots; the draft computes their prompts beside the model."""
        for added in added_slots:
            self._num_steps[added.slot] = 0
            self._speculates[added.slot] = added.max_len > 0

    def plain_step(self, slots: Array) -> None:
        """Note a step in which slots, (B,) int32, move on by one token without the draft."""
        self._num_steps[slots] += self._speculates[slots]

    def take(self, slots: Array) -> int:
        """Return the most steps that one of the slots, (B,) int32, is behind, before a round with all of them."""
        most = int(self._num_steps[slots].max(initial=0))
        self._num_steps[slots] = 0
        return most
