"""Sizes for which a step is captured; a step runs in the smallest that holds it, padded."""

from __future__ import annotations

from dataclasses import dataclass

from tpserve.worker.arrays import Array
from tpserve.worker.batch import StepArrays

# None under 8: GEMMs take eight tokens in the time of one, and a step of one padded to eight measured 4.33 ms where one
# captured for it alone took 4.49 (8B, benchmarks/README.md).
_DECODE_BUCKETS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 128, 160, 192, 256)
# Whole tiles of the GEMMs: a tile that is padded takes longer than a whole one, 136 tokens more than 192.
_MIXED_BUCKETS = (96, 128, 192, 256, 320, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sizes of one captured graph; a step runs in the smallest that holds it, padded."""

    num_tokens: int
    num_rows: int

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
    """Return the buckets, smallest first: pure decodes, where each token is sampled, then mixed steps."""
    rows = [size for size in _DECODE_BUCKETS if size < max_num_seqs] + [max_num_seqs]
    tokens = [size for size in _MIXED_BUCKETS if max_num_seqs < size < max_num_batched_tokens]
    mixed = [Bucket(size, max_num_seqs) for size in [*tokens, max_num_batched_tokens] if size > max_num_seqs]
    return [Bucket(size, size) for size in rows] + mixed


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
