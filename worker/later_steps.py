"""The steps of a round behind its first: where each runs and samples is known before any token is."""

from __future__ import annotations

from typing import Any

import cupy
import tvm_ffi

from tpserve.proto.speculation import MAX_DRAFT_TOKENS
from tpserve.worker.device_speculation import Round, State

_WORDS = 16
"""Rows of int32 begin at multiples of 64 bytes, as compiled code may expect of tensors."""


class LaterSteps:
    """What those steps take, each of one token of each slot, at addresses that captured graphs keep.

    Found by two kernels when a round begins. So none stands between the token that a step samples and the step that
    runs it but the one that stores it, and kernels of that step may start early.

    Parameters
    ----------
    heads
        Slots, query heads and KV heads; see `attention_plan`.
    window
        Of attention; 0 for none.
    behind
        Positions between a token and where it runs: 1 of pairs of an EAGLE-3 head.
    """

    def __init__(self, kernels: Any, heads: tuple[int, int, int], window: int, max_model_len: int, behind: int) -> None:
        self._kernels = kernels
        self._heads = heads
        self._window = window
        self._limits = (behind, max_model_len)
        size = -(-heads[0] // _WORDS) * _WORDS
        # Each exchanged once, as a whole and by rows: an exchange makes streams wait for each other.
        self._where, by_row = zip(*(_rows(size) for _ in range(3)), strict=True)
        """Positions, slots, and positions that are sampled; (N, at least slots) int32 each."""
        self._step_where = list(zip(*by_row, strict=True))
        words = -(-kernels["attention_plan_size"](heads[0], heads[0], True) // _WORDS) * _WORDS
        self._plans, self._step_plan = _rows(words)
        self.token_ids = tvm_ffi.from_dlpack(cupy.zeros(size, cupy.int32))
        """(at least slots,) int32: what the next step runs."""

    def queue(self, state: State, run: Round, first_slots: Any) -> None:
        """Queue what finds all of a round's later steps.

        Parameters
        ----------
        first_slots : (B,) int32 tensor
            Of what the first step samples; -1 where it samples nothing.
        """
        count = run.num_draft_tokens - 1
        if count == 0:
            return
        positions, slots, _ = where = [tensor._create_view((count, tensor.shape[1])) for tensor in self._where]
        plans = self._plans._create_view((count, self._plans.shape[1]))
        self._kernels["draft_later"](*state, first_slots, *self._limits, *where)
        self._kernels["attention_plans"](positions, slots, run.num_slots, *self._heads, self._window, plans)

    def step(self, index: int, num_slots: int) -> tuple[Any, Any, Any, Any, Any]:
        """Return token ids, positions, slots, positions that are sampled, and the plan of step `index`, from 1 on."""
        words = self._kernels["attention_plan_size"](num_slots, self._heads[0], True)
        columns = (self.token_ids, *self._step_where[index - 1])
        ids, positions, slots, sample_positions = (tensor._create_view((num_slots,)) for tensor in columns)
        return ids, positions, slots, sample_positions, self._step_plan[index - 1]._create_view((words,))


def _rows(width: int) -> tuple[Any, list[Any]]:
    """Return (N, width) int32 zeros for each of the later steps, and its rows."""
    array = cupy.zeros((MAX_DRAFT_TOKENS - 1, width), cupy.int32)
    return tvm_ffi.from_dlpack(array), [tvm_ffi.from_dlpack(row) for row in array]
