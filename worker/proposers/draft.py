"""A smaller model beside the target's batch or a copy of it: its own library, weights and pages under its page table.

The draft draws its tokens by the target's seeds and positions, so that where the two models' distributions agree, their
draws do. Its KV of page p lives in its own arrays at p: whatever the coordinator decides of pages holds for both.

One rule keeps its KV in step. Of each slot the first `num_computed` tokens have draft KV; a round begins by computing
those between it and the slot's last token, and drafts from there:

    0 ............ num_computed ............ n | n+1 ... n+k-1
      has draft KV |  caught up in one forward | k - 1 forwards of one token each

and when the target has accepted m - 1 of the k tokens, those behind them are void. So a rejection moves a number, a
prompt costs the draft nothing before its sequence decodes, and a slot whose round was accepted whole computes two
tokens in the next one instead of an extra step in this.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tpserve.collectives.cpu import CollectiveStats
from tpserve.proto.manifest import Manifest
from tpserve.proto.messages import SlotAdd
from tpserve.proto.rank import RankConfig
from tpserve.worker.arrays import Array, aligned_empty
from tpserve.worker.batch import Batch, StepArrays
from tpserve.worker.errors import WorkerError
from tpserve.worker.library import check_manifest
from tpserve.worker.model import Model, ModelRank, Progress
from tpserve.worker.sampler import Sampler


class DraftModel:
    """Proposes what a smaller model samples.

    Grammars do not bind it: what they forbid is drafted in vain.

    Parameters
    ----------
    batch, sampler
        The target's, or copies that are kept like them. Pages, tokens and counts of penalties are read there.
    num_pages
        Of the target, and so of the draft.
    """

    def __init__(self, model: Model, batch: Batch, sampler: Sampler, max_num_seqs: int, num_pages: int) -> None:
        manifest = model.manifest
        self._model = model
        self._batch = batch
        self._target_sampler = sampler
        self._sampler = Sampler(model.sample_kernel, max_num_seqs, manifest.vocab_size)
        self._max_len = manifest.max_model_len
        self._max_num_tokens = manifest.max_num_batched_tokens
        self._page_size = manifest.kv.page_size
        self._num_computed = np.zeros(max_num_seqs, np.int32)
        self._num_valid = np.zeros(max_num_seqs, np.int32)  # leading pages of the slot that are known to be valid
        self._valid = np.zeros(num_pages, np.bool_)
        """Pages that hold draft KV of all their tokens: a prefix-cache hit on one of the others is computed again."""
        shape = (self._max_num_tokens,)
        self._token_ids = aligned_empty(shape, np.int32)
        self._positions = aligned_empty(shape, np.int32)
        self._token_slots = aligned_empty(shape, np.int32)
        self._sample_rows = aligned_empty((max_num_seqs,), np.int32)
        self._logits: Any = None
        """Of the last forward."""

    def begin(self, step_id: int) -> None:
        """Nothing is kept by step."""

    def add(self, added: SlotAdd) -> None:
        """Take a sequence that enters the batch: pages behind its prefix-cache hits are fresh."""
        pages = np.asarray(added.page_ids, np.int64)
        num_hits = len(added.prefix_token_ids) // self._page_size
        self._valid[pages[num_hits:]] = False
        held = self._valid[pages[:num_hits]]
        num_valid = num_hits if held.all() else int(held.argmin())
        self._num_valid[added.slot] = num_valid
        self._num_computed[added.slot] = num_valid * self._page_size
        if added.max_len:
            self._sampler.add(replace(added, sampling=replace(added.sampling, num_logprobs=None)))

    def give_up(self, slot: int) -> None:
        """Nothing is done for a slot before it is asked about."""

    def grow(self, page: int) -> None:
        """Take a fresh page: what it held is gone."""
        self._valid[page] = False

    def remove(self, slot: int) -> None:
        """Let a sequence go; its valid pages may be found again."""

    def propose(self, slots: Array, limits: Array, num_draft_tokens: int) -> Array:
        """Propose how sequences go on; see `Proposer.propose`.

        Slots that are far behind, as after their prompt, are caught up over several steps and propose nothing before.
        """
        out = np.full((len(slots), num_draft_tokens), -1, np.int32)
        counts = self._batch.num_tokens[slots]
        limits = np.minimum(limits, self._max_len - counts + 1)  # the last token drafted is not computed
        rows = self._catch_up(slots, np.where(limits > 0, counts - self._num_computed[slots], 0))
        if not len(rows):
            return out
        self._sampler.copy_counts(self._target_sampler, slots[rows])
        out[rows, 0] = self._sampled(slots[rows], counts[rows])
        for column in range(1, num_draft_tokens):
            rows = rows[limits[rows] > column]
            if not len(rows):
                break
            here, positions = slots[rows], counts[rows] + np.int32(column - 1)
            self._forward(out[rows, column - 1], positions, here, np.arange(len(rows)))
            self._num_computed[here] = positions + 1
            out[rows, column] = self._sampled(here, positions + 1)
        return out

    def emitted(self, slots: Array, token_ids: Array, counts: Array) -> None:
        """Tokens are read in the batch when they are needed."""

    def computed(self, arrays: StepArrays, aux: Any) -> None:
        """Hidden rows say nothing to it."""

    def settle(self, slots: Array) -> None:
        """Forget what was computed of rejected tokens, and note the pages that are whole."""
        computed = np.minimum(self._num_computed[slots], self._batch.num_tokens[slots] - 1)
        self._num_computed[slots] = computed
        num_valid = computed // self._page_size
        for row in np.flatnonzero(num_valid > self._num_valid[slots]):
            slot = slots[row]
            self._valid[self._batch.page_table[slot, self._num_valid[slot] : num_valid[row]]] = True
        self._num_valid[slots] = num_valid

    def collective_totals(self) -> dict[str, CollectiveStats]:
        """Return what was done in collectives since the start, by kind."""
        return self._model.collective_totals()

    def close(self) -> None:
        """Leave the draft's group."""
        self._model.close()

    def _catch_up(self, slots: Array, behind: Array) -> Array:
        """Compute known tokens that have no draft KV, as many as one forward takes, the first slots' first.

        Parameters
        ----------
        behind : (B,) int32
            Tokens that each slot lacks; 0 of those that do not draft.

        Returns
        -------
        (R,) int64
            Rows of `slots` that lack nothing now: the logits are those behind their last tokens.
        """
        before = np.cumsum(behind) - behind
        amounts = (self._max_num_tokens - before).clip(0, behind)
        num_tokens = int(amounts.sum())
        if not num_tokens:
            return np.empty(0, np.int64)
        ends = np.cumsum(amounts)
        row = np.repeat(np.arange(len(slots)), amounts)
        offset = np.arange(num_tokens) - (ends - amounts)[row]
        token_slots = slots[row]
        positions = self._num_computed[token_slots] + offset
        done: Array = np.flatnonzero((behind > 0) & (amounts == behind))
        self._forward(self._batch.tokens[token_slots, positions], positions, token_slots, ends[done] - 1)
        self._num_computed[slots] += amounts
        return done

    def _forward(self, token_ids: Array, positions: Array, token_slots: Array, sample_rows: Array) -> None:
        """Run the draft over a ragged batch, each argument as in `Model.step`; `_sampled` must follow."""
        count, num_rows = len(token_ids), len(sample_rows)
        self._token_ids[:count] = token_ids
        self._positions[:count] = positions
        self._token_slots[:count] = token_slots
        self._sample_rows[:num_rows] = sample_rows
        self._logits, *_ = self._model.step(
            self._token_ids[:count],
            self._positions[:count],
            self._token_slots[:count],
            self._batch.page_table,
            self._sample_rows[:num_rows],
        )

    def _sampled(self, slots: Array, positions: Array) -> Array:
        """Sample a token for each row of the last forward."""
        return self._sampler.sample(self._logits, slots, positions)[0]


