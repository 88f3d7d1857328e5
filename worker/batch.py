"""The batch that a rank holds between steps: slots, page tables, last tokens; plans change it by diffs.

Plain numpy here, which is device memory on a CPU. Nothing in it depends on the compiled library.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tpserve.proto.messages import StepPlan
from tpserve.worker.arrays import Array, aligned_empty, aligned_zeros
from tpserve.worker.errors import PlanError


@dataclass(frozen=True, slots=True)
class StepArrays:
    """The ragged batch of one step: T tokens, R of them sampled. Views that the next step overwrites."""

    token_ids: Array
    """(T,) int32."""
    positions: Array
    """(T,) int32: of each token in its sequence."""
    token_slots: Array
    """(T,) int32."""
    sample_rows: Array
    """(R,) int32: tokens after which one is sampled."""
    sample_slots: Array
    """(R,) int32."""
    sample_positions: Array
    """(R,) int32: position that the sampled token will have."""


class Batch:
    """Slots of one rank.

    A slot decodes when its prompt has been sampled; decoding slots are kept as one array that changes only when a slot
    comes or goes, so a pure decode step costs a few vector operations.
    """

    def __init__(self, max_num_seqs: int, max_num_tokens: int, max_pages_per_seq: int, page_size: int) -> None:
        self._page_size = page_size
        self._max_num_tokens = max_num_tokens
        self.page_table = aligned_zeros((max_num_seqs, max_pages_per_seq), np.int32)
        self._num_pages = np.zeros(max_num_seqs, np.int32)
        self._occupied = np.zeros(max_num_seqs, np.bool_)
        self._last_token = np.zeros(max_num_seqs, np.int32)
        self._num_tokens = np.zeros(max_num_seqs, np.int32)  # computed and sampled: position of the last token + 1
        self._decoding = np.empty(0, np.int32)
        token_shape = (max_num_tokens,)
        self._token_ids = aligned_empty(token_shape, np.int32)
        self._positions = aligned_empty(token_shape, np.int32)
        self._token_slots = aligned_empty(token_shape, np.int32)
        self._sample_rows = aligned_empty(token_shape, np.int32)
        self._sample_slots = aligned_empty(token_shape, np.int32)
        self._sample_positions = aligned_empty(token_shape, np.int32)

    def apply(self, plan: StepPlan) -> None:
        """Take a plan's removals, additions and pages.

        Raises
        ------
        PlanError
            If a slot does not exist, is removed or grown while free, added while taken, or given more pages than a
            table holds.
        """
        if plan.removed_slots:
            for slot in plan.removed_slots:
                self._require_slot(plan, slot)
                self._require(self._occupied[slot], f"step {plan.step_id} removes slot {slot}, which is free")
                self._occupied[slot] = False
                self._num_pages[slot] = 0
            gone = np.asarray(plan.removed_slots, np.int32)
            self._decoding = self._decoding[~np.isin(self._decoding, gone)]
        for added in plan.added_slots:
            slot = added.slot
            self._require_slot(plan, slot)
            self._require(not self._occupied[slot], f"step {plan.step_id} adds slot {slot}, which is taken")
            self._occupied[slot] = True
            self._num_tokens[slot] = 0
            for page in added.page_ids:
                self._append(slot, page)
        for slot, page in plan.appended_pages:
            self._require_slot(plan, slot)
            self._require(self._occupied[slot], f"step {plan.step_id} gives a page to slot {slot}, which is free")
            self._append(slot, page)

    def prepare(self, plan: StepPlan) -> StepArrays:
        """Lay out the tokens of a step: decoding slots first, then the plan's chunks.

        Raises
        ------
        PlanError
            If the step has more tokens than memory was planned for, or a chunk's slot is free or lacks pages.
        """
        num_decodes = len(self._decoding)
        num_tokens = num_decodes + sum(len(chunk.token_ids) for chunk in plan.chunks)
        self._require(
            num_tokens <= self._max_num_tokens,
            f"step {plan.step_id} has {num_tokens} tokens, the library takes {self._max_num_tokens}",
        )
        slots = self._decoding
        self._token_ids[:num_decodes] = self._last_token[slots]
        self._positions[:num_decodes] = self._num_tokens[slots] - 1
        self._token_slots[:num_decodes] = slots
        self._sample_rows[:num_decodes] = np.arange(num_decodes, dtype=np.int32)
        self._sample_slots[:num_decodes] = slots
        self._sample_positions[:num_decodes] = self._num_tokens[slots]
        start, num_rows = num_decodes, num_decodes
        for chunk in plan.chunks:
            self._require_slot(plan, chunk.slot)
            stop, end = start + len(chunk.token_ids), chunk.start + len(chunk.token_ids)
            self._require(
                self._occupied[chunk.slot] and end <= self._num_pages[chunk.slot] * self._page_size,
                f"step {plan.step_id} runs slot {chunk.slot} to position {end}, it has "
                f"{self._num_pages[chunk.slot]} pages",
            )
            self._token_ids[start:stop] = chunk.token_ids
            self._positions[start:stop] = np.arange(chunk.start, end, dtype=np.int32)
            self._token_slots[start:stop] = chunk.slot
            if chunk.sample:
                self._sample_rows[num_rows] = stop - 1
                self._sample_slots[num_rows] = chunk.slot
                self._sample_positions[num_rows] = end
                num_rows += 1
            start = stop
        self._require(
            bool((self._positions[:num_decodes] < self._num_pages[slots] * self._page_size).all()),
            f"step {plan.step_id}: a decoding slot has no page for its next token",
        )
        return StepArrays(
            token_ids=self._token_ids[:num_tokens],
            positions=self._positions[:num_tokens],
            token_slots=self._token_slots[:num_tokens],
            sample_rows=self._sample_rows[:num_rows],
            sample_slots=self._sample_slots[:num_rows],
            sample_positions=self._sample_positions[:num_rows],
        )

    def commit(self, arrays: StepArrays, token_ids: Array) -> None:
        """Take the sampled tokens: they are the next step's inputs, and newly sampled slots decode from then on."""
        slots = arrays.sample_slots
        self._last_token[slots] = token_ids
        self._num_tokens[slots] = arrays.sample_positions + 1
        num_decodes = len(self._decoding)
        if len(slots) > num_decodes:
            self._decoding = np.concatenate([self._decoding, slots[num_decodes:]])

    def _append(self, slot: int, page: int) -> None:
        count = self._num_pages[slot]
        self._require(count < self.page_table.shape[1], f"slot {slot} has more pages than its table's {count}")
        self.page_table[slot, count] = page
        self._num_pages[slot] = count + 1

    def _require_slot(self, plan: StepPlan, slot: int) -> None:
        self._require(
            0 <= slot < len(self._occupied), f"step {plan.step_id} names slot {slot} of {len(self._occupied)}"
        )

    @staticmethod
    def _require(condition: bool | np.bool_, message: str) -> None:
        if not condition:
            raise PlanError(message)
