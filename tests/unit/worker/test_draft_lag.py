"""How far a draft is behind: what it must compute before a round, and no more."""

from __future__ import annotations

import numpy as np
import pytest

from tpserve.proto.messages import SamplingParams, SlotAdd
from tpserve.worker.draft_lag import DraftLag, passes_before, smallest_window

SAMPLING = SamplingParams()


def slots(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.asarray(numbers, np.int32)


def make_lag(*max_len: int) -> DraftLag:
    lag = DraftLag(8)
    lag.add([SlotAdd(slot, SAMPLING, (), max_len=most) for slot, most in enumerate(max_len)])
    return lag


def test_a_round_leaves_out_two_tokens_at_most() -> None:
    lag = make_lag(50)
    assert lag.take(slots(0)) == 1, "of a prompt, the draft has run all but the token that was sampled"
    assert lag.take(slots(0)) == 2
    assert lag.take(slots(0)) == 2


def test_the_slot_that_is_furthest_behind_counts_and_only_once() -> None:
    lag = make_lag(50, 50, 50)
    for _ in range(3):
        lag.plain_step(slots(0, 1))
    lag.plain_step(slots(0, 1, 2))
    assert lag.take(slots(2)) == 2
    assert lag.take(slots(2, 0)) == 5
    assert lag.take(slots(0, 2)) == 2
    assert lag.take(slots(1)) == 5


def test_steps_with_prompts_move_on_from_what_was_left_out() -> None:
    """The draft runs their tokens, but not the one before that a round has left out."""
    lag = make_lag(50, 50)
    lag.prompt_step(slots(0, 1))
    assert lag.take(slots(1)) == 1
    for _ in range(3):
        lag.prompt_step(slots(0, 1))
    assert lag.take(slots(0)) == 1
    assert lag.take(slots(1)) == 5
    lag.plain_step(slots(0, 1))
    lag.prompt_step(slots(0, 1))
    assert lag.take(slots(0, 1)) == 4


def test_who_does_not_speculate_is_never_behind() -> None:
    """Or a prompt after a thousand steps of a grammar would have the draft compute a thousand tokens for nobody."""
    lag = make_lag(0, 0)
    for _ in range(1000):
        lag.plain_step(slots(0, 1))
        lag.prompt_step(slots(0, 1))
    assert lag.take(slots(0, 1)) == 0
    lag.prompt_step(slots(0, 1))
    lag.add([SlotAdd(2, SAMPLING, (), max_len=50)])
    lag.plain_step(slots(0, 1, 2))
    assert lag.take(slots(0, 1, 2)) == 2


def test_a_slot_begins_anew_with_its_next_sequence() -> None:
    lag = make_lag(50, 0)
    for _ in range(5):
        lag.plain_step(slots(0, 1))
    lag.add([SlotAdd(0, SAMPLING, (), max_len=0), SlotAdd(1, SAMPLING, (), max_len=50)])
    for _ in range(2):
        lag.plain_step(slots(0, 1))
    assert lag.take(slots(0)) == 0
    assert lag.take(slots(1)) == 3


def test_nobody_is_behind_where_nothing_decodes() -> None:
    assert make_lag(50).take(slots()) == 0


def test_a_window_covers_what_is_missing_if_one_does() -> None:
    assert [smallest_window(missing, (2, 4)) for missing in range(7)] == [2, 2, 2, 4, 4, 4, 4]


@pytest.mark.parametrize("window", [2, 4])
@pytest.mark.parametrize("most", [1, 3, 8, 1000])
def test_passes_cover_what_lies_before_the_window_in_order(window: int, most: int) -> None:
    for missing in range(40):
        found = passes_before(window, missing, most)
        places = [behind + size - 1 - i for size, behind in found for i in range(size)]  # 0: the last token of all
        assert places == sorted(places, reverse=True), "the earliest first, none twice"
        assert set(range(window, missing)) <= set(places)
        assert all(size <= most and behind >= window for size, behind in found)
        assert len(found) <= -(-max(0, missing - window) // most) if most < 1000 else len(found) <= 1
