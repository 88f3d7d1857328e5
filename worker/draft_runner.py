"""One rank of a draft that has its own: follows the model's batch plan by plan, and proposes where a step verifies."""

from __future__ import annotations

import socket
import time
from typing import ClassVar

import numpy as np

from tpserve.proto.messages import StepPlan, StepResult
from tpserve.proto.rank import RankConfig, SizeTime
from tpserve.worker.arrays import Array
from tpserve.worker.batch import Batch
from tpserve.worker.draft_link import DraftEnd
from tpserve.worker.errors import PlanError, WorkerError
from tpserve.worker.library import check_manifest
from tpserve.worker.model import Model, Progress
from tpserve.worker.proposers.draft import DraftModel, load_draft_rank
from tpserve.worker.runner import collectives_since
from tpserve.worker.sampler import Sampler
from tpserve.worker.service import DoneStep
from tpserve.worker.speculation import Speculator


class DraftRunner:
    """The draft with its weights, pages and a copy of the model's batch.

    It takes the same plans as the model's ranks, and decides from them as they do whether a step drafts, so neither
    side waits for a message that the other does not send.

    Parameters
    ----------
    door
        Of the draft's first rank: what the model's ranks come to, at `config.draft_door`.

    Raises
    ------
    WorkerError
        If the draft cannot be used beside this model, or here.
    TimeoutError
        If a rank of the model or the draft does not come in time; names it.
    """

    size_times: ClassVar[tuple[SizeTime, ...]] = ()
    """Nothing is captured."""

    def __init__(self, config: RankConfig, progress: Progress, door: socket.socket | None = None) -> None:
        speculation, draft_rank = config.speculation, config.draft_rank
        if speculation is None or draft_rank is None:
            raise WorkerError(f"rank {config.name} is none of a draft's own")
        target = check_manifest(config.artifact_dir, config.model_dir, config.tp_size, config.max_num_seqs)
        self._rank = config.rank
        self._link = DraftEnd(config, door)
        self._model = load_draft_rank(config, target, draft_rank, f"{config.group_name}-draft", progress)
        page_size = target.kv.page_size
        self._batch = Batch(
            config.max_num_seqs,
            target.max_num_batched_tokens,
            -(-target.max_model_len // page_size),
            page_size,
            max_num_rows=target.max_num_rows,
        )
        self._counts = Sampler(self._model.sample_kernel, config.max_num_seqs, target.vocab_size)
        """Samples nothing: of each slot with penalties, it counts what the model emitted."""
        proposer = _Sending(self._link, self._model, self._batch, self._counts, config.max_num_seqs, config.num_pages)
        self._speculator = Speculator(speculation, proposer, self._batch, target)
        self._next_step_id: int | None = None

    def submit(self, plan: StepPlan) -> DoneStep:
        """Run one step; see `execute`."""
        return DoneStep(self.execute(plan))

    def execute(self, plan: StepPlan) -> StepResult:
        """Follow one step, drafting for it if it verifies drafts, up to the tokens that it emitted.

        Returns
        -------
        StepResult
            Without tokens. `step_us` is the time until its proposals were sent, not what it waited for the model.

        Raises
        ------
        PlanError
            If the plan contradicts the batch, or comes out of order, or the model is elsewhere.
        TimeoutError, ConnectionError
            Naming the rank that is late or has gone.
        """
        started_us, started = time.time_ns() // 1000, time.perf_counter()
        if self._next_step_id is not None and plan.step_id != self._next_step_id:
            raise PlanError(f"step {plan.step_id} came where {self._next_step_id} was due")
        self._next_step_id = plan.step_id + 1
        before = self._speculator.collective_totals()
        self._speculator.apply(plan)
        self._batch.apply(plan)
        for added in plan.added_slots:
            self._counts.add(added)
        self._speculator.draft(plan)
        arrays = self._batch.prepare(plan)
        if not len(arrays.token_ids):
            return StepResult(plan.step_id, self._rank)
        step_us = int((time.perf_counter() - started) * 1e6)
        collectives = collectives_since(before, self._speculator.collective_totals())
        self._take(plan.step_id, arrays.sample_slots)
        return StepResult(
            step_id=plan.step_id,
            rank=self._rank,
            step_us=step_us,
            collective_us=sum(use.busy_us for use in collectives),
            collectives=collectives,
            started_us=started_us,
            num_tokens=len(arrays.token_ids),
            draft_us=self._speculator.draft_us,
        )

    def _take(self, step_id: int, expected: Array) -> None:
        """Wait for what the step emitted, and put it into the batch."""
        slots, tokens, counts = self._link.emitted(step_id)
        if len(slots) != len(expected) or (slots != expected).any():
            raise PlanError(f"step {step_id} sampled slots {slots.tolist()}, the draft knows {expected.tolist()}")
        token_ids = np.zeros((len(slots), int(counts.max(initial=0))), np.int32)
        token_ids[np.arange(token_ids.shape[1]) < counts[:, None]] = tokens
        self._batch.commit_runs(slots, token_ids, counts)
        self._counts.count(np.repeat(slots, counts), tokens)
        self._speculator.settle(slots, token_ids, counts)

    @property
    def collectives(self) -> str:
        """By which the draft's ranks exchange activations."""
        return self._model.collectives

    def close(self) -> None:
        """Leave the model's ranks, and the draft's."""
        self._link.close()
        self._speculator.close()


class _Sending(DraftModel):
    """Proposes to the model's ranks."""

    def __init__(
        self, link: DraftEnd, model: Model, batch: Batch, sampler: Sampler, max_num_seqs: int, num_pages: int
    ) -> None:
        super().__init__(model, batch, sampler, max_num_seqs, num_pages)
        self._link = link
        self._step_id = 0

    def begin(self, step_id: int) -> None:
        """Learn which step the calls that follow belong to."""
        self._step_id = step_id

    def propose(self, slots: Array, limits: Array, num_draft_tokens: int) -> Array:
        """Propose, and send it."""
        token_ids = super().propose(slots, limits, num_draft_tokens)
        self._link.propose(self._step_id, slots, token_ids)
        return token_ids
