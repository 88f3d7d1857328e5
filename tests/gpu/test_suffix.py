"""The kernels of suffix decoding against the host's proposer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy
import numpy as np
import pytest
import tvm_ffi

from tpserve.worker.proposers import suffix
from unit.compile.test_cuda_speculation import Ints
from unit.compile.test_cuda_suffix import Slots, check_drafts, check_long_texts

pytestmark = pytest.mark.gpu(count=1)


class Gpu:
    """The kernels, and the earlier sequences that they keep; see `SuffixDevice`."""

    def __init__(self, kernels: Callable[[str], Any], capacity: int) -> None:
        self._kernels = kernels
        self._earlier = (cupy.full(capacity, -9, cupy.int32), cupy.zeros(2, cupy.int32))
        self._tensors = tuple(tvm_ffi.from_dlpack(array) for array in self._earlier)

    def held(self) -> tuple[Ints, Ints]:
        ring, held = (cupy.asnumpy(array) for array in self._earlier)
        return ring, held

    def keep(self, slots: Slots, slot: int) -> None:
        self._kernels("keep_suffix")(*self._upload(slots)[1], *self._tensors, slot)

    def draft(self, slots: Slots, decode_slots: Ints, stride: int, num_drafts: int) -> None:
        arrays, state = self._upload(slots)
        where = (tvm_ffi.from_dlpack(cupy.asarray(decode_slots)), stride, num_drafts)
        self._kernels("draft_suffix")(*state, *self._tensors, *where)
        slots.draft_tokens[:] = cupy.asnumpy(arrays[3])
        for array, host in zip(arrays, slots.arrays, strict=True):
            np.testing.assert_array_equal(cupy.asnumpy(array), host)  # nothing else was written

    def _upload(self, slots: Slots) -> tuple[list[Any], list[Any]]:
        arrays = [cupy.asarray(array) for array in slots.arrays]
        return arrays, [tvm_ffi.from_dlpack(array) for array in arrays]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("capacity", [30, 250, 2000, suffix.KEPT_TOKENS])
def test_drafts_are_those_of_the_host(kernels: Callable[[str], Any], capacity: int, seed: int) -> None:
    check_drafts(Gpu(kernels, capacity), capacity, seed)


# Of the longer ones a thread has 20 words of marks, which are more shared memory than a kernel has unasked.
@pytest.mark.parametrize("num_pages", [512, 39000])
def test_long_texts_are_drafted_as_on_the_host(kernels: Callable[[str], Any], num_pages: int) -> None:
    check_long_texts(Gpu(kernels, suffix.KEPT_TOKENS), num_pages)


def test_wrong_arguments_are_refused(kernels: Callable[[str], Any]) -> None:
    slots = Slots()
    state = [tvm_ffi.from_dlpack(cupy.asarray(array)) for array in slots.arrays]
    earlier = [tvm_ffi.from_dlpack(cupy.zeros(count, cupy.int32)) for count in (64, 2)]
    decoding = tvm_ffi.from_dlpack(cupy.zeros(3, cupy.int32))
    for num_drafts in (0, slots.draft_tokens.shape[1] + 1):
        with pytest.raises(ValueError, match="draft tokens, expected 1 to"):
            kernels("draft_suffix")(*state, *earlier, decoding, 1, num_drafts)
    with pytest.raises(ValueError, match="a stride of 0"):
        kernels("draft_suffix")(*state, *earlier, decoding, 0, 1)
    with pytest.raises(ValueError, match="slot 4 of 4"):
        kernels("keep_suffix")(*state, *earlier, 4)
    with pytest.raises(ValueError, match="held has shape"):
        kernels("keep_suffix")(*state, earlier[0], earlier[0], 0)
