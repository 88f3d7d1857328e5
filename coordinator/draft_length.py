"""How many draft tokens a step verifies: a fixed number, MLC's table, or what measured times and accept rates say.

Sees results, in order, and nothing else: the same results give the same choices.
"""

from __future__ import annotations

from typing import Protocol

from tpserve.coordinator.adaptive_length import AdaptiveLength
from tpserve.coordinator.config import SchedulerConfig
from tpserve.proto.messages import StepResult

_MLC_TABLE = ((10, 4), (20, 3), (30, 2))
"""Below so many running sequences, so many draft tokens; none above (MLC-LLM, `spec_draft_length=0`)."""


class DraftLength(Protocol):
    """A rule for the draft tokens of the next step."""

    def choose(self, num_decoding: int, num_drafting: int) -> int:
        """Return the draft tokens for a step that decodes so many sequences.

        Parameters
        ----------
        num_drafting
            Of them, how many may be drafted for, one or more: the others get one token in a step whatever is chosen.
        """

    def gives_up(self, num_decoding: int) -> bool:
        """Return whether sequences that decode need not be drafted for any more, but for one in so many.

        Asked if keeping a proposer ready for them costs something, see `SchedulerConfig.drafts_cost_upkeep`.
        """

    def observe(self, result: StepResult, num_draft_tokens: int, num_drafting: int) -> None:
        """Learn from a step that was planned with so many draft tokens, for so many of its decoding sequences."""

    def forget(self, slot: int) -> None:
        """Note that a slot has another sequence now."""


class FixedLength:
    """Always the same."""

    def __init__(self, num_draft_tokens: int) -> None:
        self._num_draft_tokens = num_draft_tokens

    def choose(self, num_decoding: int, num_drafting: int) -> int:
        """See DraftLength."""
        return self._num_draft_tokens

    def gives_up(self, num_decoding: int) -> bool:
        """See DraftLength."""
        return False

    def observe(self, result: StepResult, num_draft_tokens: int, num_drafting: int) -> None:
        """See DraftLength."""

    def forget(self, slot: int) -> None:
        """See DraftLength."""


class TableLength:
    """MLC's rule: fewer the more run, and none where the tokens of all would be more than slots."""

    def __init__(self, max_num_draft_tokens: int, max_num_seqs: int) -> None:
        self._most = max_num_draft_tokens
        self._max_num_seqs = max_num_seqs

    def choose(self, num_decoding: int, num_drafting: int) -> int:
        """See DraftLength."""
        length = next((length for below, length in _MLC_TABLE if num_decoding < below), 0)
        return min(length, self._most) if num_decoding * (length + 1) <= self._max_num_seqs else 0

    def gives_up(self, num_decoding: int) -> bool:
        """See DraftLength."""
        return False

    def observe(self, result: StepResult, num_draft_tokens: int, num_drafting: int) -> None:
        """See DraftLength."""

    def forget(self, slot: int) -> None:
        """See DraftLength."""


def make_draft_length(config: SchedulerConfig) -> DraftLength:
    """Return the rule that a configuration names."""
    if config.draft_length == "auto":
        return AdaptiveLength(config.max_num_draft_tokens, config.drafts_are_sparse)
    if config.draft_length == "mlc":
        return TableLength(config.max_num_draft_tokens, config.max_num_seqs)
    return FixedLength(config.max_num_draft_tokens)
