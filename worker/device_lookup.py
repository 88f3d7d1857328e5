"""Prompt lookup on a GPU: what followed the last few tokens before will follow again; `proposers.ngram` on the device.

A round's draft tokens are one kernel's work over the slots' tokens, which stand on the device; the host sees none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tpserve.proto.speculation import Speculation
from tpserve.worker.device_speculation import DraftLogits, ProposerBase, Round, State


class DeviceLookup(ProposerBase):
    """Drafts from each slot's own tokens; see `DeviceProposer`. Every rank finds the same, and nothing is kept."""

    def __init__(self, speculation: Speculation, kernels: Any) -> None:
        self._lengths = (speculation.min_ngram, speculation.max_ngram)
        self._kernels = kernels

    def steps(self, state: State, run: Round) -> Iterator[DraftLogits]:
        """See DeviceProposer."""
        where = (run.token_slots, run.stride, run.num_draft_tokens)
        self._kernels["draft_lookup"](*state, *where, *self._lengths)
        return iter(())
