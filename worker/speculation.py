"""What a rank does about draft tokens: makes the proposer, asks it in each step, and says what it may propose."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from tpserve.collectives.cpu import CollectiveStats
from tpserve.proto.manifest import Manifest
from tpserve.proto.messages import StepPlan
from tpserve.proto.rank import RankConfig
from tpserve.proto.speculation import Speculation
from tpserve.worker.arrays import Array
from tpserve.worker.batch import Batch, DraftTokens, StepArrays
from tpserve.worker.draft_link import TargetEnd
from tpserve.worker.errors import LibraryError, PlanError
from tpserve.worker.model import Model, Progress
from tpserve.worker.proposers.base import Proposer
from tpserve.worker.proposers.draft import load_draft
from tpserve.worker.proposers.load_eagle import load_head
from tpserve.worker.proposers.ngram import NgramProposer
from tpserve.worker.proposers.remote import RemoteProposer
from tpserve.worker.proposers.suffix import SuffixProposer
from tpserve.worker.sampler import Sampler


class Speculator:
    """The proposer of one rank.

    Attributes
    ----------
    draft_us : int
        Time that the last `draft` took.
    """

    def __init__(self, speculation: Speculation, proposer: Proposer, batch: Batch, manifest: Manifest) -> None:
        self._max_num_draft_tokens = speculation.max_num_draft_tokens
        self._proposer = proposer
        self._batch = batch
        self._vocab_size = manifest.vocab_size
        self._drafting = np.empty(0, np.int32)
        self.draft_us = 0

    def apply(self, plan: StepPlan) -> None:
        """Take a plan's removals, additions and pages. Before the batch does, which refuses a plan that is wrong."""
        self._proposer.begin(plan.step_id)
        num_slots = len(self._batch.num_tokens)
        for slot in plan.undrafted_slots:
            if slot < num_slots:
                self._proposer.give_up(slot)
        for slot in plan.removed_slots:
            if slot < num_slots:
                self._proposer.remove(slot)
        for added in plan.added_slots:
            if added.slot < num_slots:
                self._proposer.add(added)
        for _, page in plan.appended_pages:
            self._proposer.grow(page)

    def draft(self, plan: StepPlan) -> DraftTokens | None:
        """Return what this step verifies; None if nothing.

        Raises
        ------
        PlanError
            If the plan asks for more draft tokens than the replica was started for.
        """
        self.draft_us = 0
        self._drafting = self._drafting[:0]
        count = plan.num_draft_tokens
        if count > self._max_num_draft_tokens:
            raise PlanError(
                f"step {plan.step_id} asks for {count} draft tokens, this replica verifies {self._max_num_draft_tokens}"
            )
        limits = self._batch.draft_limits(count) if count else None
        if limits is None or not limits.any():
            return None
        started = time.perf_counter()
        self._drafting = self._batch.running()
        token_ids = self._proposer.propose(self._drafting, limits, count)
        self.draft_us = int((time.perf_counter() - started) * 1e6)
        # Whatever a proposer says, only tokens of the model within the limits go into the graph.
        proposed = (token_ids >= 0) & (token_ids < self._vocab_size) & (np.arange(count) < limits[:, None])
        counts = np.cumprod(proposed, axis=1, dtype=np.int32).sum(axis=1, dtype=np.int32)
        return DraftTokens(token_ids, counts) if counts.any() else None

    def computed(self, arrays: StepArrays, aux: Any) -> None:
        """Tell the proposer which tokens the step ran, behind `settle`; see `Proposer.computed`."""
        self._proposer.computed(arrays, aux)

    def settle(self, slots: Array, token_ids: Array, counts: Array) -> None:
        """Tell the proposer what the step emitted, which stands in the batch; see `Proposer.emitted`."""
        self._proposer.emitted(slots, token_ids, counts)
        if len(self._drafting):
            self._proposer.settle(self._drafting)

    def collective_totals(self) -> dict[str, CollectiveStats]:
        """Return what the proposer has done in collectives since the start, by kind."""
        return self._proposer.collective_totals()

    def close(self) -> None:
        """Free what the proposer holds."""
        self._proposer.close()


def check_rows(manifest: Manifest, config: RankConfig) -> None:
    """Check that the target's library was compiled for as many rows as steps may verify.

    Raises
    ------
    LibraryError
        If it was not; names both numbers.
    """
    if config.speculation is None:
        return
    count = config.speculation.max_num_draft_tokens
    rows = min(manifest.max_num_batched_tokens, config.max_num_seqs * (1 + count))
    if rows > manifest.max_num_rows:
        raise LibraryError(
            f"{count} draft tokens for each of {config.max_num_seqs} sequences need {rows} rows in a step, the library "
            f"has {manifest.max_num_rows}: compile again with --max-num-draft-tokens {count}"
        )


def make_proposer(
    config: RankConfig,
    speculation: Speculation,
    target: Model,
    batch: Batch,
    sampler: Sampler,
    progress: Progress,
    drafts: TargetEnd | None = None,
) -> Proposer:
    """Return the proposer of a rank.

    Parameters
    ----------
    drafts
        Connections to a draft that has its own ranks.

    Raises
    ------
    WorkerError, TimeoutError
        As `load_draft`.
    """
    if drafts is not None:
        return RemoteProposer(drafts)
    match speculation.method:
        case "ngram":
            return NgramProposer(batch, speculation.min_ngram, speculation.max_ngram)
        case "suffix":
            return SuffixProposer(batch)
        case "draft":
            return load_draft(config, target.manifest, batch, sampler, progress)
        case "eagle3":
            return load_head(config, target, batch, sampler, progress)
