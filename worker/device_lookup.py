"""Prompt lookup on a GPU: what followed the last few tokens before will follow again; `proposers.ngram` on the device.

A round's draft tokens are one kernel's work over the slots' tokens, which stand on the device; the host sees none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tpserve.proto.messages import SlotAdd
from tpserve.proto.speculation import Speculation
from tpserve.worker.arrays import Array
from tpserve.worker.device_speculation import DraftLogits, Round, State


class DeviceLookup:
    """Drafts from each slot's own tokens; see `DeviceProposer`. Every rank finds the same, and nothing is kept."""

    logits_by_rank = False

    def __init__(self, speculation: Speculation, kernels: Any) -> None:
        self._lengths = (speculation.min_ngram, speculation.max_ngram)
        self._kernels = kernels

    def add(self, added_slots: Sequence[SlotAdd], stream: Any) -> None:
        """See DeviceProposer."""

    def remove(self, state: State, removed_slots: Sequence[int]) -> None:
        """See DeviceProposer."""

    def plain_step(self, decoding: Array) -> None:
        """See DeviceProposer."""

    def catch_up(self, state: State, decoding: Array, run: Round) -> None:
        """See DeviceProposer."""

    def steps(self, state: State, run: Round) -> Iterator[DraftLogits]:
        """See DeviceProposer."""
        where = (run.token_slots, run.stride, run.num_draft_tokens)
        self._kernels["draft_lookup"](*state, *where, *self._lengths)
        return iter(())
