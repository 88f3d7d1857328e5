"""When the next step is planned, while another runs. Pure.

A step that is planned as soon as it may be waits at the ranks until the one before it ends, and whoever comes
meanwhile is in neither. Planned late, it takes them in, and knows who has ended. So the next plan is made when what is
in flight is about to end: ahead by the time that coordinator and ranks need until it is queued on the device. What a
step takes is known from the last ones of its size, or else from what ranks said when they started, without attention:
too short rather than too long. A step that ends earlier than expected is followed at once.

Llama-3-70B, fp8, TP=4, on H200s: mean TTFT 63 -> 54 ms at 64 requests and 35 -> 33 at 16, mean TPOT 11.46 -> 11.48 and
6.92 -> 6.91 (benchmarks/README.md).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tpserve.coordinator.step_sizes import StepSizes
from tpserve.proto.rank import SizeTime

_REMEMBERED = 8
"""Steps of a size, of which the shortest is expected again: those that run grow by a token a step."""
_LATER_S = 4e-6
"""By which plans are made later after a step: so long do devices wait for them in a step, on average. With 10 us first
tokens came no sooner (`clock_serving.py`)."""
_BETWEEN_S = 1e-5
"""What a GPU has nothing to do between two steps that were queued in time is less: 2 to 9 us."""
_EXPECTANT_STEPS = 64
"""Steps after an arrival in which that is done: where nobody comes while steps run, no device is to wait."""
_SOONER_S = 0.0005
"""By which they are made earlier at most after one for which a device had to wait: for as long as it had to, and the
plan had been held back. What waits are there whatever is done moves nothing."""
_FIRST_LEAD_S, _MOST_LEAD_S = 0.003, 0.02
"""Of a group that has just begun, and at most; chosen, not swept."""


@dataclass(frozen=True, slots=True)
class StepSize:
    """How large a plan is."""

    num_tokens: int
    """Padding for draft tokens included."""
    has_prompts: bool
    num_draft_tokens: int = 0


@dataclass(slots=True)
class _InFlight:
    size: StepSize
    step_s: float
    """Expected."""
    held_s: float
    """For which its plan waited."""


class StepPace:
    """Tells for how long the next plan may wait. All times are of one clock, in seconds.

    Parameters
    ----------
    lead_s
        Time from a plan to its step that is always left; more is, where devices had to wait for plans. Infinite: plans
        wait for nothing.
    """

    def __init__(self, lead_s: float) -> None:
        self._least_lead_s = lead_s
        self.begin_group(())

    def begin_group(self, times: Sequence[SizeTime]) -> None:
        """Take in what steps of each size take on new ranks; of none, plans wait for nothing."""
        self.lead_s = max(self._least_lead_s, _FIRST_LEAD_S)
        self._known = bool(times)
        self._expectant_steps = 0
        self._sizes = {
            has_prompts: StepSizes([each for each in times if each.decode_only is not has_prompts])
            for has_prompts in (False, True)
        }
        self._recent: dict[StepSize, deque[float]] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._held_since = math.inf
        """When the next plan was first told to wait."""
        self._ends_at = 0.0
        """Of the oldest."""

    @property
    def waits(self) -> bool:
        """Whether plans wait for anything."""
        return self._known and math.isfinite(self._least_lead_s)

    def arrived(self) -> None:
        """Note a request."""
        if self._in_flight:
            self._expectant_steps = _EXPECTANT_STEPS

    def planned(self, size: StepSize, now: float) -> None:
        """Note a plan that has been sent."""
        size = self._padded(size)
        step = _InFlight(size, self._expected_s(size), max(0.0, now - self._held_since))
        self._held_since = math.inf
        if not self._in_flight:
            self._ends_at = now + step.step_s
        self._in_flight.append(step)

    def ended(self, step_us: int, gap_us: int | None, now: float) -> None:
        """Note the result of the oldest step in flight.

        Parameters
        ----------
        gap_us
            For which the device had nothing to do before it; None if there had been nothing to plan.
        """
        step = self._in_flight.popleft()
        if self._in_flight:
            self._ends_at = now + self._in_flight[0].step_s
        if step_us:
            self._recent.setdefault(step.size, deque(maxlen=_REMEMBERED)).append(step_us / 1e6)
        waited_s = max(0.0, (gap_us or 0) / 1e6 - _BETWEEN_S)
        lead_s = self.lead_s + min(waited_s, step.held_s, _SOONER_S)
        if self._expectant_steps:
            self._expectant_steps -= 1
            lead_s -= _LATER_S
        self.lead_s = max(min(lead_s, _MOST_LEAD_S), self._least_lead_s)

    def wait_s(self, now: float, *, may_plan: bool = True) -> float:
        """Return for how long the next plan may wait: whole milliseconds, since an event loop's timers round up.

        Parameters
        ----------
        may_plan
            Whether it could be made now. Only then is it held back.
        """
        if not self.waits or not self._in_flight:
            return 0.0
        others_s = sum(step.step_s for step in self._in_flight) - self._in_flight[0].step_s
        left_ms = (self._ends_at + others_s - self.lead_s - now) * 1e3
        if left_ms < 1.0:
            return 0.0
        if may_plan:
            self._held_since = min(self._held_since, now)
        return math.floor(left_ms) / 1e3

    def _padded(self, size: StepSize) -> StepSize:
        """Return the size that is captured: all steps of one take as long."""
        sizes = self._sizes[size.has_prompts]
        place = None if size.num_draft_tokens else sizes.place(size.num_tokens)
        return size if place is None else StepSize(sizes.sizes[place], size.has_prompts)

    def _expected_s(self, size: StepSize) -> float:
        if recent := self._recent.get(size):
            return min(recent)
        return 0.0 if size.num_draft_tokens else self._sizes[size.has_prompts].us(size.num_tokens) / 1e6
