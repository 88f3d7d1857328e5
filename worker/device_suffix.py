"""Suffix decoding on a GPU: `proposers.suffix` on the device, where the tokens of slots and of earlier sequences stand.

A round's draft tokens are one kernel's work, and a sequence that leaves is kept by another; the host sees no token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import cupy
import tvm_ffi

from tpserve.worker.device_speculation import DraftLogits, ProposerBase, Round, State
from tpserve.worker.proposers.suffix import KEPT_TOKENS


class DeviceSuffix(ProposerBase):
    """Drafts from each slot's own tokens and those of sequences that have left; see `DeviceProposer`.

    Every rank keeps the same and finds the same. What is kept is 64 KiB for all slots together.
    """

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels
        self._earlier = tuple(
            tvm_ffi.from_dlpack(cupy.zeros(count, cupy.int32))
            for count in (KEPT_TOKENS, 2)  # a ring of tokens; where the next one goes, and how many there are
        )

    def remove(self, state: State, removed_slots: Sequence[int]) -> None:
        """Queue what keeps the tokens of sequences that leave, of which the kernel skips those that did not speculate.

        It runs behind every step that was planned before the removal, also those of which the host had no result when
        it planned it. So what is kept is the prompt and all that was sampled behind it, past a stop token too: the same
        on every rank, and on CPUs, whose ranks run plans in that order as well. Of a prompt that was broken off nothing
        is kept, since `num_tokens` is 0 until it has run.
        """
        for slot in removed_slots:
            self._kernels["keep_suffix"](*state, *self._earlier, slot)

    def steps(self, state: State, run: Round) -> Iterator[DraftLogits]:
        """See DeviceProposer."""
        where = (run.token_slots, run.stride, run.num_draft_tokens)
        self._kernels["draft_suffix"](*state, *self._earlier, *where)
        return iter(())
