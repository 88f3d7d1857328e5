"""How far decoding sequences have come, which of them need a page for a step, and which are at their end.

Without speculation every step gives every decoding sequence one token: progress is a function of the step, and two
calendars, keyed by step, name those for which something changes. With it a step gives one token and as many more as
draft tokens were accepted, which is not known when the next plan is made: then each sequence has an upper bound, which
is taken back when the result comes, and a step looks at every decoding sequence.
"""

from __future__ import annotations

from typing import Protocol

from tpserve.coordinator.request import Sequence
from tpserve.coordinator.sequence_list import SequenceList
from tpserve.coordinator.step_calendar import StepCalendar


class DecodeProgress(Protocol):
    """Keeps the sequences that decode, from the step of their last chunk on."""

    def begin(self, sequence: Sequence, step: int) -> None:
        """Take in a sequence whose last chunk is planned in `step`, which also samples one token of it."""

    def leave(self, sequence: Sequence) -> None:
        """Forget a sequence that decodes no more."""

    def num_computed(self, sequence: Sequence, step: int) -> int:
        """Return how many tokens have KV that stays, by the plans made up to `step`."""

    def due(self, step: int, num_draft_tokens: int) -> list[Sequence]:
        """Return, in arrival order, the sequences that may write past their page table in a step."""

    def num_missing_pages(self, sequence: Sequence, num_draft_tokens: int) -> int:
        """Return how many pages one of those needs."""

    def granted(self, sequence: Sequence) -> None:
        """Note that one of those has its pages."""

    def plan(self, step: int, num_draft_tokens: int) -> None:
        """Note that every sequence here decodes in a step."""

    def credited(self, sequence: Sequence) -> None:
        """Note that the result of a sequence's oldest step in flight has come."""

    def take_ended(self, step: int) -> list[Sequence]:
        """Return the sequences whose last token is sampled in a step at the latest."""

    def clear(self) -> None:
        """Forget everything: the workers start with an empty batch."""

    def check_integrity(self, num_decoding: int) -> None:
        """Raise AssertionError unless as many sequences are kept."""


class StepProgress:
    """One token a step. While DECODING, a sequence is not touched until it needs a page or ends.

        step             s (last chunk)     s + 1       s + 2
        computes KV of   ..., L - 1         L           L + 1       = decode_base + step - 1
        samples token    L                  L + 1       L + 2       = decode_base + step

    with L the number of tokens known when the last chunk was planned, and decode_base = L - s.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._pages = StepCalendar()
        self._ends = StepCalendar()

    def begin(self, sequence: Sequence, step: int) -> None:
        """See DecodeProgress."""
        sequence.decode_base = len(sequence.tokens) - step
        sequence.last_step = sequence.max_len - 1 - sequence.decode_base
        self._ends.add(sequence.last_step, sequence)
        self.granted(sequence)

    def leave(self, sequence: Sequence) -> None:
        """See DecodeProgress."""
        self._pages.discard(sequence.next_page_step, sequence)
        self._ends.discard(sequence.last_step, sequence)

    def num_computed(self, sequence: Sequence, step: int) -> int:
        """See DecodeProgress."""
        return sequence.decode_base + step

    def due(self, step: int, num_draft_tokens: int) -> list[Sequence]:
        """See DecodeProgress."""
        return self._pages.pop(step)

    def num_missing_pages(self, sequence: Sequence, num_draft_tokens: int) -> int:
        """See DecodeProgress."""
        return 1

    def granted(self, sequence: Sequence) -> None:
        """See DecodeProgress."""
        num_tokens = len(sequence.page_ids) * self._page_size
        sequence.next_page_step = num_tokens - sequence.decode_base + 1  # the step that computes token `num_tokens`
        if sequence.next_page_step <= sequence.last_step:
            self._pages.add(sequence.next_page_step, sequence)

    def plan(self, step: int, num_draft_tokens: int) -> None:
        """See DecodeProgress."""

    def credited(self, sequence: Sequence) -> None:
        """See DecodeProgress."""

    def take_ended(self, step: int) -> list[Sequence]:
        """See DecodeProgress."""
        return self._ends.pop(step)

    def clear(self) -> None:
        """See DecodeProgress."""
        self._pages.clear()
        self._ends.clear()

    def check_integrity(self, num_decoding: int) -> None:
        """See DecodeProgress."""
        num_due = len(self._ends), len(self._pages)
        assert num_due[0] == num_decoding >= num_due[1], f"{num_decoding} decode, {num_due} in calendars"


class BoundedProgress:
    """Up to `1 + num_draft_tokens` tokens a step, of which at least one is sampled until the sequence is full."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._decoding = SequenceList()

    def begin(self, sequence: Sequence, step: int) -> None:
        """See DecodeProgress."""
        assert not sequence.planned, "a sequence runs again before its results are known"
        sequence.planned.append(1)
        self._decoding.add(sequence)

    def leave(self, sequence: Sequence) -> None:
        """See DecodeProgress."""
        self._decoding.remove(sequence)

    def num_computed(self, sequence: Sequence, step: int) -> int:
        """See DecodeProgress.

        Positions of confirmed tokens but the last: whatever is in flight writes behind them.
        """
        return len(sequence.tokens) - 1

    def due(self, step: int, num_draft_tokens: int) -> list[Sequence]:
        """See DecodeProgress."""
        return [sequence for sequence in self._decoding if self.num_missing_pages(sequence, num_draft_tokens) > 0]

    def num_missing_pages(self, sequence: Sequence, num_draft_tokens: int) -> int:
        """See DecodeProgress."""
        ahead = sum(sequence.planned) + (num_draft_tokens if sequence.speculates else 0)
        num_written = min(len(sequence.tokens) + ahead, sequence.max_len - 1)  # the last token is never computed
        return -(-num_written // self._page_size) - len(sequence.page_ids)

    def granted(self, sequence: Sequence) -> None:
        """See DecodeProgress."""

    def plan(self, step: int, num_draft_tokens: int) -> None:
        """See DecodeProgress."""
        for sequence in self._decoding:
            sequence.planned.append(1 + num_draft_tokens if sequence.speculates else 1)

    def credited(self, sequence: Sequence) -> None:
        """See DecodeProgress."""
        sequence.planned.popleft()

    def take_ended(self, step: int) -> list[Sequence]:
        """See DecodeProgress."""
        return [
            sequence
            for sequence in self._decoding
            if len(sequence.tokens) + len(sequence.planned) >= sequence.max_len  # each step samples one or more
        ]

    def clear(self) -> None:
        """See DecodeProgress."""
        self._decoding.clear()

    def check_integrity(self, num_decoding: int) -> None:
        """See DecodeProgress."""
        assert len(self._decoding) == num_decoding, f"{num_decoding} decode, {len(self._decoding)} have a bound"
