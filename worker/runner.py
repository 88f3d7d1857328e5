"""Executes step plans on one rank: plan -> arrays -> compiled graph -> sampler -> result. Decides nothing."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from tpserve.collectives.cpu import CollectiveStats
from tpserve.proto.messages import CollectiveUse, StepPlan, StepResult, TokenLogprobs
from tpserve.proto.rank import RankConfig
from tpserve.worker.arrays import Array, aligned_zeros, as_tensor
from tpserve.worker.batch import Batch, StepArrays
from tpserve.worker.errors import PlanError
from tpserve.worker.grammar import ConstrainedRow, GrammarFollower
from tpserve.worker.host_group import join
from tpserve.worker.kv_cache import KVCache
from tpserve.worker.library import Library, check_manifest, load_kernels
from tpserve.worker.sampler import Sampler
from tpserve.worker.service import DoneStep
from tpserve.worker.weights import dummy_parameters, load_parameters

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (parameters loaded, parameters in all)."""


_Masks = tuple[dict[int, str], int]
"""What came of computing masks: by slot, why its sequence cannot go on; and microseconds."""


class Runner:
    """The compiled model with its weights, pages and batch, as one rank of its group."""

    def __init__(self, config: RankConfig, progress: Progress, door: socket.socket | None = None) -> None:
        """Join the group and load everything; returns when all ranks have come.

        Parameters
        ----------
        door
            Of rank 0 in a group across nodes: what the ranks come to, at `config.rendezvous`.

        Raises
        ------
        WorkerError
            If the artifact or the weights cannot be used.
        TimeoutError
            If a rank of the group does not come in time; names it.
        """
        manifest = check_manifest(config.artifact_dir, config.model_dir, config.tp_size, config.max_num_seqs)
        self._rank = config.rank
        self._grammars = GrammarFollower(config.model_dir, manifest.vocab_size, num_threads=1)
        self._grammars.warm_up()  # while weights are read
        kernels = load_kernels(config.artifact_dir)
        self._communicator = join(config, kernels, door)
        kernels["set_num_threads"](config.num_threads)
        library = Library(config.artifact_dir, manifest, kernels)
        self._step = library.step
        if config.load_format == "dummy":
            arrays = dummy_parameters(manifest, config.rank)
        else:
            arrays = load_parameters(manifest, config.model_dir, config.rank)
        self._params: list[Any] = []
        for array in arrays:
            self._params.append(as_tensor(array))
            progress(len(self._params), len(manifest.params))
        self._kv = KVCache(manifest.kv, config.num_pages)
        # Attention on a CPU needs neither a plan nor room for partial sums.
        self._no_workspace = (as_tensor(aligned_zeros((0,), np.int32)), as_tensor(aligned_zeros((0,), np.float32)))
        page_size = manifest.kv.page_size
        max_pages = -(-manifest.max_model_len // page_size)
        self._batch = Batch(config.max_num_seqs, manifest.max_num_batched_tokens, max_pages, page_size)
        self._sampler = Sampler(kernels["sample"], config.max_num_seqs, manifest.vocab_size)
        self._masking = ThreadPoolExecutor(1, "grammar-masks")
        self._constrained: list[ConstrainedRow] = []
        """Rows of the present step; once it is sampled, those that the next step's masks follow."""
        self._sampled: Array | None = None
        self._masks: Future[_Masks] | None = None
        self._hidden: Any = None
        """The last step's second output."""
        self._hidden_slots: set[int] = set()
        """Slots whose sequence wants its hidden rows."""
        self._next_step_id: int | None = None
        self._grammars.wait_warm()

    def submit(self, plan: StepPlan) -> DoneStep:
        """Run one step; see `execute`."""
        return DoneStep(self.execute(plan))

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step.

        Raises
        ------
        PlanError
            If the plan contradicts the batch, or comes out of order.
        RuntimeError
            From a collective, naming the late rank; from a kernel, naming the slot whose logits are not finite.
        """
        started_us, started = time.time_ns() // 1000, time.perf_counter()
        before = self._collective_totals()
        arrays, logits = self.forward(plan)
        if logits is None:
            return StepResult(plan.step_id, self._rank)
        failures, mask_us = self._await_masks()
        token_ids, logprobs = self.sample(arrays, logits)
        if not self._hidden_slots.isdisjoint(logprobs):
            logprobs = self._with_hidden(arrays, logprobs)
        step_us = int((time.perf_counter() - started) * 1e6)
        collectives = _since(before, self._collective_totals())
        is_first = self._rank == 0  # only it carries tokens
        return StepResult(
            step_id=plan.step_id,
            rank=self._rank,
            slots=tuple(arrays.sample_slots.tolist()) if is_first else (),
            token_ids=tuple(token_ids.tolist()) if is_first else (),
            logprobs=logprobs if is_first else {},
            step_us=step_us,
            collective_us=sum(use.busy_us for use in collectives),
            collectives=collectives,
            started_us=started_us,
            num_tokens=len(arrays.token_ids),
            failures=failures if is_first else {},
            mask_us=mask_us if is_first else 0,
        )

    def forward(self, plan: StepPlan) -> tuple[StepArrays, Any]:
        """Run the graph; `sample` must follow before the next step, unless there was nothing to run.

        Returns
        -------
        arrays : StepArrays
        logits : tensor (R, padded_vocab_size) float32, or None
            One row for each token to sample; None if the plan runs no tokens.

        Raises
        ------
        PlanError, RuntimeError
            As `execute`.
        """
        if self._next_step_id is not None and plan.step_id != self._next_step_id:
            raise PlanError(f"step {plan.step_id} came where {self._next_step_id} was due")
        if plan.num_draft_tokens:
            raise PlanError(f"step {plan.step_id} asks for {plan.num_draft_tokens} draft tokens: no draft is loaded")
        self._next_step_id = plan.step_id + 1
        self._batch.apply(plan)
        for added in plan.added_slots:
            self._sampler.add(added)
            (self._hidden_slots.add if added.sampling.wants_hidden else self._hidden_slots.discard)(added.slot)
        self._grammars.apply(plan)
        arrays = self._batch.prepare(plan)
        if not len(arrays.token_ids):
            return arrays, None
        self._start_masks(arrays)
        inputs = (arrays.token_ids, arrays.positions, arrays.token_slots, self._batch.page_table, arrays.sample_rows)
        logits, self._hidden = self._step(*map(as_tensor, inputs), *self._no_workspace, self._kv.layers, self._params)
        return arrays, logits

    def sample(self, arrays: StepArrays, logits: Any) -> tuple[Array, dict[int, TokenLogprobs]]:
        """Sample what `forward` returned, and make it the next step's input; see `Sampler.sample`."""
        self._await_masks()
        token_ids, logprobs = self._sampler.sample(logits, arrays)
        self._batch.commit(arrays, token_ids)
        self._sampled = token_ids.copy() if self._constrained else None
        return token_ids, logprobs

    def _start_masks(self, arrays: StepArrays) -> None:
        """Follow the last step's tokens and compute this step's masks, while the graph runs."""
        before, sampled = self._constrained, self._sampled
        self._constrained = rows = self._grammars.rows(arrays.sample_slots)
        self._masks = None
        if before or rows:
            self._masks = self._masking.submit(self._compute_masks, before, sampled, rows)

    def _compute_masks(self, before: list[ConstrainedRow], sampled: Array | None, rows: list[ConstrainedRow]) -> _Masks:
        started = time.perf_counter()
        if sampled is not None:
            self._grammars.advance(before, sampled)
        failures = self._grammars.fill(rows, self._sampler.mask_buffer)
        return failures, int((time.perf_counter() - started) * 1e6)

    def _await_masks(self) -> _Masks:
        """Wait for this step's masks."""
        return ({}, 0) if self._masks is None else self._masks.result()

    def _with_hidden(self, arrays: StepArrays, logprobs: dict[int, TokenLogprobs]) -> dict[int, TokenLogprobs]:
        """Add the hidden rows of the slots that asked for theirs."""
        hidden = np.from_dlpack(self._hidden)  # (R, hidden_size) float32
        rows = {int(slot): row for row, slot in enumerate(arrays.sample_slots)}
        return {
            slot: replace(item, hidden=hidden[rows[slot]].tobytes()) if slot in self._hidden_slots else item
            for slot, item in logprobs.items()
        }

    def _collective_totals(self) -> dict[str, CollectiveStats]:
        return {} if self._communicator is None else self._communicator.stats()

    def close(self) -> None:
        """Leave the group."""
        self._grammars.close()
        self._masking.shutdown(wait=False)
        if self._communicator is not None:
            self._communicator.close()


def _since(before: dict[str, CollectiveStats], after: dict[str, CollectiveStats]) -> tuple[CollectiveUse, ...]:
    """Return what was done between two readings of the totals."""
    return tuple(
        CollectiveUse(
            kind,
            now.num_calls - before[kind].num_calls,
            now.num_bytes - before[kind].num_bytes,
            int(now.busy_us - before[kind].busy_us),
        )
        for kind, now in after.items()
    )
