"""Proposals of a draft that has ranks of its own: they come over TCP, and what steps emitted goes back."""

from __future__ import annotations

from tpserve.worker.arrays import Array
from tpserve.worker.draft_link import TargetEnd
from tpserve.worker.proposers.base import TextProposer


class RemoteProposer(TextProposer):
    """Waits for what the draft's first rank sends to every rank of the model, so all verify the same."""

    def __init__(self, drafts: TargetEnd) -> None:
        self._drafts = drafts
        self._step_id = 0

    def begin(self, step_id: int) -> None:
        """Learn which step the calls that follow belong to."""
        self._step_id = step_id

    def propose(self, slots: Array, limits: Array, num_draft_tokens: int) -> Array:
        """Return what the draft proposes; see `Proposer.propose`.

        Raises
        ------
        TimeoutError, ConnectionError
            If nothing comes in time, or the draft's rank has gone; names it.
        """
        return self._drafts.proposals(self._step_id, slots, num_draft_tokens)

    def emitted(self, slots: Array, token_ids: Array, counts: Array) -> None:
        """Tell the draft's ranks, if this is the model's first."""
        self._drafts.tell(self._step_id, slots, token_ids, counts)

    def close(self) -> None:
        """Leave the draft's ranks."""
        self._drafts.close()
