"""Whose prompt a step computes next."""

from __future__ import annotations

from collections.abc import Iterable

from tpserve.coordinator.request import Sequence


def prompts_in_turn(sequences: Iterable[Sequence], step: int, patience_steps: int) -> list[Sequence]:
    """Order sequences that have begun their prompts or wait to.

    The shortest first: a few tokens need not wait behind thousands, and the mean time to the first token is least. But
    who came `patience_steps` ago, or lost its place, goes before all that came later, so nobody is passed for long.
    What a waiting prompt will find computed is not known yet and counts as still to be computed.
    """

    def turn(sequence: Sequence) -> tuple[bool, int, int]:
        if sequence.has_run or step - sequence.waiting_since_step >= patience_steps:
            return False, 0, sequence.order
        return True, len(sequence.tokens) - sequence.num_computed_tokens, sequence.order

    return sorted(sequences, key=turn)