def load_draft(config: RankConfig, target: Manifest, batch: Batch, sampler: Sampler, progress: Progress) -> DraftModel:
    """Load this rank's part of the draft and join its group: consecutive ranks, as many as the draft's TP degree.

    Every group drafts for the whole batch, and all draft the same.

    Raises
    ------
    WorkerError
        If the draft cannot be used beside this target, or here.
    TimeoutError
        If a rank of the group does not come in time; names it.
    """
    tp_size = 1 if config.speculation is None else config.speculation.draft_tp_size
    if tp_size < 1 or config.tp_size % tp_size:
        raise WorkerError(f"the draft's TP degree {tp_size} does not divide the target's {config.tp_size}")
    group, rank = divmod(config.rank, tp_size)
    model = load_draft_rank(config, target, rank, f"{config.group_name}-draft{group}", progress)
    return DraftModel(model, batch, sampler, config.max_num_seqs, config.num_pages)


def load_draft_rank(config: RankConfig, target: Manifest, rank: int, group_name: str, progress: Progress) -> Model:
    """Load one rank's part of the draft and join the group of that name.

    Raises
    ------
    WorkerError, TimeoutError
        As `load_draft`.
    """
    speculation = config.speculation
    if speculation is None or speculation.draft_artifact_dir is None or speculation.draft_model_dir is None:
        raise WorkerError("method draft needs a draft model and its library: give --draft-model")
    tp_size = speculation.draft_tp_size
    manifest = check_manifest(speculation.draft_artifact_dir, speculation.draft_model_dir, tp_size, config.max_num_seqs)
    _check_pair(manifest, target, config.max_num_seqs)
    return Model(
        ModelRank(
            manifest=manifest,
            artifact_dir=speculation.draft_artifact_dir,
            model_dir=speculation.draft_model_dir,
            rank=rank,
            tp_size=tp_size,
            group_name=group_name,
            load_format=speculation.draft_load_format,
            num_pages=config.num_pages,
            num_threads=config.num_threads,
            collective_timeout_s=config.collective_timeout_s,
        ),
        progress,
    )


def _check_pair(draft: Manifest, target: Manifest, max_num_seqs: int) -> None:
    if draft.vocab_size != target.vocab_size:
        raise WorkerError(
            f"the draft has {draft.vocab_size} tokens and the target {target.vocab_size}: give a draft with the same "
            "vocabulary"
        )
    if draft.kv.page_size != target.kv.page_size:
        raise WorkerError(f"pages of the draft hold {draft.kv.page_size} tokens, the target's {target.kv.page_size}")
    if draft.max_num_batched_tokens < max_num_seqs:
        raise WorkerError(
            f"the draft's library takes {draft.max_num_batched_tokens} tokens in a step, {max_num_seqs} sequences need "
            "as many: compile it again with a larger --max-num-batched-tokens"
        )
