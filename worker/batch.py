"""The batch that a rank holds between steps: slots, page tables, tokens; plans change it by diffs.

Plain numpy here, which is device memory on a CPU. Nothing in it depends on the compiled library.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tpserve.proto.messages import StepPlan
from tpserve.worker.arrays import Array, aligned_empty, aligned_zeros
from tpserve.worker.errors import PlanError

_INT32 = 2**31
"""What the arrays hold is below it; messages may say more."""


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
    """(R,) int32: tokens after which one is sampled. First one of each slot; then, where drafts are verified, those
    after each slot's first draft token, its second, and so on."""
    sample_slots: Array
    """(R,) int32."""
    sample_positions: Array
    """(R,) int32: position that the sampled token will have."""


@dataclass(frozen=True, slots=True)
class DraftTokens:
    """What a step verifies beside the last tokens of the B slots that decode in it (`Batch.running`)."""

    token_ids: Array
    """(B, K) int32: of each slot, the first `counts` are read."""
    counts: Array
    """(B,) int32."""


class Batch:
    """Slots of one rank.

    With `tokens_on_device`, sampled tokens never come to the host in time: decoding rows carry token id -1, for the
    device to fill in.

    Attributes
    ----------
    page_table : (S, P) int32
        Page ids by slot.
    tokens : (S, max_num_pages * page_size + 1) int32
        By slot, the tokens of its sequence, prompt and output; of a slot with neither `max_len` nor draft tokens only
        those after its prefix-cache hits. No columns with `tokens_on_device`.
    num_tokens : (S,) int32
        Of a decoding slot: its tokens, the last of which is sampled but not computed.
    ended : (E,) int32
        Decoding slots at their `max_len`, which the step last prepared leaves alone.

    A slot decodes when its prompt has been sampled; decoding slots are kept as one array that changes only when a slot
    comes or goes, so a pure decode step costs a few vector operations.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_num_tokens: int,
        max_pages_per_seq: int,
        page_size: int,
        *,
        max_num_rows: int | None = None,
        tokens_on_device: bool = False,
    ) -> None:
        self._tokens_on_device = tokens_on_device
        self._max_num_rows = max_num_rows or max_num_tokens
        self._page_size = page_size
        self._max_num_tokens = max_num_tokens
        self.page_table = aligned_zeros((max_num_seqs, max_pages_per_seq), np.int32)
        self._num_pages = np.zeros(max_num_seqs, np.int32)
        self._occupied = np.zeros(max_num_seqs, np.bool_)
        # One more than there are positions to compute: the last token may be sampled and never computed.
        width = 0 if tokens_on_device else max_pages_per_seq * page_size + 1
        self.tokens = np.zeros((max_num_seqs, width), np.int32)
        self._flat_tokens = self.tokens.reshape(-1)
        self._row_starts = np.arange(max_num_seqs) * width
        self.num_tokens = np.zeros(max_num_seqs, np.int32)
        self._max_len = np.zeros(max_num_seqs, np.int32)
        self._is_drafted = np.zeros(max_num_seqs, np.bool_)
        self._num_ending = 0  # occupied slots with a max_len
        self._decoding = np.empty(0, np.int32)
        self.ended = self._decoding
        self._num_decodes = 0  # of the step last prepared
        token_shape = (max_num_tokens,)
        self._token_ids = aligned_empty(token_shape, np.int32)
        self._positions = aligned_empty(token_shape, np.int32)
        self._token_slots = aligned_empty(token_shape, np.int32)
        self._sample_rows = aligned_empty(token_shape, np.int32)
        self._sample_slots = aligned_empty(token_shape, np.int32)
        self._sample_positions = aligned_empty(token_shape, np.int32)

    def apply(self, plan: StepPlan) -> list[tuple[int, int, int]]:
        """Take a plan's removals, additions and pages.

        Returns
        -------
        list of (slot, index, page)
            What changed in the page table, for a copy of it elsewhere.

        Raises
        ------
        PlanError
            If a slot does not exist, is removed or grown while free, added while taken, or given more pages than a
            table holds.
        """
        changed: list[tuple[int, int, int]] = []
        for slot in plan.undrafted_slots:
            self._require_slot(plan, slot)
            self._require(
                self._occupied[slot] and self._is_drafted[slot],
                f"step {plan.step_id} ends the drafts of slot {slot}, which has none",
            )
            self._is_drafted[slot] = False
        if plan.removed_slots:
            for slot in plan.removed_slots:
                self._require_slot(plan, slot)
                self._require(self._occupied[slot], f"step {plan.step_id} removes slot {slot}, which is free")
                self._occupied[slot] = False
                self._num_pages[slot] = 0
                self._num_ending -= bool(self._max_len[slot])
            gone = np.asarray(plan.removed_slots, np.int32)
            self._decoding = self._decoding[~np.isin(self._decoding, gone)]
        for added in plan.added_slots:
            slot = added.slot
            self._require_slot(plan, slot)
            self._require(not self._occupied[slot], f"step {plan.step_id} adds slot {slot}, which is taken")
            self._require(
                added.max_len < _INT32 and max(added.prefix_token_ids, default=0) < _INT32,
                f"step {plan.step_id} adds slot {slot} with a length or a token that does not fit 31 bits",
            )
            self._require(
                len(added.prefix_token_ids) <= self.tokens.shape[1],
                f"step {plan.step_id} adds slot {slot} with {len(added.prefix_token_ids)} tokens of a prefix; it "
                f"holds {self.tokens.shape[1]}",
            )
            self._occupied[slot] = True
            self.num_tokens[slot] = 0
            self._max_len[slot] = added.max_len
            self._is_drafted[slot] = added.max_len > 0
            self._num_ending += bool(added.max_len)
            self.tokens[slot, : len(added.prefix_token_ids)] = added.prefix_token_ids
            for page in added.page_ids:
                changed.append((slot, self._append(slot, page), page))
        for slot, page in plan.appended_pages:
            self._require_slot(plan, slot)
            self._require(self._occupied[slot], f"step {plan.step_id} gives a page to slot {slot}, which is free")
            changed.append((slot, self._append(slot, page), page))
        return changed

    def running(self) -> Array:
        """Return the slots that decode in the next step, (B,) int32: all that decode but those at their end."""
        if not self._num_ending:
            return self._decoding
        return self._decoding[~self._at_end()]

    def draft_limits(self, max_num_draft_tokens: int) -> Array:
        """Return how many draft tokens each slot of `running` may verify, (B,) int32: at most what it lacks but one."""
        slots = self.running()
        left: Array = self._max_len[slots] - self.num_tokens[slots] - 1
        return left.clip(0, max_num_draft_tokens) * self._is_drafted[slots]

    def prepare(self, plan: StepPlan, draft: DraftTokens | None = None) -> StepArrays:
        """Lay out the tokens of a step: decoding slots first, each with its draft tokens, then the plan's chunks.

        Raises
        ------
        PlanError
            If the step has more tokens or rows than memory was planned for, or a slot is free or lacks pages.
        """
        slots = self.running()
        self.ended = self._decoding[self._at_end()] if len(slots) < len(self._decoding) else self._decoding[:0]
        self._num_decodes = num_decodes = len(slots)
        num_drafted = 0 if draft is None else int(draft.counts.sum())
        start = num_decodes + num_drafted
        num_tokens = start + sum(len(chunk.token_ids) for chunk in plan.chunks)
        self._require(
            num_tokens <= self._max_num_tokens,
            f"step {plan.step_id} has {num_tokens} tokens, the library takes {self._max_num_tokens}",
        )
        self._sample_slots[:num_decodes] = slots
        self._sample_positions[:num_decodes] = self.num_tokens[slots]
        later = None
        if draft is None or not num_drafted:
            self._lay_out(slots)
        else:
            later = self._lay_out_drafts(slots, draft)
        num_rows = num_decodes
        for chunk in plan.chunks:
            self._require_slot(plan, chunk.slot)
            stop, end = start + len(chunk.token_ids), chunk.start + len(chunk.token_ids)
            self._require(
                self._occupied[chunk.slot] and end <= self._num_pages[chunk.slot] * self._page_size,
                f"step {plan.step_id} runs slot {chunk.slot} to position {end}, it has "
                f"{self._num_pages[chunk.slot]} pages",
            )
            self._require(
                max(chunk.token_ids, default=0) < _INT32,
                f"step {plan.step_id} gives slot {chunk.slot} a token that does not fit 31 bits",
            )
            self._token_ids[start:stop] = chunk.token_ids
            self._positions[start:stop] = np.arange(chunk.start, end, dtype=np.int32)
            self._token_slots[start:stop] = chunk.slot
            if not self._tokens_on_device:
                self.tokens[chunk.slot, chunk.start : end] = self._token_ids[start:stop]
            if chunk.sample:
                self._sample_rows[num_rows] = stop - 1
                self._sample_slots[num_rows] = chunk.slot
                self._sample_positions[num_rows] = end
                num_rows += 1
            start = stop
        if later is not None:
            self._sample_rows[num_rows : num_rows + num_drafted] = later
            self._sample_slots[num_rows : num_rows + num_drafted] = self._token_slots[later]
            self._sample_positions[num_rows : num_rows + num_drafted] = self._positions[later] + 1
            num_rows += num_drafted
        self._require(
            num_rows <= self._max_num_rows,
            f"step {plan.step_id} samples {num_rows} rows, the library takes {self._max_num_rows}",
        )
        decoded = slice(0, num_decodes + num_drafted)
        pages = self._num_pages[self._token_slots[decoded]]
        self._require(
            bool((self._positions[decoded] < pages * self._page_size).all()),
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

    def commit(self, arrays: StepArrays, token_ids: Array | None) -> None:
        """Take one sampled token of each slot, the next step's inputs; newly sampled slots decode from then on.

        Parameters
        ----------
        token_ids : (R,) int32 or None
            None if they stay on the device.
        """
        slots, positions = arrays.sample_slots, arrays.sample_positions
        if token_ids is not None:
            self._flat_tokens[self._row_starts[slots] + positions] = token_ids
        self.num_tokens[slots] = positions + 1
        self._join(slots)

    def commit_runs(self, slots: Array, token_ids: Array, counts: Array) -> None:
        """Take the tokens of a step that verified drafts; what it computed past them is void.

        Parameters
        ----------
        slots : (N,) int32
            Those sampled, as the step's arrays begin.
        token_ids : (N, W) int32, counts : (N,) int32
            Of each slot the first `counts` tokens were emitted.
        """
        first = self._sample_positions[: len(slots)]
        place = np.arange(token_ids.shape[1], dtype=np.int32)
        row, column = np.nonzero(place < counts[:, None])
        self.tokens[slots[row], first[row] + column] = token_ids[row, column]
        self.num_tokens[slots] = first + counts
        self._join(slots)

    def _lay_out(self, slots: Array) -> None:
        """Put one token of each slot at the step's beginning."""
        count = len(slots)
        positions = self.num_tokens[slots] - 1
        on_device = self._tokens_on_device
        self._token_ids[:count] = -1 if on_device else self._flat_tokens[self._row_starts[slots] + positions]
        self._positions[:count] = positions
        self._token_slots[:count] = slots
        self._sample_rows[:count] = np.arange(count, dtype=np.int32)

    def _lay_out_drafts(self, slots: Array, draft: DraftTokens) -> Array:
        """Put the last token and the draft tokens of each slot, side by side, at the step's beginning.

        Returns
        -------
        (num_drafted,) int64
            The draft tokens' places: the first of every slot, then the second, and so on.
        """
        sizes = 1 + draft.counts
        starts = np.cumsum(sizes) - sizes
        row = np.repeat(np.arange(len(slots)), sizes)
        offset = np.arange(len(row)) - starts[row]  # 0 for the last token, then 1, ...
        last = self.tokens[slots, self.num_tokens[slots] - 1]
        count = len(row)
        self._token_ids[:count] = np.concatenate([last[:, None], draft.token_ids], axis=1)[row, offset]
        self._positions[:count] = self.num_tokens[slots][row] - 1 + offset
        self._token_slots[:count] = slots[row]
        self._sample_rows[: len(slots)] = starts
        places = np.flatnonzero(offset)
        return places[np.argsort(offset[places], kind="stable")]

    def _join(self, slots: Array) -> None:
        """Let newly sampled slots decode: those behind the ones that already do."""
        if len(slots) > self._num_decodes:
            self._decoding = np.concatenate([self._decoding, slots[self._num_decodes :]])

    def _at_end(self) -> Array:
        """Return which of the decoding slots have all tokens that they may have, (D,) bool."""
        max_len = self._max_len[self._decoding]
        return (max_len > 0) & (self.num_tokens[self._decoding] >= max_len)

    def _append(self, slot: int, page: int) -> int:
        """Put a page at the end of a slot's table; return its index."""
        count = int(self._num_pages[slot])
        self._require(count < self.page_table.shape[1], f"slot {slot} has more pages than its table's {count}")
        self._require(page < _INT32, f"slot {slot} is given page {page}")
        self.page_table[slot, count] = page
        self._num_pages[slot] = count + 1
        return count

    def _require_slot(self, plan: StepPlan, slot: int) -> None:
        self._require(
            0 <= slot < len(self._occupied), f"step {plan.step_id} names slot {slot} of {len(self._occupied)}"
        )

    @staticmethod
    def _require(condition: bool | np.bool_, message: str) -> None:
        if not condition:
            raise PlanError(message)
