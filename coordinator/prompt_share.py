"""How many tokens a step takes, where prompts wait beside decodes. Pure.

Every token of a prompt delays all who decode, but not by as much in each size of a step: weights are read anyway, so
the first tokens cost little more than nothing; then arithmetic counts, and tiles of products fit one size better than
another. On the other hand, who waits loses all of a step's time. So a step has the size with which all together lose
least until the prompts that wait are computed, by what steps of each size take.

On Llama-3-70B, fp8, TP=4, H200s, who waits at twice the weight, instead of all that fits: mean TPOT 11.93 -> 11.60 ms
at 64 requests and 6.99 -> 6.92 at 16, the p99 of gaps 26 -> 21 and 24 -> 16 ms, mean TTFT 58.5 -> 73.8 and 32.8 ->
36.0. At four times, TTFT was close to what it was. Since small steps of prompts cost less, it is six times
(benchmarks/README.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from tpserve.coordinator.step_sizes import StepSizes
from tpserve.proto.rank import SizeTime


class PromptShare:
    """Chooses the size of a step.

    Parameters
    ----------
    max_num_tokens
        Of a step.
    wait_weight
        Of the time that a prompt waits, over that by which a decode is delayed.
    """

    __slots__ = ("_decodes", "_max_num_tokens", "_mixed", "_wait_weight")

    def __init__(self, max_num_tokens: int, wait_weight: float) -> None:
        self._max_num_tokens = max_num_tokens
        self._wait_weight = wait_weight
        self.learn(())

    def learn(self, times: Sequence[SizeTime]) -> None:
        """Take in what steps of each size take; of none, a step takes all that fits."""
        self._decodes = StepSizes([each for each in times if each.decode_only])
        self._mixed = StepSizes([each for each in times if not each.decode_only])

    @property
    def knows_times(self) -> bool:
        """Whether there is anything to choose by."""
        return bool(self._mixed.sizes)

    def num_tokens(self, num_decoding: int, num_prompts: int, num_waiting: int) -> int:
        """Return the tokens of a step, decodes among them.

        Parameters
        ----------
        num_prompts
            That could be computed, at least one.
        num_waiting
            Their tokens.
        """
        alone_us = self._decodes.us(num_decoding) if num_decoding else 0
        waiters = self._wait_weight * num_prompts

        def lost(step_us: int) -> float:
            return num_decoding * (step_us - alone_us) + waiters * step_us

        best, least = self._max_num_tokens, float("inf")
        for size, step_us in zip(self._mixed.sizes, self._mixed.step_us, strict=True):
            if size <= num_decoding:
                continue
            num_steps, rest = divmod(num_waiting, size - num_decoding)
            cost = num_steps * lost(step_us) + (lost(self._mixed.us(num_decoding + rest)) if rest else 0.0)
            if cost < least:
                best, least = size, cost
        return best
