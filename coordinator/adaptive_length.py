"""Draft lengths by a cost model: what the steps of this replica take, and what its requests accept.

The best length is the one with the most tokens for the time: sum over sequences of 1 + r + r^2 + ... + r^K, with r the
running accept rate of each, over the time that a step of this batch size takes with K draft tokens. Both are measured.
A sequence that may not be drafted for counts as one token.
A length that was never tried at a batch size is tried a few times; while none pays, that is repeated ever more rarely,
so that what it costs stays under `_TRIAL_SHARE`.

A draft model must run what plain steps have left out before it drafts again. What it takes for that is measured, too,
and a draft after plain steps must promise to repay it soon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tpserve.proto.messages import StepResult

_NUM_TIMED = 3
"""Steps of one length that are timed before its time is believed."""
_MAX_TRIAL_STEPS = 24
"""After so many steps without a believed time (the draft is still catching up), a trial is given up."""
_TIME_WEIGHT = 0.1
"""Of a step in the running time of its length."""
_OUTLIER = 3.0
"""Steps that take so many times as long as expected are not of the length's doing: page faults, other processes."""
_RATE_WEIGHT = 0.05
"""Of a draft token in its sequence's accept rate."""
_PRIOR_WEIGHT = 8.0
"""Draft tokens' worth of the replica's accept rate in that of a sequence."""
_SHARE_WEIGHT = 0.05
_MIN_SHARE = 0.75
_MIN_GAIN = 0.02
"""Another length must promise so much more, or the present one stays."""
_MIN_STAY = 8
"""Steps between changes."""
_WORTH_A_TRIAL = 0.5
"""A neighbour of the present length is tried if it promises so much of its speed."""
_TRIAL_SHARE = 0.01
"""Of time may go to trying lengths that do not pay."""
_FIRST_TRIAL_AFTER = 200
_MAX_TRIAL_AFTER = 20_000
_REPAID_WITHIN = 64
"""Plain steps' worth of time in which a longer draft must repay what it takes to begin."""
_BEGIN_WEIGHT, _BEGIN_TOLERANCE, _LEAST_BEHIND = 0.3, 0.05, 8
"""Of a measurement of that; what a step may take longer for other reasons; and plain steps over which it is spread at
least, since a part of it is the same for any number."""
_NEVER = -1_000_000_000
"""Plain steps behind, of a slot that is not."""
_GIVES_UP_AFTER = 64
"""Plain steps at a batch size before its sequences are given up."""


@dataclass(slots=True)
class _Time:
    """Running time of the steps of one length at one batch size."""

    num_steps: int = 0
    step_us: float = 0.0
    num_outliers: int = 0

    def add(self, step_us: float) -> None:
        if self.num_steps >= _NUM_TIMED and step_us > _OUTLIER * self.step_us and self.num_outliers < _NUM_TIMED:
            self.num_outliers += 1
            return
        self.num_outliers = 0
        # The first is the slowest as a rule: memory is touched for the first time.
        weight = max(_TIME_WEIGHT, 1.0 / max(1, self.num_steps))
        self.step_us += (step_us - self.step_us) * weight
        self.num_steps += 1

    @property
    def is_known(self) -> bool:
        return self.num_steps > _NUM_TIMED


@dataclass(slots=True)
class _Size:
    """What is known of one batch size."""

    times: list[_Time]
    length: int = 0
    num_stayed: int = 0
    trial: int | None = None
    """Length that is being tried."""
    num_trial_steps: int = 0
    num_since_trial: int = 0
    trial_after: int = _FIRST_TRIAL_AFTER
    begin_us: float = 0.0
    """What a round takes longer for each plain step before it, of the sequence that had most of them."""
    begun: tuple[int, float, int] | None = None
    """A round behind plain steps whose length was not timed yet: length, microseconds, and those steps."""
    tried: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Rate:
    """Running share of draft tokens that were accepted, of those that were compared."""

    accepted: float = 0.0
    compared: float = 0.0

    def add(self, accepted: int, compared: int) -> None:
        keep = (1.0 - _RATE_WEIGHT) ** compared
        self.accepted = self.accepted * keep + accepted
        self.compared = self.compared * keep + compared


