"""Letters between a model's rank and its draft's own, both played by one process on one GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np
import pytest
import tvm_ffi

pytestmark = pytest.mark.gpu(count=1)

NUM_SLOTS, WIDTH, MOST = 5, 40, 3
NUM_WORDS = NUM_SLOTS * (2 + MOST)
LETTERS = 16
TIMEOUT_S = 0.3


class End:
    """One rank's mailbox, late word and copy of the slots."""

    def __init__(self, kernels: Callable[[str], Any], rng: np.random.Generator) -> None:
        runtime = cupy.cuda.runtime
        self.mailbox = runtime.malloc(kernels("link_bytes")(NUM_WORDS))
        self._late = cupy.cuda.alloc_pinned_memory(4)
        ctypes.memset(self._late.ptr, 0, 4)
        kernels("link_clear")(self.mailbox, NUM_WORDS, self._late.ptr)
        self.arrays: list[Any] = []
        self.functions: Any = None
        self.fill(rng)

    def fill(self, rng: np.random.Generator) -> None:
        """Give the slots other tokens."""
        self.arrays = [
            cupy.asarray(rng.integers(0, 1000, (NUM_SLOTS, WIDTH), dtype=np.int32)),
            cupy.asarray(rng.integers(0, WIDTH, NUM_SLOTS, dtype=np.int32)),
            cupy.full(NUM_SLOTS, WIDTH, cupy.int32),
            cupy.asarray(rng.integers(-1, 1000, (NUM_SLOTS, MOST), dtype=np.int32)),
        ]

    def call(self, name: str) -> None:
        self.functions[name](*(tvm_ffi.from_dlpack(array) for array in self.arrays))

    @property
    def late(self) -> int:
        """1 + the rank that was waited for in vain; 0: none."""
        cupy.cuda.get_current_stream().synchronize()
        return ctypes.c_int32.from_address(self._late.ptr).value


@dataclass
class Pair:
    model: End
    draft: End


@pytest.fixture
def pair(kernels: Callable[[str], Any]) -> Iterator[Pair]:
    rng = np.random.default_rng(1)
    model, draft = End(kernels, rng), End(kernels, rng)
    deadlines = (NUM_WORDS, TIMEOUT_S, TIMEOUT_S)
    model.functions = kernels("link_create")(model.mailbox, draft.mailbox, 1, 0, [draft.mailbox], [1], *deadlines)
    draft.functions = kernels("link_create")(draft.mailbox, model.mailbox, 0, 0, [model.mailbox], [0], *deadlines)
    yield Pair(model, draft)
    cupy.cuda.get_current_stream().synchronize()
    for end in (model, draft):
        cupy.cuda.runtime.free(end.mailbox)


def test_draft_tokens_and_slots_arrive_in_turn(pair: Pair) -> None:
    rng = np.random.default_rng(2)
    for _ in range(3 * LETTERS):
        pair.draft.fill(rng)
        pair.draft.call("send_drafts")
        pair.model.call("take_drafts")
        pair.model.call("tell")
        before = pair.draft.arrays[0].get()
        pair.draft.call("take_told")
        np.testing.assert_array_equal(pair.model.arrays[3].get(), pair.draft.arrays[3].get())
        tokens, num_tokens = (array.get() for array in pair.model.arrays[:2])
        np.testing.assert_array_equal(pair.draft.arrays[1].get(), num_tokens)
        for slot, count in enumerate(num_tokens):
            before[slot, max(0, count - MOST - 1) : count] = tokens[slot, max(0, count - MOST - 1) : count]
        np.testing.assert_array_equal(pair.draft.arrays[0].get(), before)
        pair.model.fill(rng)
    assert (pair.model.late, pair.draft.late) == (0, 0)


def test_letters_wait_to_be_read_and_come_in_order(pair: Pair) -> None:
    sent = []
    for count in range(LETTERS):
        pair.model.arrays[1].fill(count)
        sent.append(count)
        pair.model.call("tell")
    for count in sent:
        pair.draft.call("take_told")
        assert (pair.draft.arrays[1].get() == count).all()
    assert (pair.model.late, pair.draft.late) == (0, 0)


def test_who_sends_nothing_is_named(pair: Pair) -> None:
    pair.model.call("take_drafts")
    pair.draft.call("take_told")
    assert (pair.model.late, pair.draft.late) == (1 + 1, 1 + 0)


def test_who_reads_nothing_is_named(pair: Pair) -> None:
    for _ in range(LETTERS):
        pair.model.call("tell")
    assert pair.model.late == 0
    pair.model.call("tell")
    assert pair.model.late == 1 + 1


def test_wrong_arguments_are_refused(kernels: Callable[[str], Any], pair: Pair) -> None:
    own = pair.model.mailbox
    with pytest.raises(ValueError, match=r"9 readers of 9 ranks, place 0: expected up to 8"):
        kernels("link_create")(own, own, 0, 0, [own] * 9, [0] * 9, NUM_WORDS, 1.0, 1.0)
    few = kernels("link_create")(own, own, 0, 0, [own], [0], NUM_WORDS - 1, 1.0, 1.0)
    with pytest.raises(ValueError, match=rf"{NUM_WORDS} words in letters of {NUM_WORDS - 1}"):
        few["tell"](*(tvm_ffi.from_dlpack(array) for array in pair.model.arrays))
