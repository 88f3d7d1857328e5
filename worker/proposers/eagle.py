"""An EAGLE-3 head on the target's ranks: goes on from the target's own hidden rows, with pages under its page table.

A pair is the target's row of a token and the token behind it (`compile.models.eagle3`). Keys and values of pair i are a
function of the tokens up to i + 1, and of no other pair: they may be computed in any order, and not from anything but
rows, which the target computes once. Of each slot

    0 ............ num_computed ............... num_rows = n - 1 | n - 1 ... n + k - 3
      has head KV |  rows left aside, at most `HEAD_PENDING_ROWS` | pairs of draft tokens, on the head's own rows

with n tokens, the last of which the target has only sampled. A round computes what was left aside, up to the last row,
whose logits give the first draft token, and goes on from the rows that the head itself returns. Whatever it wrote
behind `num_rows` is void then: rows of the tokens that the target accepts come with the step, and take their places.
So a rejection moves a number, and a step that drafts nothing costs the copies of its rows, but for one pass
of the head's projections in `HEAD_PENDING_ROWS` steps. The rows of a long chunk of a prompt are computed in its step.

The last row always stays aside outside a round: which token is behind it is not known, or else its logits are wanted.
With it, the last pair of a page waits for the first token of the next page. That is why the coordinator's prefix cache
looks one token past a page's end for a target with a head (`SchedulerConfig.prefix_lookahead`): then a page that is
found has this sequence's own pairs, all of them, and no page needs to be computed again for the head's sake. Others
(vLLM) give up a page of each hit instead, and still read a pair of another sequence where two part at a page's border.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tpserve.collectives.cpu import CollectiveStats
from tpserve.proto.messages import SlotAdd
from tpserve.proto.speculation import HEAD_PENDING_ROWS
from tpserve.worker.arrays import Array, aligned_empty, as_tensor
from tpserve.worker.batch import Batch, StepArrays
from tpserve.worker.model import HeadModel
from tpserve.worker.sampler import Sampler


class EagleHead:
    """Proposes what an EAGLE-3 head samples, by the target's seeds and positions.

    A slot whose rows are not all there proposes nothing: one that found pages without the head's keys and values, or
    has more tokens than the head has positions. Grammars do not bind the head: what they forbid is drafted in vain.

    Parameters
    ----------
    token_ids : (draft vocabulary,) int64
        The target's id of each of the head's tokens. Any other token has no draft probability.
    batch, sampler
        The target's. Pages, tokens and counts of penalties are read there.
    padded_vocab_size
        Of the target.
    num_pages
        Of the target, and so of the head.
    """

    def __init__(
        self,
        head: HeadModel,
        token_ids: Array,
        batch: Batch,
        sampler: Sampler,
        *,
        max_num_seqs: int,
        num_pages: int,
        padded_vocab_size: int,
        max_num_draft_tokens: int,
    ) -> None:
        manifest, facts = head.manifest, head.manifest.head
        assert facts is not None
        self._head = head
        self._token_ids_of = token_ids
        self._batch = batch
        self._target_sampler = sampler
        self._sampler = Sampler(head.sample_kernel, max_num_seqs, facts.target_vocab_size)
        self._max_len = manifest.max_model_len
        self._max_num_tokens = manifest.max_num_batched_tokens
        self._page_size = manifest.kv.page_size
        self._num_rows = np.zeros(max_num_seqs, np.int32)
        self._num_computed = np.zeros(max_num_seqs, np.int32)
        self._num_valid = np.zeros(max_num_seqs, np.int32)  # leading pages of the slot that are known to be valid
        self._valid = np.zeros(num_pages, np.bool_)
        """Pages that hold head KV of all their pairs."""
        self._new: dict[int, Array] = {}
        """Pages of the slots of which nothing has run: which of them are prefix-cache hits, their first rows tell."""
        self._is_lost = np.zeros(max_num_seqs, np.bool_)
        """Slots whose rows are not all there."""
        row = len(manifest.aux_layers) * facts.target_hidden_size
        self._ring_size = HEAD_PENDING_ROWS + 1 + max_num_draft_tokens
        self._ring = np.zeros((max_num_seqs, self._ring_size, row), np.float32)
        """Rows left aside, by position modulo its size."""
        shape = (self._max_num_tokens,)
        self._ids = aligned_empty(shape, np.int32)
        self._positions = aligned_empty(shape, np.int32)
        self._slots = aligned_empty(shape, np.int32)
        self._rows = aligned_empty((self._max_num_tokens, row), np.float32)
        self._sample_rows = aligned_empty((max_num_seqs,), np.int32)
        # Only columns of the head's tokens are ever written to: the sampler keeps -inf as it is.
        self._target_logits = aligned_empty((max_num_seqs, padded_vocab_size), np.float32)
        self._target_logits.fill(-np.inf)

    def begin(self, step_id: int) -> None:
        """Nothing is kept by step."""

    def add(self, added: SlotAdd) -> None:
        """Take a sequence that enters the batch."""
        slot = added.slot
        self._num_rows[slot] = self._num_computed[slot] = self._num_valid[slot] = 0
        self._new[slot], self._is_lost[slot] = np.asarray(added.page_ids, np.int64), False
        if added.max_len:
            self._sampler.add(replace(added, sampling=replace(added.sampling, num_logprobs=None)))

    def give_up(self, slot: int) -> None:
        """Take no more rows of a sequence. What was left aside is computed with the next pass, for the pages' sake."""
        self._is_lost[slot] = True

    def grow(self, page: int) -> None:
        """Take a fresh page: what it held is gone."""
        self._valid[page] = False

    def remove(self, slot: int) -> None:
        """Let a sequence go; its full pages may be found again, so what they lack is computed while it can be."""
        end = (int(self._num_rows[slot]) - 1) // self._page_size * self._page_size
        if end > self._num_computed[slot]:
            self._catch_up(np.asarray([slot], np.int32), np.asarray([end], np.int32))
        self._num_rows[slot] = self._num_computed[slot] = 0
        self._new.pop(slot, None)

    def propose(self, slots: Array, limits: Array, num_draft_tokens: int) -> Array:
        """Propose how sequences go on; see `Proposer.propose`."""
        out = np.full((len(slots), num_draft_tokens), -1, np.int32)
        counts = self._batch.num_tokens[slots]
        ready = ~self._is_lost[slots] & (self._num_rows[slots] == counts - 1)
        limits = np.minimum(limits, self._max_len - counts + 2)  # the last token drafted is in no pair
        rows: Array = np.flatnonzero(ready & (limits > 0))
        if not len(rows):
            return out
        here = slots[rows]
        logits, hidden = self._first_step(here)
        self._sampler.copy_counts(self._target_sampler, here)
        out[rows, 0] = self._sampled(logits, here, counts[rows])
        for column in range(1, num_draft_tokens):
            kept = np.flatnonzero(limits[rows] > column)
            if not len(kept):
                break
            if len(kept) < len(rows):
                rows, hidden = rows[kept], _take(hidden, kept)
            here, positions = slots[rows], counts[rows] + np.int32(column - 2)
            every = np.arange(len(rows))
            logits, hidden = self._forward(out[rows, column - 1], positions, here, every, hidden)
            out[rows, column] = self._sampled(logits, here, positions + np.int32(2))
        return out

    def emitted(self, slots: Array, token_ids: Array, counts: Array) -> None:
        """Tokens are read in the batch when they are needed."""

    def computed(self, arrays: StepArrays, aux: Any) -> None:
        """Take the rows of a step's tokens, but those of rejected ones; compute what would be too much to leave aside.

        Parameters
        ----------
        aux : tensor (T, 3 * target's hidden size) float32
            By the step's tokens.
        """
        if self._is_lost[arrays.token_slots].all():
            return  # where drafts were given up, a step is to cost what a plain one does
        rows = np.from_dlpack(aux)
        starts = np.flatnonzero(np.diff(arrays.token_slots, prepend=-1))  # a slot's tokens stand side by side
        slots, firsts = arrays.token_slots[starts], arrays.positions[starts]
        if self._new:
            for slot, first in zip(slots.tolist(), firsts.tolist(), strict=True):
                if slot in self._new:
                    self._start(slot, first, self._new.pop(slot))
        ends = firsts + np.diff(starts, append=len(arrays.token_slots)).astype(np.int32)
        num_tokens = self._batch.num_tokens[slots]  # 0 while its prompt runs
        ends = np.where(num_tokens > 0, np.minimum(ends, num_tokens - 1), ends)
        ends = np.minimum(ends, self._max_len)
        whole = firsts == self._num_rows[slots]
        self._is_lost[slots[~whole & (firsts < self._max_len)]] = True
        taken = whole & ~self._is_lost[slots] & (ends > firsts)
        is_long = taken & (ends - self._num_computed[slots] > self._ring_size)
        few = np.flatnonzero(taken & ~is_long)
        self._leave_aside(slots[few], firsts[few], ends[few], rows, starts[few])
        if is_long.any() or (self._num_rows - self._num_computed > HEAD_PENDING_ROWS).any():
            everywhere = np.arange(len(self._num_rows), dtype=np.int32)
            up_to = self._num_rows - 1
            up_to[slots[is_long]] += 1  # the token behind is the first of this step
            self._catch_up(everywhere, up_to)
        for group in np.flatnonzero(is_long):
            start, count = starts[group], ends[group] - firsts[group]
            self._compute_long(int(slots[group]), int(firsts[group]), rows[start : start + count])

    def settle(self, slots: Array) -> None:
        """Nothing is kept of a round: what it computed of draft tokens is written over."""

    def collective_totals(self) -> dict[str, CollectiveStats]:
        """Return nothing: the target counts what its group does."""
        return {}

    def close(self) -> None:
        """Leave nothing: the group is the target's."""

    # ---- rows

    def _start(self, slot: int, first: int, pages: Array) -> None:
        """Take in a sequence whose first row is that of position `first`: pages before it were found in the cache."""
        num_hits = first // self._page_size
        self._valid[pages[num_hits:]] = False
        if not self._valid[pages[:num_hits]].all():  # their holders may have left rows aside
            self._catch_up(np.arange(len(self._num_rows), dtype=np.int32), self._num_rows - 1)
        if not self._valid[pages[:num_hits]].all():
            self._is_lost[slot] = True
            return
        self._num_rows[slot] = self._num_computed[slot] = first
        self._num_valid[slot] = num_hits

    def _leave_aside(self, slots: Array, firsts: Array, ends: Array, rows: Array, starts: Array) -> None:
        """Keep, of each slot, the rows of positions from first to end, which stand in `rows` from its start on."""
        token_slots, positions, _ = _spread(slots, firsts, ends)
        sources = np.repeat(starts - firsts, ends - firsts) + positions
        self._ring[token_slots, positions % self._ring_size] = rows[sources]
        self._num_rows[slots] = ends

    def _compute_long(self, slot: int, first: int, rows: Array) -> None:
        """Compute the pairs of a slot's rows, which are of positions from `first` on, but for the last one."""
        last = first + len(rows) - 1
        for begin in range(first, last, self._max_num_tokens):
            stop = min(last, begin + self._max_num_tokens)
            positions = np.arange(begin, stop, dtype=np.int32)
            self._rows[: stop - begin] = rows[begin - first : stop - first]
            self._append(positions, np.full(stop - begin, slot, np.int32))
        self._num_computed[slot] = last
        self._note_valid(np.asarray([slot]))
        self._ring[slot, last % self._ring_size] = rows[-1]
        self._num_rows[slot] = last + 1

    def _catch_up(self, slots: Array, ends: Array) -> None:
        """Compute pairs whose rows were left aside, of each slot up to a position."""
        slots, ends = slots[ends > self._num_computed[slots]], ends[ends > self._num_computed[slots]]
        token_slots, positions, _ = _spread(slots, self._num_computed[slots], ends)
        for begin in range(0, len(positions), self._max_num_tokens):
            part = slice(begin, begin + self._max_num_tokens)
            self._gather(token_slots[part], positions[part])
            self._append(positions[part], token_slots[part])
        self._num_computed[slots] = ends
        self._note_valid(slots)

    def _first_step(self, slots: Array) -> tuple[Any, Any]:
        """Compute all that was left aside of slots; return logits and rows behind their last tokens."""
        if (self._num_rows[slots] - self._num_computed[slots]).sum() > self._max_num_tokens:
            self._catch_up(slots, self._num_rows[slots] - 1)
        token_slots, positions, lasts = _spread(slots, self._num_computed[slots], self._num_rows[slots])
        self._gather(token_slots, positions)
        ids = self._batch.tokens[token_slots, positions + 1]
        hidden = self._head.project(self._rows[: len(positions)])
        out = self._forward(ids, positions, token_slots, lasts, hidden)
        self._num_computed[slots] = self._num_rows[slots]
        self._note_valid(slots)
        return out

    def _note_valid(self, slots: Array) -> None:
        """Note the pages that are whole now."""
        num_valid = self._num_computed[slots] // self._page_size
        for row in np.flatnonzero(num_valid > self._num_valid[slots]):
            slot = slots[row]
            self._valid[self._batch.page_table[slot, self._num_valid[slot] : num_valid[row]]] = True
        self._num_valid[slots] = num_valid

    # ---- the head

    def _gather(self, token_slots: Array, positions: Array) -> None:
        """Bring rows that were left aside together."""
        np.copyto(self._rows[: len(positions)], self._ring[token_slots, positions % self._ring_size])

    def _append(self, positions: Array, token_slots: Array) -> None:
        """Compute keys and values of pairs of known tokens, whose rows stand in `_rows`."""
        count = len(positions)
        self._ids[:count] = self._batch.tokens[token_slots, positions + 1]
        self._positions[:count] = positions
        self._slots[:count] = token_slots
        hidden = self._head.project(self._rows[:count])
        inputs = self._ids[:count], self._positions[:count], self._slots[:count]
        self._head.append(*inputs, self._batch.page_table, hidden)

    def _forward(
        self, token_ids: Array, positions: Array, token_slots: Array, sample_rows: Array, hidden: Any
    ) -> tuple[Any, Any]:
        """Run the head over a ragged batch of pairs, each argument as in `HeadModel.step`."""
        count, num_rows = len(token_ids), len(sample_rows)
        self._ids[:count] = token_ids
        self._positions[:count] = positions
        self._slots[:count] = token_slots
        self._sample_rows[:num_rows] = sample_rows
        return self._head.step(
            self._ids[:count],
            self._positions[:count],
            self._slots[:count],
            self._batch.page_table,
            self._sample_rows[:num_rows],
            hidden,
        )

    def _sampled(self, logits: Any, slots: Array, positions: Array) -> Array:
        """Sample one of the target's tokens for each row of the head's logits."""
        own = np.from_dlpack(logits)[:, : len(self._token_ids_of)]
        placed = self._target_logits[: len(slots)]
        placed[:, self._token_ids_of] = own
        return self._sampler.sample(as_tensor(placed), slots, positions)[0]


def _spread(slots: Array, firsts: Array, ends: Array) -> tuple[Array, Array, Array]:
    """Return all positions of slots from first to end, slot by slot.

    Returns
    -------
    slots, positions : (T,) int32
    lasts : (B,) int64
        Where each slot's last stands among them.
    """
    amounts = ends - firsts
    stops = np.cumsum(amounts)
    offset = np.arange(int(amounts.sum())) - np.repeat(stops - amounts, amounts)
    positions = (np.repeat(firsts, amounts) + offset).astype(np.int32)
    return np.repeat(slots, amounts), positions, stops - 1


def _take(rows: Any, kept: Array) -> Any:
    """Return some rows of a tensor."""
    values = np.from_dlpack(rows)
    out = aligned_empty((len(kept), values.shape[1]), np.float32)
    np.take(values, kept, axis=0, out=out)
    return as_tensor(out)
