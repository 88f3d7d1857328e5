"""Buckets of captured steps: the smallest that holds a step, and how its inputs are laid out and padded."""

from __future__ import annotations

import numpy as np
import pytest

from tpserve.worker.batch import StepArrays
from tpserve.worker.buckets import Bucket, fill, make_buckets, smallest

SIZES = pytest.mark.parametrize(
    ("max_num_seqs", "max_num_tokens"), [(1, 64), (4, 256), (33, 64), (64, 320), (100, 100), (256, 8192)]
)


def step_of(token_slots: list[int], num_rows: int) -> StepArrays:
    """A step with tokens of these slots, of which the first are sampled."""
    slots, rows = np.array(token_slots, np.int32), np.zeros(num_rows, np.int32)
    return StepArrays(np.zeros_like(slots), np.zeros_like(slots), slots, rows, rows, rows)


def chosen(buckets: list[Bucket], arrays: StepArrays) -> Bucket:
    place = smallest(buckets, arrays)
    assert place is not None
    return buckets[place]


@SIZES
def test_there_is_a_bucket_for_every_step(max_num_seqs: int, max_num_tokens: int) -> None:
    buckets = make_buckets(max_num_seqs, max_num_tokens)
    assert buckets == sorted(buckets, key=lambda bucket: bucket.num_tokens)
    assert len(set(buckets)) == len(buckets)
    assert max(bucket.num_tokens for bucket in buckets) == max_num_tokens
    for num_tokens in range(2, max_num_tokens + 1):
        bucket = chosen(buckets, step_of([0] * num_tokens, 1))
        num_rows = min(num_tokens - 1, max_num_seqs)
        assert bucket == chosen(buckets, step_of([*range(num_rows), *[0] * (num_tokens - num_rows)], num_rows))
        assert not bucket.decode_only
    for num_tokens in range(1, max_num_seqs + 1):
        bucket = chosen(buckets, step_of(list(range(num_tokens)), num_tokens))
        assert bucket.decode_only
        assert 0 <= bucket.num_tokens - num_tokens < max(8, num_tokens / 2)


@SIZES
def test_a_step_with_two_tokens_of_a_slot_never_runs_as_a_decode(max_num_seqs: int, max_num_tokens: int) -> None:
    """Whatever it is: decodes beside a prompt, a prompt alone, draft tokens."""
    buckets = make_buckets(max_num_seqs, max_num_tokens)
    random = np.random.default_rng(max_num_seqs)
    for _ in range(300):
        num_tokens = int(random.integers(2, min(max_num_tokens, 2 * max_num_seqs + 2) + 1))
        slots = random.integers(0, max_num_seqs, num_tokens)
        slots[random.integers(num_tokens)] = slots[0] if num_tokens > max_num_seqs else slots[-1]
        if len(set(slots.tolist())) < num_tokens:
            bucket = chosen(buckets, step_of(slots.tolist(), int(random.integers(min(num_tokens, max_num_seqs) + 1))))
            assert not bucket.decode_only
            assert bucket.num_tokens >= num_tokens


def test_a_prompt_of_one_token_may_run_beside_decodes_as_one_of_them() -> None:
    buckets = make_buckets(8, 64)
    assert chosen(buckets, step_of([3, 0, 7], 2)) == Bucket(4, 4, decode_only=True)
    assert chosen(buckets, step_of([3, 0, 3], 2)) == Bucket(32, 8)


def test_short_prompts_are_not_padded_far() -> None:
    assert [bucket for bucket in make_buckets(64, 512) if not bucket.decode_only][:3] == [
        Bucket(32, 32), Bucket(48, 48), Bucket(64, 64)
    ]  # fmt: skip
    assert [bucket for bucket in make_buckets(4, 40) if not bucket.decode_only] == [Bucket(32, 4), Bucket(40, 4)]


def test_a_step_that_no_bucket_holds_has_none() -> None:
    buckets = make_buckets(2, 64)
    assert smallest(buckets, step_of([0] * 65, 1)) is None
    assert smallest(buckets, step_of([0, 1, 0], 3)) is None


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
