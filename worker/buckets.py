"""Sizes for which a step is captured; a step runs in the smallest that holds it, padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tpserve.worker.arrays import Array
from tpserve.worker.batch import StepArrays

# GEMMs take eight tokens in the time of one, but reductions do not: 70B on four GPUs 6.05 -> 5.91 ms at one sequence,
# 5.96 at two, 6.05 at four (benchmarks/README.md).
_DECODE_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256)
# What is padded takes time, as a prompt's own tokens do (benchmarks/README.md). Up to the most decodes, each of these
# sizes is one of decodes too, or they would run in a graph that is not for them alone.
_MIXED_BUCKETS = (*range(32, 193, 16), *range(224, 513, 32), 768, 1024, 1536, 2048, 4096, 8192)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sizes of one captured graph; a step runs in the smallest that holds it, padded."""

    num_tokens: int
    num_rows: int
    decode_only: bool = False
    """Whether each token is its slot's only one, which attention makes use of: no other may run in such a graph."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of token_ids, positions, token_slots, sample_rows, sample_slots and sample_positions."""
        return (self.num_tokens,) * 3 + (self.num_rows,) * 3

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each of them begins in a step's inputs: kernels read at multiples of 16 bytes."""
        starts = [0]
        for size in self.sizes:
            starts.append(starts[-1] + -(-size // 4) * 4)
        return tuple(starts[:-1])

    @property
    def num_inputs(self) -> int:
        """Integers of a step's inputs."""
        return self.starts[-1] + self.num_rows


def make_buckets(max_num_seqs: int, max_num_batched_tokens: int) -> list[Bucket]:
    """Return the buckets, smallest first: of decodes, where each token is its slot's only one, and of mixed steps."""
    decodes = [size for size in _DECODE_BUCKETS if size < max_num_seqs] + [max_num_seqs]
    mixed = [size for size in _MIXED_BUCKETS if size < max_num_batched_tokens] + [max_num_batched_tokens]
    buckets = [Bucket(size, size, decode_only=True) for size in decodes]
    buckets += [Bucket(size, min(size, max_num_seqs)) for size in mixed]
    return sorted(buckets, key=capture_order)


def capture_order(bucket: Bucket) -> tuple[int, bool]:
    """Return what buckets are sorted by, smallest first; of two with as many tokens, decodes take less time."""
    return bucket.num_tokens, not bucket.decode_only


def smallest(buckets: Sequence[Bucket], arrays: StepArrays) -> int | None:
    """Return the place of the first bucket that holds a step; None if none does.

    Parameters
    ----------
    buckets
        Smallest first.
    """
    num_tokens, num_rows = len(arrays.token_ids), len(arrays.sample_rows)
    decode_only = is_decode_only(arrays.token_slots)
    for place, bucket in enumerate(buckets):
        if bucket.num_tokens >= num_tokens and bucket.num_rows >= num_rows and decode_only >= bucket.decode_only:
            return place
    return None


def is_decode_only(token_slots: Array) -> bool:
    """Return whether each token of a step is its slot's only one.

    Parameters
    ----------
    token_slots : (T,) int32
        As the host lays a step out, none padded. What the device makes padding of stays its slot's only token.
    """
    return len(token_slots) == 0 or int(np.bincount(token_slots).max()) == 1


def fill(bucket: Bucket, arrays: StepArrays, target: Array) -> None:
    """Lay out a step's inputs, padded to the bucket: padded tokens and rows have slot -1."""
    parts = (
        (arrays.token_ids, 0),
        (arrays.positions, 0),
        (arrays.token_slots, -1),
        (arrays.sample_rows, 0),
        (arrays.sample_slots, -1),
        (arrays.sample_positions, 0),
    )
    for (values, padding), start, size in zip(parts, bucket.starts, bucket.sizes, strict=True):
        target[start : start + len(values)] = values
        target[start + len(values) : start + size] = padding
