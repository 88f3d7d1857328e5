"""How verified steps are laid out for a device, and what is read back of them."""

from __future__ import annotations

import numpy as np
import pytest

from tpserve.worker.buckets import fill
from tpserve.worker.verify_layout import VerifyBucket, lay_out_verify, make_verify_buckets, read_groups


def test_rows_of_a_slot_stand_side_by_side() -> None:
    arrays = lay_out_verify(np.asarray([5, 2], np.int32), 2)
    assert arrays.token_ids.tolist() == [-1, -2, -3, -1, -2, -3]
    assert arrays.token_slots.tolist() == arrays.sample_slots.tolist() == [5, 5, 5, 2, 2, 2]
    assert arrays.sample_rows.tolist() == list(range(6))
    bucket = VerifyBucket(4, 2).bucket
    target = np.full(bucket.num_inputs, 99, np.int32)
    fill(bucket, arrays, target)
    slots = target[bucket.starts[2] : bucket.starts[2] + 12]
    assert slots.tolist() == [5, 5, 5, 2, 2, 2, -1, -1, -1, -1, -1, -1]


def test_there_is_a_bucket_for_each_length_as_far_as_tokens_go() -> None:
    buckets = make_verify_buckets(6, 20, 3)
    assert buckets[:3] == [VerifyBucket(1, 1), VerifyBucket(1, 2), VerifyBucket(1, 3)]
    assert VerifyBucket(6, 2) in buckets  # 18 tokens
    assert VerifyBucket(6, 3) not in buckets  # 24
    assert all(each.bucket.num_tokens <= 20 for each in buckets)
    assert len(set(buckets)) == len(buckets)


@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_tokens", "most"), [(6, 20, 3), (256, 512, 5), (40, 64, 8), (8, 9, 8), (5, 100, 4)]
)
def test_whatever_fits_has_a_bucket(max_num_seqs: int, max_num_tokens: int, most: int) -> None:
    """Where a batch of a usual size does not fit, a smaller one may still: 130 slots of two draft tokens in 512."""
    buckets = make_verify_buckets(max_num_seqs, max_num_tokens, most)
    for drafts in range(1, most + 1):
        sizes = [each.num_slots for each in buckets if each.num_draft_tokens == drafts]
        largest = min(max_num_seqs, max_num_tokens // (1 + drafts))
        assert max(sizes, default=0) == largest


def test_what_a_group_gave_are_its_first_rows() -> None:
    slots, counts, drafted = (np.asarray(values, np.int32) for values in ([7, 3, 4], [3, 0, 1], [2, 0, 2]))
    emitted = read_groups(slots, 2, counts, drafted)
    assert emitted.rows.tolist() == [0, 1, 2, 6]
    assert emitted.fields == {"slots": (7, 3, 4), "counts": (3, 0, 1), "drafted": (2, 0, 2)}


def test_a_plain_step_says_nothing_of_drafts() -> None:
    ones = np.ones(3, np.int32)
    emitted = read_groups(np.asarray([7, 3, 4], np.int32), 0, ones, 0 * ones)
    assert (emitted.rows.tolist(), emitted.fields) == ([0, 1, 2], {"slots": (7, 3, 4)})
    none = read_groups(np.empty(0, np.int32), 0, np.empty(0, np.int32), np.empty(0, np.int32))
    assert len(none.rows) == 0
