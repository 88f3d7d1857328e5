"""How a step that may verify draft tokens is laid out where only the device knows how far its slots are.

Mirrors `speculation_rows.cuh`: decoding slot b has the rows b * (1 + K) ... b * (1 + K) + K, with the token ids -1 (its
last token), -2 (its first draft token), and so on; the device gives them tokens and positions. Plain numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tpserve.worker.arrays import Array
from tpserve.worker.batch import StepArrays
from tpserve.worker.buckets import Bucket

_BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True, slots=True)
class VerifyBucket:
    """A captured step of so many decoding slots with so many draft tokens each."""

    num_slots: int
    num_draft_tokens: int

    @property
    def bucket(self) -> Bucket:
        """Its sizes: every token is sampled."""
        size = self.num_slots * (1 + self.num_draft_tokens)
        return Bucket(size, size)


def make_verify_buckets(max_num_seqs: int, max_num_tokens: int, max_num_draft_tokens: int) -> list[VerifyBucket]:
    """Return the buckets, smallest first: one of them holds whatever fits in `max_num_tokens`."""
    found = []
    for drafts in range(1, max_num_draft_tokens + 1):
        most = min(max_num_seqs, max_num_tokens // (1 + drafts))
        found += [VerifyBucket(size, drafts) for size in (*_BATCHES, most) if size < most or size == most > 0]
    return sorted(set(found), key=lambda each: (each.num_slots, each.num_draft_tokens))


def lay_out_verify(decoding: Array, num_draft_tokens: int) -> StepArrays:
    """Return the rows of a step that verifies draft tokens for the slots that decode, (B,) int32."""
    width = 1 + num_draft_tokens
    count = len(decoding) * width
    slots = np.repeat(decoding, width).astype(np.int32)
    zeros = np.zeros(count, np.int32)
    return StepArrays(
        token_ids=np.tile(-1 - np.arange(width, dtype=np.int32), len(decoding)),
        positions=zeros,
        token_slots=slots,
        sample_rows=np.arange(count, dtype=np.int32),
        sample_slots=slots,
        sample_positions=zeros,
    )


@dataclass(frozen=True, slots=True)
class Emitted:
    """What a step gave, read from what the device tells of its rows and groups."""

    rows: Array
    """(E,) rows whose tokens count, slot by slot."""
    fields: dict[str, Any]
    """Of `StepResult`, besides tokens and log-probabilities."""


def read_groups(slots: Array, num_draft_tokens: int, counts: Array, drafted: Array) -> Emitted:
    """Return what counts of a step's rows.

    Parameters
    ----------
    slots : (G,) int32
        Of each group: decoding slots, or (without draft tokens) sampled chunks too.
    counts, drafted : (G,) int32
        Tokens that each gives, and draft tokens that were verified for it.
    """
    first = np.arange(len(slots)) * (1 + num_draft_tokens)
    rows = np.repeat(first, counts) + _within(counts)
    fields: dict[str, Any] = {"slots": tuple(slots.tolist())}
    if drafted.any() or (counts != 1).any():
        fields |= {"counts": tuple(counts.tolist()), "drafted": tuple(drafted.tolist())}
    return Emitted(rows, fields)


def _within(counts: Array) -> Array:
    """Return 0, 1, ... counts[0] - 1, 0, 1, ... counts[1] - 1, and so on."""
    ends = np.cumsum(counts)
    places: Array = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)
    return places
