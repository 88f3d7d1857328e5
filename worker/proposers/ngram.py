"""Prompt lookup: what followed the last occurrence of the last few tokens will follow again.

From https://github.com/apoorvumang/prompt-lookup-decoding; no state but the tokens themselves.
"""

from __future__ import annotations

import numpy as np

from tpserve.worker.arrays import Array
from tpserve.worker.batch import Batch
from tpserve.worker.proposers.base import TextProposer


class NgramProposer(TextProposer):
    """Proposes from each slot's own tokens.

    Parameters
    ----------
    min_ngram, max_ngram
        Lengths of the run of last tokens that is searched for; the longest that occurred before wins.
    """

    def __init__(self, batch: Batch, min_ngram: int, max_ngram: int) -> None:
        self._batch = batch
        self._min_ngram = min_ngram
        self._max_ngram = max_ngram

    def propose(self, slots: Array, limits: Array, num_draft_tokens: int) -> Array:
        """Propose how sequences go on; see `Proposer.propose`."""
        out = np.full((len(slots), num_draft_tokens), -1, np.int32)
        for row in np.flatnonzero(limits > 0):
            slot = slots[row]
            tokens = self._batch.tokens[slot, : self._batch.num_tokens[slot]]
            found = continuation(tokens, int(limits[row]), self._min_ngram, self._max_ngram)
            out[row, : len(found)] = found
        return out


def continuation(tokens: Array, count: int, min_ngram: int, max_ngram: int) -> Array:
    """Return `count` tokens that may follow, or none.

    Where the last occurrence is so close that it runs into the end, the text is taken to repeat itself.

    Parameters
    ----------
    tokens : (n,) int32
    """
    ends, length = repeats(tokens, max_ngram)
    if length < min_ngram:
        return tokens[:0]
    period = len(tokens) - 1 - int(ends[-1])
    start = len(tokens) - period
    following: Array = tokens[start + np.arange(count) % period]
    return following


def repeats(tokens: Array, max_length: int) -> tuple[Array, int]:
    """Find the longest run of last tokens that occurred before.

    Parameters
    ----------
    tokens : (n,) int32

    Returns
    -------
    ends : (E,) int64, ascending
        Where its earlier occurrences end: none is n - 1.
    length
        Of the run, at most `max_length`; 0 if there is none.
    """
    count = len(tokens)
    if count < 2 or max_length < 1:
        return np.empty(0, np.int64), 0
    ends = np.flatnonzero(tokens[:-1] == tokens[-1])
    length = min(1, len(ends))
    while length and length < min(max_length, count - 1):
        longer = ends[ends >= length]
        longer = longer[tokens[longer - length] == tokens[-1 - length]]
        if not len(longer):
            break
        ends, length = longer, length + 1
    return ends, length
