"""How many tokens a step takes, where prompts wait beside decodes. Pure.

Every token of a prompt delays all who decode, but not by as much in each size of a step: weights are read anyway, so
the first tokens cost little more than nothing; then arithmetic counts, and tiles of products fit one size better than
another. So a step takes the size in which a token of a prompt costs least. Where so many wait that they would not be
done within `catch_up_steps` of those, it takes as much as that asks for: whoever waits is not to pay for whoever
decodes.

On Llama-3-70B, fp8, TP=4, simulated with measured steps (`benchmarks/prompt_order.py`), instead of all that fits: mean
TPOT 11.64 -> 11.38 ms at 64 requests and 7.01 -> 6.97 at 16, p99 of gaps there 23 -> 14 ms, mean TTFT 56 -> 61 and
31 -> 35 ms.
"""

from __future__ import annotations

from collections.abc import Sequence

from tpserve.proto.rank import SizeTime


class PromptShare:
    """Chooses the size of a step.

    Parameters
    ----------
    max_num_tokens
        Of a step.
    catch_up_steps
        In which prompts that wait are to be computed.
    """

    __slots__ = ("_catch_up_steps", "_decodes", "_max_num_tokens", "_mixed")

    def __init__(self, max_num_tokens: int, catch_up_steps: int) -> None:
        self._max_num_tokens = max_num_tokens
        self._catch_up_steps = catch_up_steps
        self._decodes: list[tuple[int, int]] = []
        """Tokens and microseconds, smallest first; the same of steps with prompts."""
        self._mixed: list[tuple[int, int]] = []

    def learn(self, times: Sequence[SizeTime]) -> None:
        """Take in what steps of each size take; of none, a step takes all that fits."""
        self._decodes = sorted((each.num_tokens, each.step_us) for each in times if each.decode_only)
        self._mixed = sorted((each.num_tokens, each.step_us) for each in times if not each.decode_only)

    @property
    def is_bounded(self) -> bool:
        """Whether sizes differ in what they cost, as far as is known."""
        return bool(self._mixed) and self._catch_up_steps > 0

    def num_tokens(self, num_decoding: int, num_waiting: int) -> int:
        """Return the tokens of a step, decodes among them.

        Parameters
        ----------
        num_waiting
            Tokens of prompts that could be computed.
        """
        sizes = [size for size in self._mixed if size[0] > num_decoding]
        if not sizes or not self._catch_up_steps:
            return self._max_num_tokens
        alone_us = next((us for tokens, us in self._decodes if tokens >= num_decoding), 0) if num_decoding else 0
        # Of sizes that cost the same, the largest.
        best, _ = min(sizes, key=lambda size: ((size[1] - alone_us) / (size[0] - num_decoding), -size[0]))
        needed = num_decoding - (-num_waiting // self._catch_up_steps)
        if needed <= best:
            return best
        return next((tokens for tokens, _ in sizes if tokens >= needed), self._max_num_tokens)
