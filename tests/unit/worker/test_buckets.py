"""Buckets of captured steps: the smallest that holds a step, and how its inputs are laid out and padded."""

from __future__ import annotations

import numpy as np
import pytest

from tpserve.worker.batch import StepArrays
from tpserve.worker.buckets import Bucket, fill, make_buckets


@pytest.mark.parametrize(("max_num_seqs", "max_num_tokens"), [(1, 64), (4, 256), (64, 320), (100, 100), (256, 8192)])
def test_there_is_a_bucket_for_every_step(max_num_seqs: int, max_num_tokens: int) -> None:
    buckets = make_buckets(max_num_seqs, max_num_tokens)
    assert buckets == sorted(buckets, key=lambda bucket: bucket.num_tokens)
    assert len({bucket.num_tokens for bucket in buckets}) == len(buckets)
    assert max(bucket.num_tokens for bucket in buckets) == max_num_tokens
    for num_tokens in range(1, max_num_tokens + 1):
        num_rows = min(num_tokens, max_num_seqs)
        assert any(bucket.num_tokens >= num_tokens and bucket.num_rows >= num_rows for bucket in buckets)


@pytest.mark.parametrize("bucket", [Bucket(1, 1), Bucket(3, 3), Bucket(64, 64), Bucket(257, 5)])
def test_inputs_begin_where_kernels_can_read_them_and_do_not_overlap(bucket: Bucket) -> None:
    assert all(start % 4 == 0 for start in bucket.starts)  # multiples of 16 bytes
    ends = [start + size for start, size in zip(bucket.starts, bucket.sizes, strict=True)]
    assert all(end <= start for end, start in zip(ends, bucket.starts[1:], strict=False))
    assert ends[-1] == bucket.num_inputs


def test_padded_tokens_and_rows_have_no_slot() -> None:
    def array(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return np.array(values, np.int32)

    arrays = StepArrays(
        token_ids=array(-1, 7, 8),
        positions=array(4, 0, 1),
        token_slots=array(2, 0, 0),
        sample_rows=array(0, 2),
        sample_slots=array(2, 0),
        sample_positions=array(5, 2),
    )
    bucket = Bucket(4, 3)
    target = np.full(bucket.num_inputs, 99, np.int32)
    fill(bucket, arrays, target)
    parts = [target[start : start + size].tolist() for start, size in zip(bucket.starts, bucket.sizes, strict=True)]
    assert parts == [[-1, 7, 8, 0], [4, 0, 1, 0], [2, 0, 0, -1], [0, 2, 0], [2, 0, -1], [5, 2, 0]]
