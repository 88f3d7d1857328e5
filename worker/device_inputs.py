"""What a plan brings to a GPU: changes of the page table, and the tokens, positions and slots of its step.

The host prepares steps ahead of the device, so everything goes through pinned copies that take turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import cupy
import numpy as np
import tvm_ffi

from tpserve.proto.messages import StepPlan
from tpserve.worker.batch import StepArrays
from tpserve.worker.buckets import fill, smallest
from tpserve.worker.captured_step import CapturedStep
from tpserve.worker.device_weights import pinned
from tpserve.worker.errors import PlanError

NUM_STAGING = 4
"""Pinned copies of a step's inputs and outputs: more than plans can be in flight."""
_MAX_PAGE_UPDATES = 4096
"""Page-table entries that one copy may change."""


class DeviceInputs:
    """A rank's page table, and the pinned copies by which it and captured steps get their contents.

    Parameters
    ----------
    kernels
        The artifact's kernel library.
    stream
        On which the rank's steps run.
    num_inputs
        Of the largest step; see `Bucket`.

    Attributes
    ----------
    page_table : (S, P) int32 tensor
    """

    def __init__(self, kernels: Any, stream: Any, max_num_seqs: int, max_pages: int, num_inputs: int) -> None:
        self._kernels = kernels
        self._stream = stream
        self.page_table = tvm_ffi.from_dlpack(cupy.zeros((max_num_seqs, max_pages), cupy.int32))
        self._page_updates = cupy.zeros((_MAX_PAGE_UPDATES, 3), cupy.int32)
        self._page_updates_tensor = tvm_ffi.from_dlpack(self._page_updates)
        self._input_staging = [pinned(num_inputs, np.int32) for _ in range(NUM_STAGING)]
        self._update_staging = [pinned(3 * _MAX_PAGE_UPDATES, np.int32) for _ in range(NUM_STAGING)]
        self._next_staging = 0

    def next_staging(self) -> int:
        """Return the number of the copies that the next step may use."""
        staging, self._next_staging = self._next_staging, (self._next_staging + 1) % NUM_STAGING
        return staging

    def update_pages(self, updates: Sequence[tuple[int, int, int]], staging: int) -> None:
        """Queue changes of the page table, as `Batch.apply` gives them."""
        for first in range(0, len(updates), _MAX_PAGE_UPDATES):
            part = updates[first : first + _MAX_PAGE_UPDATES]
            host = self._update_staging[staging]
            if first:
                self._stream.synchronize()  # rare: one step changes more entries than the buffer holds
            host[: 3 * len(part)] = np.asarray(part, np.int32).reshape(-1)
            self._page_updates.data.copy_from_host_async(host.ctypes.data, 12 * len(part), self._stream)
            self._kernels["scatter_pages"](self._page_updates_tensor._create_view((len(part), 3)), self.page_table)

    def fill(self, step: CapturedStep, arrays: StepArrays, staging: int) -> None:
        """Queue a step's inputs, padded to its size."""
        host = self._input_staging[staging]
        fill(step.bucket, arrays, host)
        step.inputs.data.copy_from_host_async(host.ctypes.data, step.inputs.nbytes, self._stream)


def choose_step(steps: Sequence[CapturedStep], arrays: StepArrays, num_draft_tokens: int, window: int) -> CapturedStep:
    """Return the smallest of the captured steps, smallest first, that holds one with so many draft tokens of each slot.

    Parameters
    ----------
    window
        Of a round; 0 without draft tokens.

    Raises
    ------
    PlanError
        If none does.
    """
    fitting = [step for step in steps if (step.num_draft_tokens, step.window) == (num_draft_tokens, window)]
    place = smallest([step.bucket for step in fitting], arrays)
    if place is None:
        num_tokens, num_rows = len(arrays.token_ids), len(arrays.sample_rows)
        raise PlanError(f"no bucket holds {num_tokens} tokens of which {num_rows} are sampled")
    return fitting[place]


def without_limits(plan: StepPlan) -> StepPlan:
    """Return a plan whose sequences have no end that the host knows of: how far they are only the device does."""
    if not any(added.max_len for added in plan.added_slots):
        return plan
    added = tuple(replace(each, max_len=0, prefix_token_ids=()) for each in plan.added_slots)
    return replace(plan, added_slots=added)
