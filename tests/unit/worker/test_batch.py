"""The batch that plans change by diffs, and the plans it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from tpserve.proto.messages import PromptChunk, SamplingParams, SlotAdd, StepPlan
from tpserve.worker.arrays import aligned_empty, aligned_zeros, as_tensor
from tpserve.worker.batch import Batch, DraftTokens, StepArrays
from tpserve.worker.errors import PlanError

PAGE = 4


def make_batch() -> Batch:
    return Batch(max_num_seqs=4, max_num_tokens=12, max_pages_per_seq=3, page_size=PAGE)


def add(slot: int, *pages: int) -> SlotAdd:
    return SlotAdd(slot, SamplingParams(), pages)


def run(batch: Batch, plan: StepPlan, sampled: list[int]) -> StepArrays:
    """Apply a plan and commit tokens; return copies of its arrays."""
    batch.apply(plan)
    arrays = batch.prepare(plan)
    copy = StepArrays(*(getattr(arrays, name).copy() for name in StepArrays.__slots__))
    batch.commit(arrays, np.asarray(sampled, np.int32))
    return copy


def rows(arrays: StepArrays) -> list[tuple[int, int, int]]:
    """(token, position, slot) of each token."""
    return list(zip(arrays.token_ids.tolist(), arrays.positions.tolist(), arrays.token_slots.tolist(), strict=True))


def sampled(arrays: StepArrays) -> list[tuple[int, int, int]]:
    """(row, slot, position) of each sampled token."""
    return list(
        zip(arrays.sample_rows.tolist(), arrays.sample_slots.tolist(), arrays.sample_positions.tolist(), strict=True)
    )


def test_prompts_chunks_and_decodes_share_steps() -> None:
    batch = make_batch()
    first = run(
        batch,
        StepPlan(1, added_slots=(add(2, 7, 9),), chunks=(PromptChunk(2, 0, (10, 11, 12), sample=True),)),
        [50],
    )
    assert rows(first) == [(10, 0, 2), (11, 1, 2), (12, 2, 2)]
    assert sampled(first) == [(2, 2, 3)]
    assert batch.page_table[2, :2].tolist() == [7, 9]
    # Slot 2 decodes; slot 0 starts with the first of two chunks, of which nothing is sampled.
    second = run(
        batch, StepPlan(2, added_slots=(add(0, 1),), chunks=(PromptChunk(0, 0, (20, 21), sample=False),)), [51]
    )
    assert rows(second) == [(50, 3, 2), (20, 0, 0), (21, 1, 0)]
    assert sampled(second) == [(0, 2, 4)]
    third = run(batch, StepPlan(3, chunks=(PromptChunk(0, 2, (22,), sample=True),)), [52, 60])
    assert rows(third) == [(51, 4, 2), (22, 2, 0)]
    assert sampled(third) == [(0, 2, 5), (1, 0, 3)]
    # Both decode; slot 0 gets the page that it needs from position 4 on.
    fourth = run(batch, StepPlan(4, appended_pages=((0, 5),)), [53, 61])
    assert rows(fourth) == [(52, 5, 2), (60, 3, 0)]
    # A slot leaves and its number is taken by another in the same plan.
    fifth = run(
        batch,
        StepPlan(5, removed_slots=(2,), added_slots=(add(2, 8),), chunks=(PromptChunk(2, 0, (30,), sample=True),)),
        [62, 70],
    )
    assert rows(fifth) == [(61, 4, 0), (30, 0, 2)]
    assert sampled(fifth) == [(0, 0, 5), (1, 2, 1)]


def test_a_prompt_may_start_behind_shared_pages() -> None:
    arrays = run(
        make_batch(), StepPlan(1, added_slots=(add(1, 3, 4),), chunks=(PromptChunk(1, 4, (9, 9), sample=True),)), [1]
    )
    assert rows(arrays) == [(9, 4, 1), (9, 5, 1)]
    assert sampled(arrays) == [(1, 1, 6)]


def test_nothing_to_run_gives_no_rows() -> None:
    batch = make_batch()
    plan = StepPlan(1, added_slots=(add(0, 1),))
    batch.apply(plan)
    assert len(batch.prepare(plan).token_ids) == 0


BUSY = StepPlan(1, added_slots=(add(0, 1),), chunks=(PromptChunk(0, 0, (1, 2, 3, 4), sample=True),))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (StepPlan(2, removed_slots=(3,)), "step 2 removes slot 3, which is free"),
        (StepPlan(2, added_slots=(add(0, 2),)), "step 2 adds slot 0, which is taken"),
        (StepPlan(2, added_slots=(add(4, 2),)), "step 2 names slot 4 of 4"),
        (StepPlan(2, removed_slots=(9,)), "step 2 names slot 9 of 4"),
        (StepPlan(2, undrafted_slots=(0,)), "step 2 ends the drafts of slot 0, which has none"),
        (StepPlan(2, undrafted_slots=(1,)), "step 2 ends the drafts of slot 1, which has none"),
        (StepPlan(2, undrafted_slots=(9,)), "step 2 names slot 9 of 4"),
        (StepPlan(2, appended_pages=((1, 6),)), "step 2 gives a page to slot 1, which is free"),
        (StepPlan(2, appended_pages=((0, 6), (0, 7), (0, 8))), "slot 0 has more pages than its table's 3"),
        (StepPlan(2), "step 2: a decoding slot has no page for its next token"),
        (
            StepPlan(2, appended_pages=((0, 2),), chunks=(PromptChunk(1, 0, (1,), sample=True),)),
            "step 2 runs slot 1 to position 1, it has 0 pages",
        ),
        (
            StepPlan(2, added_slots=(add(1, 2),), chunks=(PromptChunk(1, 0, (1,) * 5, sample=True),)),
            "step 2 runs slot 1 to position 5, it has 1 pages",
        ),
        (
            StepPlan(2, added_slots=(add(1, 2, 3, 4),), chunks=(PromptChunk(1, 0, (1,) * 12, sample=True),)),
            "step 2 has 13 tokens, the library takes 12",
        ),
        (StepPlan(2, chunks=(PromptChunk(7, 0, (1,), sample=True),)), "step 2 names slot 7 of 4"),
    ],
)
def test_a_plan_that_contradicts_the_batch_is_refused(plan: StepPlan, message: str) -> None:
    batch = make_batch()
    run(batch, BUSY, [5])
    with pytest.raises(PlanError, match=message):
        run(batch, plan, [0] * 4)


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint8])
def test_arrays_are_aligned_and_shared_with_tensors(dtype: type[np.generic]) -> None:
    for shape in ((3,), (5, 7), (0, 4)):
        array = aligned_zeros(shape, dtype)
        assert not array.size or array.ctypes.data % 64 == 0
        assert not array.any()
        assert aligned_empty(shape, dtype).shape == shape
        view = np.from_dlpack(as_tensor(array))
        if array.size:
            array.flat[0] = 3
            assert view.flat[0] == 3


def speculating(slot: int, max_len: int, *pages: int) -> SlotAdd:
    return SlotAdd(slot, SamplingParams(), pages, max_len=max_len, prefix_token_ids=(1, 2, 3, 4))


def decoding_batch(max_num_rows: int | None = None) -> Batch:
    """Slots 3, 0 and 2 decode: 3 and 2 speculate up to 9 and 7 tokens, all have six."""
    batch = Batch(max_num_seqs=4, max_num_tokens=12, max_pages_per_seq=3, page_size=PAGE, max_num_rows=max_num_rows)
    plan = StepPlan(
        1,
        added_slots=(speculating(3, 9, 1, 2), add(0, 1, 3), speculating(2, 7, 1, 4)),
        chunks=tuple(PromptChunk(slot, 4, (slot,), sample=True) for slot in (3, 0, 2)),
    )
    run(batch, plan, [33, 30, 32])
    return batch


def test_drafts_stand_behind_their_slots_and_their_rows_behind_the_first_ones() -> None:
    batch = decoding_batch()
    assert batch.tokens[3, :6].tolist() == [1, 2, 3, 4, 3, 33]
    assert batch.running().tolist() == [3, 0, 2]
    assert batch.draft_limits(5).tolist() == [2, 0, 0]  # of nine tokens one is sampled last; slot 2 lacks only that
    assert batch.draft_limits(1).tolist() == [1, 0, 0]
    draft = DraftTokens(np.asarray([[70, 71], [-1, -1], [80, 81]], np.int32), np.asarray([2, 0, 1], np.int32))
    plan = StepPlan(2, added_slots=(add(1, 6),), chunks=(PromptChunk(1, 0, (9, 9), sample=True),))
    batch.apply(plan)
    arrays = batch.prepare(plan, draft)
    assert rows(arrays) == [
        (33, 5, 3),
        (70, 6, 3),
        (71, 7, 3),
        (30, 5, 0),
        (32, 5, 2),
        (80, 6, 2),
        (9, 0, 1),
        (9, 1, 1),
    ]
    firsts = [(0, 3, 6), (3, 0, 6), (4, 2, 6), (7, 1, 2)]
    assert sampled(arrays) == [*firsts, (1, 3, 7), (5, 2, 7), (2, 3, 8)]
    # Slot 3 takes a draft token and one more, the others one.
    tokens = np.asarray([[70, 5, 0], [40, 0, 0], [41, 0, 0], [42, 0, 0]], np.int32)
    batch.commit_runs(arrays.sample_slots[:4], tokens, np.asarray([2, 1, 1, 1], np.int32))
    assert batch.tokens[3, :8].tolist() == [1, 2, 3, 4, 3, 33, 70, 5]
    assert batch.num_tokens.tolist() == [7, 3, 7, 8]
    # Slot 2 is at its end, and slot 1 decodes.
    assert batch.running().tolist() == [3, 0, 1]
    last = batch.prepare(StepPlan(3))
    assert rows(last) == [(5, 7, 3), (40, 6, 0), (42, 2, 1)]
    assert batch.ended.tolist() == [2]
    batch.apply(StepPlan(4, removed_slots=(2,)))
    assert (batch.prepare(StepPlan(4)).sample_slots.tolist(), batch.ended.tolist()) == ([3, 0, 1], [])


def test_a_slot_that_is_given_up_is_drafted_for_no_more_and_ends_as_before() -> None:
    batch = decoding_batch()
    batch.apply(StepPlan(2, undrafted_slots=(3,)))
    assert batch.draft_limits(5).tolist() == [0, 0, 0]
    for step, num_running in ((2, 3), (3, 2), (4, 2)):
        run(batch, StepPlan(step), [7] * num_running)
    assert batch.running().tolist() == [0]
    added = StepPlan(5, (3,), (speculating(3, 9, 1, 2),), ((0, 6),), (PromptChunk(3, 4, (3,), sample=True),))
    run(batch, added, [7, 7])
    assert batch.running().tolist() == [0, 3]
    assert batch.draft_limits(5).tolist() == [0, 2]


def test_more_rows_than_the_library_takes_are_refused() -> None:
    batch = decoding_batch(max_num_rows=4)
    draft = DraftTokens(np.full((3, 2), 5, np.int32), np.asarray([2, 0, 0], np.int32))
    with pytest.raises(PlanError, match="step 2 samples 5 rows, the library takes 4"):
        batch.prepare(StepPlan(2), draft)


def test_drafts_need_pages() -> None:
    batch = decoding_batch()
    draft = DraftTokens(np.full((3, 3), 5, np.int32), np.asarray([3, 0, 0], np.int32))
    with pytest.raises(PlanError, match="step 2: a decoding slot has no page for its next token"):
        batch.prepare(StepPlan(2), draft)
