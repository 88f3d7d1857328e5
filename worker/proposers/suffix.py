"""Suffix decoding: the longest run of last tokens that occurred before goes on as it most often did.

After SuffixDecoding (Oliaro et al., 2024, arXiv:2411.04975), whose suffix tree is walked greedily by frequency while a
node is likely enough. The same walk is done here on the text itself: the occurrences of a run are the places where it
ends, and going down the tree keeps the places whose next token is the most frequent one. That costs one vectorised pass
over the text, microseconds for the tens of thousands of tokens that a sequence has, and no memory beside it.
"""

from __future__ import annotations

import numpy as np

from tpserve.proto.messages import SlotAdd
from tpserve.worker.arrays import Array
from tpserve.worker.batch import Batch
from tpserve.worker.proposers.base import TextProposer
from tpserve.worker.proposers.ngram import repeats

_MAX_LENGTH = 32
"""Longer runs than this tell no more of what follows."""
_TOKENS_PER_LENGTH = 2
"""Most tokens proposed for each token of the run: a short one is a weak hint (the paper's factor alpha)."""
_MIN_LIKELIHOOD = 0.1
"""A token is proposed while the shares of the chosen continuations, multiplied, are at least this."""
KEPT_TOKENS = 1 << 14
"""Of earlier sequences, the latest: 64 KiB."""


class SuffixProposer(TextProposer):
    """Proposes from each slot's own tokens and those of sequences that have left."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._earlier = np.empty(0, np.int32)  # sequences, each behind a -1
        self._known: set[int] = set()
        """Slots all of whose tokens stand in the batch."""

    def add(self, added: SlotAdd) -> None:
        """Take a sequence that enters the batch."""
        if added.max_len:
            self._known.add(added.slot)

    def remove(self, slot: int) -> None:
        """Keep the tokens of a sequence that leaves; the oldest make room."""
        if slot not in self._known:
            return
        self._known.remove(slot)
        tokens = self._batch.tokens[slot, : self._batch.num_tokens[slot]]
        if len(tokens):
            self._earlier = np.concatenate([self._earlier, [-1], tokens], dtype=np.int32)[-KEPT_TOKENS:]

    def propose(self, slots: Array, limits: Array, num_draft_tokens: int) -> Array:
        """Propose how sequences go on; see `Proposer.propose`."""
        out = np.full((len(slots), num_draft_tokens), -1, np.int32)
        for row in np.flatnonzero(limits > 0):
            slot = slots[row]
            own = self._batch.tokens[slot, : self._batch.num_tokens[slot]]
            text = np.concatenate([self._earlier, [-1], own], dtype=np.int32)
            found = continuation(text, int(limits[row]))
            out[row, : len(found)] = found
        return out


def continuation(text: Array, count: int) -> list[int]:
    """Return up to `count` tokens that may follow, fewer where they are unlikely.

    Parameters
    ----------
    text : (n,) int32
        Sequences, each behind a -1; the last one is continued.
    """
    ends, length = repeats(text, _MAX_LENGTH)
    out: list[int] = []
    likelihood = 1.0
    following = ends + 1
    for _ in range(min(count, _TOKENS_PER_LENGTH * length)):
        following = following[following < len(text)]
        if not len(following):
            break
        token, share = _most_frequent(text[following])
        likelihood *= share
        if token < 0 or likelihood < _MIN_LIKELIHOOD:
            break
        out.append(token)
        following = following[text[following] == token] + 1
    return out


def _most_frequent(tokens: Array) -> tuple[int, float]:
    """Return the most frequent token, of equals the one that came last, and its share."""
    if len(tokens) == 1:  # most often, and a tenth of the time
        return int(tokens[0]), 1.0
    values, first_from_end, counts = np.unique(tokens[::-1], return_index=True, return_counts=True)
    best = np.lexsort((first_from_end, -counts))[0]
    return int(values[best]), int(counts[best]) / len(tokens)