@dataclass(slots=True)
class AdaptiveLength:
    """See DraftLength; chooses between 0 and `max_num_draft_tokens`."""

    max_num_draft_tokens: int
    are_sparse: bool = False
    """Whether the proposer often has nothing."""
    _share: float = 1.0
    """Running share of the draft tokens asked for that there were, if they are sparse."""
    _drafting: float = 1.0
    """Share of the decoding sequences that may be drafted for, in the step to choose for."""
    _sizes: dict[int, _Size] = field(default_factory=dict)
    _rates: dict[int, _Rate] = field(default_factory=dict)
    """By slot."""
    _overall: _Rate = field(default_factory=_Rate)
    _behind: dict[int, int] = field(default_factory=dict)
    """By slot, plain steps since it was last drafted for."""
    _most_behind: int = 0
    """Of the slots of the last step."""
    _accepted: list[float] = field(default_factory=list)
    """By length, how many draft tokens of a sequence are accepted on average; empty: to be computed of the rates."""

    def choose(self, num_decoding: int, num_drafting: int) -> int:
        """See DraftLength."""
        self._drafting = num_drafting / num_decoding
        size = self._size_of(num_decoding)
        if size.trial is None:
            size.trial = self._next_trial(size)
            size.num_trial_steps = 0
        if size.trial is not None:
            size.num_trial_steps += 1
            if not size.times[size.trial].is_known or size.num_trial_steps <= _NUM_TIMED:
                if size.num_trial_steps <= _MAX_TRIAL_STEPS:
                    return size.trial
            self._end_trial(size)
        size.num_stayed += 1
        size.num_since_trial += 1
        if size.num_stayed >= _MIN_STAY:
            best = max(range(self.max_num_draft_tokens + 1), key=lambda length: self._speed(size, length))
            least_gain = _MIN_GAIN if size.length else max(_MIN_GAIN, self._begin_steps(size) / _REPAID_WITHIN)
            if best != size.length and self._speed(size, best) > self._speed(size, size.length) * (1 + least_gain):
                size.length, size.num_stayed = best, 0
            elif size.length and self._speed(size, 0) >= self._speed(size, size.length):
                size.length, size.num_stayed = 0, 0
        return size.length

    def gives_up(self, num_decoding: int) -> bool:
        """See DraftLength: no draft has paid for a while, nor would it if every sequence was drafted for."""
        size = self._size_of(num_decoding)
        if size.length or size.trial is not None or size.num_stayed < _GIVES_UP_AFTER:
            return False
        best = max(self._speed(size, length, drafting=1.0) for length in range(1, self.max_num_draft_tokens + 1))
        return best <= self._speed(size, 0) * (1 + _MIN_GAIN)

    def observe(self, result: StepResult, num_draft_tokens: int, num_drafting: int) -> None:
        """See DraftLength."""
        if not result.slots:
            return
        drafted = result.drafted or (0,) * len(result.slots)
        counts = result.counts or (1,) * len(result.slots)
        for slot, num_drafted, count in zip(result.slots, drafted, counts, strict=True):
            if num_drafted:
                compared = min(num_drafted, count)  # what follows the first wrong one says nothing
                accepted = count - 1
                self._rates.setdefault(slot, _Rate()).add(accepted, compared)
                self._overall.add(accepted, compared)
                self._accepted.clear()
        num_running = sum(count > 0 for count in counts)
        if result.num_tokens != num_running + sum(drafted):
            return  # prompts ran beside
        # Only those that speculate may be at their end.
        most = num_draft_tokens * (num_drafting - (len(counts) - num_running))
        share = sum(drafted) / most if most > 0 else 1.0
        behind = self._note_behind(result.slots, drafted, is_round=num_draft_tokens > 0)
        if self.are_sparse:
            self._share += (share - self._share) * _SHARE_WEIGHT if num_draft_tokens else 0.0
        elif share < _MIN_SHARE:
            return  # the draft is still catching up, which the other steps do not have to pay
        if num_running:
            self._time(self._size_of(num_running), num_draft_tokens, float(result.step_us), behind)

    def _note_behind(self, slots: Sequence[int], drafted: Sequence[int], *, is_round: bool) -> int:
        """Count a step; return for how many plain steps one of its slots had not been drafted for before it."""
        most = max(self._behind.get(slot, 0) for slot in slots)
        for slot, num_drafted in zip(slots, drafted, strict=True):
            if is_round:  # who gets nothing, and may be one that is never drafted for, is not behind until it does
                self._behind[slot] = 0 if num_drafted else _NEVER
            else:
                self._behind[slot] = self._behind.get(slot, 0) + 1
        self._most_behind = 0 if is_round else max(0, most + 1)
        return max(0, most)

    def _time(self, size: _Size, length: int, step_us: float, behind: int) -> None:
        """Take in what a step took: of its length, or if it is a round behind plain steps, of beginning."""
        time = size.times[length]
        if length and behind:
            size.begun = length, step_us, behind
            time.num_steps = max(time.num_steps, 1)  # the first, of which nothing is kept anyway
        else:
            time.add(step_us)
        if size.begun is not None and time.is_known and size.begun[0] == length:
            _, begun_us, num_steps = size.begun
            longer_us = max(0.0, begun_us - time.step_us * (1 + _BEGIN_TOLERANCE)) / max(num_steps, _LEAST_BEHIND)
            size.begin_us += (longer_us - size.begin_us) * (_BEGIN_WEIGHT if size.begin_us else 1.0)
            size.begun = None

    def _begin_steps(self, size: _Size) -> float:
        """Return in how many plain steps' time the draft would run what it has left out."""
        return size.begin_us * self._most_behind / max(1.0, size.times[0].step_us)

    def forget(self, slot: int) -> None:
        """See DraftLength."""
        self._rates.pop(slot, None)
        self._behind.pop(slot, None)
        self._accepted.clear()

    def _size_of(self, num_decoding: int) -> _Size:
        """Sizes that differ by less than a factor of two share what is known."""
        bucket = (
            max(1, num_decoding).bit_length() if num_decoding & (num_decoding - 1) else num_decoding.bit_length() - 1
        )
        if bucket not in self._sizes:
            self._sizes[bucket] = _Size([_Time() for _ in range(self.max_num_draft_tokens + 1)])
        return self._sizes[bucket]

    def _next_trial(self, size: _Size) -> int | None:
        """Return a length to be tried now: plain steps, then one draft token, which is cheap and tells of others."""
        if not size.times[0].is_known:
            return 0
        if 1 not in size.tried:
            return 1
        # Times bend where arithmetic takes over from memory: what the line promises of a neighbour is only a guess.
        least = self._speed(size, size.length) * _WORTH_A_TRIAL
        for length in (size.length + 1, size.length - 1):
            if 0 < length <= self.max_num_draft_tokens and length not in size.tried:
                if self._speed(size, length) >= least:
                    return length
        if size.length == 0 and size.num_since_trial >= size.trial_after + self._begin_steps(size) / _TRIAL_SHARE:
            return max(range(1, self.max_num_draft_tokens + 1), key=lambda length: self._speed(size, length))
        return None

    def _end_trial(self, size: _Size) -> None:
        length = size.trial
        assert length is not None
        size.tried.add(length)
        size.trial, size.num_since_trial, size.num_stayed = None, 1, _MIN_STAY
        if length and self._speed(size, length) <= self._speed(size, 0) * (1 + _MIN_GAIN):
            # What the trial cost beyond plain steps must stay a small share of the steps until the next one.
            extra = max(0.0, self._step_us(size, length) / max(1.0, size.times[0].step_us) - 1.0) * size.num_trial_steps
            size.trial_after = min(max(2 * size.trial_after, int(extra / _TRIAL_SHARE)), _MAX_TRIAL_AFTER)
        elif length:
            size.trial_after = _FIRST_TRIAL_AFTER

    def _speed(self, size: _Size, length: int, drafting: float | None = None) -> float:
        """Tokens of one sequence for a microsecond; 0 if nothing is known.

        Parameters
        ----------
        drafting
            Share of the sequences that are drafted for; None: as in the step to choose for.
        """
        step_us = self._step_us(size, length)
        return self._tokens(length, self._drafting if drafting is None else drafting) / step_us if step_us else 0.0

    def _step_us(self, size: _Size, length: int) -> float:
        """Return the time of a step: measured, or on the line through the measured ones around or below it."""
        if size.times[length].is_known or length == 0:
            return size.times[length].step_us
        known = [k for k in range(1, self.max_num_draft_tokens + 1) if size.times[k].is_known]
        if not known:
            return 0.0
        above = next((k for k in known if k > length), known[-1])
        below = max((k for k in known if k < above and k < length), default=0)
        low, high = size.times[below].step_us, size.times[above].step_us
        return low + (high - low) * (length - below) / (above - below)

    def _tokens(self, length: int, drafting: float) -> float:
        """Return the tokens that a sequence can expect of one step, on average over those that run."""
        if not self._accepted:
            self._accepted = self._expect_accepted()
        return 1.0 + drafting * self._share * self._accepted[length]

    def _expect_accepted(self) -> list[float]:
        overall = self._overall.accepted / self._overall.compared if self._overall.compared else 1.0
        rates = [
            (rate.accepted + _PRIOR_WEIGHT * overall) / (rate.compared + _PRIOR_WEIGHT) for rate in self._rates.values()
        ] or [overall]
        accepted, powers = [0.0], rates
        for _ in range(self.max_num_draft_tokens):
            accepted.append(accepted[-1] + sum(powers) / len(rates))
            powers = [power * rate for power, rate in zip(powers, rates, strict=True)]
        return accepted
