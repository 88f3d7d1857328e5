"""Whose steps verify draft tokens, and how many: what the scheduler knows about speculation."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.draft_length import DraftLength, make_draft_length
from tpserve.coordinator.request import Request, Sequence, SequenceStatus
from tpserve.proto.messages import StepResult

_WITNESS_INTERVAL = 16
"""Of so many sequences one is drafted for even where drafts do not pay."""


class Drafting:
    """The draft lengths of a scheduler's steps; without speculation always zero.

    Parameters
    ----------
    rule
        In place of the one that the configuration names.

    Attributes
    ----------
    num_drafting : int
        Of the decoding sequences, those that may be drafted for.
    """

    def __init__(self, config: SchedulerConfig, rule: DraftLength | None = None) -> None:
        self._config = config
        self._rule = rule or make_draft_length(config)
        self._planned: deque[tuple[int, int]] = deque()
        """Of each step in flight, its draft tokens, and how many sequences they are for."""
        self.num_drafting = 0

    def may_draft_for(self, request: Request) -> bool:
        """Return whether draft tokens can be verified for a request's sequences."""
        sampling = request.sampling
        if not self._config.max_num_draft_tokens or sampling.wants_hidden:
            return False
        return not self._config.drafts_on_device or (request.grammar is None and not sampling.needs_output_history)

    def begin(self, sequence: Sequence) -> None:
        """Count a sequence that decodes from now on."""
        self.num_drafting += sequence.speculates

    def leave(self, sequence: Sequence) -> None:
        """Count a sequence that decodes no more."""
        self.num_drafting -= sequence.speculates

    def start(self, slot: int) -> None:
        """Note that a slot has another sequence now."""
        self._rule.forget(slot)

    def choose(self, num_decoding: int, has_prompts: bool) -> int:
        """Return the draft tokens of the next step: what the rule says, as far as the token budget goes.

        Half of the budget is kept for prompts while there are any. Sequences that may not be drafted for get one token
        in the same step; where there are no others, it is a plain one.

        Parameters
        ----------
        has_prompts
            Whether the step may run tokens of prompts.
        """
        if not self.num_drafting:
            return 0
        budget = self._config.max_num_batched_tokens
        if has_prompts:
            if self._config.drafts_on_device:
                return 0
            budget //= 2
        most = budget // num_decoding - 1  # on a device, each decoding slot has as many rows
        return max(0, min(self._rule.choose(num_decoding, self.num_drafting), most))

    def give_up(self, num_decoding: int, running: Iterable[Sequence]) -> tuple[int, ...]:
        """Draft no more for decoding sequences, where the rule says so; return their slots.

        One in `_WITNESS_INTERVAL` goes on: its drafts show when they begin to pay. A sequence that starts again is
        drafted for again.
        """
        if not self._config.drafts_cost_upkeep or not self.num_drafting or not self._rule.gives_up(num_decoding):
            return ()
        slots: list[int] = []
        for sequence in running:
            is_drafted = sequence.status is SequenceStatus.DECODING and sequence.speculates
            if is_drafted and sequence.order % _WITNESS_INTERVAL:
                assert sequence.slot is not None
                sequence.speculates = False
                slots.append(sequence.slot)
        self.num_drafting -= len(slots)
        return tuple(slots)

    def plan(self, num_draft_tokens: int) -> None:
        """Note the draft tokens of a step that is sent."""
        self._planned.append((num_draft_tokens, self.num_drafting))

    def observe(self, result: StepResult) -> None:
        """Learn from the oldest step in flight."""
        self._rule.observe(result, *self._planned.popleft())

    def clear(self) -> None:
        """Forget what is in flight and who decodes: the workers start with an empty batch."""
        self._planned.clear()
        self.num_drafting = 0
