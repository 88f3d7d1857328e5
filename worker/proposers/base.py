"""What every source of draft tokens offers, and what it may read."""

from __future__ import annotations

from typing import Any, Protocol

from tpserve.collectives.cpu import CollectiveStats
from tpserve.proto.messages import SlotAdd
from tpserve.worker.arrays import Array
from tpserve.worker.batch import StepArrays


class Proposer(Protocol):
    """Guesses how the sequences of some slots go on. Never wrong, only useless: the target verifies each token.

    It reads the tokens of a slot in `Batch.tokens` and their number in `Batch.num_tokens`. Every rank proposes the
    same, from the same plans. The order of calls in a step: `begin`; `give_up`, `remove`, `add` and `grow` as the plan
    says, before the batch takes it; `propose`, if the step verifies drafts; `emitted`, if it ran tokens; `settle`, if
    it proposed; `computed`, if it ran tokens.

    A draft model (`draft.DraftModel`) needs tokens alone, and looks back at them whenever it is asked. An EAGLE-3 head
    (`eagle.EagleHead`) needs the target's hidden rows besides, which are there once: in `computed`, for all tokens of a
    step, those of prompts and of plain steps too. Both keep KV under the target's page table, and flags of the pages
    that have it; neither knows how drafts are verified, which in turn knows no proposer.
    """

    def begin(self, step_id: int) -> None:
        """Learn which step the calls that follow belong to."""

    def add(self, added: SlotAdd) -> None:
        """Take a sequence that enters the batch, whether it speculates or not."""

    def give_up(self, slot: int) -> None:
        """Learn that a sequence which decodes is never asked about again: it need not be kept up with."""

    def grow(self, page: int) -> None:
        """Take a fresh page that is put at the end of some slot's table."""

    def remove(self, slot: int) -> None:
        """Let a sequence go; its tokens can still be read."""

    def propose(self, slots: Array, limits: Array, num_draft_tokens: int) -> Array:
        """Propose how sequences go on.

        Parameters
        ----------
        slots : (B,) int32
            That decode, those that have decoded longest first.
        limits : (B,) int32
            Most tokens for each, at most `num_draft_tokens`.

        Returns
        -------
        (B, num_draft_tokens) int32
            Token ids; -1 from where nothing is proposed on.
        """

    def emitted(self, slots: Array, token_ids: Array, counts: Array) -> None:
        """Learn what a step emitted, whether it verified drafts or not; it stands in the batch.

        Parameters
        ----------
        slots : (N,) int32
            All that were sampled.
        token_ids : (N, W) int32, counts : (N,) int32
            Of each slot the first `counts` tokens were emitted.
        """

    def computed(self, arrays: StepArrays, aux: Any) -> None:
        """Learn which tokens a step ran; what it emitted stands in the batch, and those behind that are void.

        Parameters
        ----------
        arrays
            Of the step.
        aux : tensor (T, layers * hidden size) float32, or None
            Of each of its tokens, the residual stream before the `Manifest.aux_layers`; good until the next step. None
            if the target's library has none.
        """

    def settle(self, slots: Array) -> None:
        """Learn that tokens were emitted for the slots given to `propose`, and stand in the batch."""

    def collective_totals(self) -> dict[str, CollectiveStats]:
        """Return what was done in collectives since the start, by kind."""

    def close(self) -> None:
        """Free what is held outside this process."""


class TextProposer:
    """What proposers that only look at tokens need not do."""

    def begin(self, step_id: int) -> None:
        """Nothing is kept by step."""

    def add(self, added: SlotAdd) -> None:
        """Nothing is kept by slot."""

    def give_up(self, slot: int) -> None:
        """Nothing is kept by slot."""

    def grow(self, page: int) -> None:
        """Nothing is kept by page."""

    def remove(self, slot: int) -> None:
        """Nothing is kept by slot."""

    def emitted(self, slots: Array, token_ids: Array, counts: Array) -> None:
        """Tokens are read in the batch when they are needed."""

    def computed(self, arrays: StepArrays, aux: Any) -> None:
        """Hidden rows say nothing to it."""

    def settle(self, slots: Array) -> None:
        """Nothing is kept by token: they are read when they are needed."""

    def collective_totals(self) -> dict[str, CollectiveStats]:
        """Return nothing: ranks need not talk."""
        return {}

    def close(self) -> None:
        """Nothing is held."""
