"""Executes step plans on one rank: plan -> arrays -> compiled graph -> sampler -> result. Decides nothing."""

from __future__ import annotations

import logging
import socket
import time
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from tpserve.collectives.cpu import CollectiveStats
from tpserve.proto.messages import CollectiveUse, StepPlan, StepResult, TokenLogprobs
from tpserve.proto.rank import RankConfig, SizeTime
from tpserve.worker.arrays import Array, as_array
from tpserve.worker.batch import Batch, DraftTokens, StepArrays
from tpserve.worker.draft_link import TargetEnd
from tpserve.worker.errors import PlanError
from tpserve.worker.grammar import GrammarFollower
from tpserve.worker.group_tls import group_tls
from tpserve.worker.library import check_manifest
from tpserve.worker.masks import StepMasks
from tpserve.worker.model import Model, ModelRank, Progress
from tpserve.worker.sampler import Sampler
from tpserve.worker.service import DoneStep
from tpserve.worker.speculation import Speculator, check_rows, make_proposer
from tpserve.worker.verify import Sampled, verify

logger = logging.getLogger(__name__)


class Runner:
    """The compiled model with its weights, pages and batch, as one rank of its group."""

    size_times: ClassVar[tuple[SizeTime, ...]] = ()
    """Nothing is captured: a step takes what its tokens take."""

    def __init__(
        self,
        config: RankConfig,
        progress: Progress,
        door: socket.socket | None = None,
        drafts_door: socket.socket | None = None,
    ) -> None:
        """Join the group and load everything; returns when all ranks have come.

        Parameters
        ----------
        door
            Of rank 0 in a group across nodes: what the ranks come to, at `config.rendezvous`.
        drafts_door
            Of rank 0 if a draft has several ranks of its own: what they come to, at `config.target_door`.

        Raises
        ------
        WorkerError
            If the artifact or the weights cannot be used.
        TimeoutError
            If a rank of the group does not come in time; names it.
        """
        manifest = check_manifest(config.artifact_dir, config.model_dir, config.tp_size, config.max_num_seqs)
        check_rows(manifest, config)
        self._rank = config.rank
        # Before anything is loaded: that takes some ranks longer than others.
        drafts = TargetEnd(config, drafts_door) if config.draft_door else None
        self._grammars = GrammarFollower(config.model_dir, manifest.vocab_size, num_threads=1)
        self._grammars.warm_up()  # while weights are read
        self._model = Model(
            ModelRank(
                manifest=manifest,
                artifact_dir=config.artifact_dir,
                model_dir=config.model_dir,
                rank=config.rank,
                tp_size=config.tp_size,
                group_name=config.group_name,
                load_format=config.load_format,
                num_pages=config.num_pages,
                num_threads=config.num_threads,
                collective_timeout_s=config.collective_timeout_s,
                rendezvous=config.rendezvous if config.across_nodes else None,
                host=config.host,
                tls=group_tls(config),
            ),
            progress,
            door,
        )
        page_size = manifest.kv.page_size
        self._batch = Batch(
            config.max_num_seqs,
            manifest.max_num_batched_tokens,
            -(-manifest.max_model_len // page_size),
            page_size,
            max_num_rows=manifest.max_num_rows,
        )
        self._sampler = Sampler(self._model.sample_kernel, config.max_num_seqs, manifest.vocab_size)
        self._masks = StepMasks(self._grammars, self._sampler.mask_buffer)
        self._speculator: Speculator | None = None
        if config.speculation is not None:
            wanted = config.speculation
            proposer = make_proposer(config, wanted, self._model, self._batch, self._sampler, progress, drafts)
            self._speculator = Speculator(wanted, proposer, self._batch, manifest)
        self._draft: DraftTokens | None = None
        """What the present step verifies."""
        self._hidden: Any = None
        """The last step's second output."""
        self._aux: Any = None
        """Its third, for the proposer."""
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
        if logits is None and not len(self._batch.ended):
            return StepResult(plan.step_id, self._rank)
        fields: dict[str, Any] = {}  # only the first rank carries them
        if logits is not None:
            fields = self._sample_all(arrays, logits)
        if len(self._batch.ended):
            fields = _with_ended(fields, self._batch.ended.tolist())
        step_us = int((time.perf_counter() - started) * 1e6)
        collectives = collectives_since(before, self._collective_totals())
        return StepResult(
            step_id=plan.step_id,
            rank=self._rank,
            step_us=step_us,
            collective_us=sum(use.busy_us for use in collectives),
            collectives=collectives,
            started_us=started_us,
            num_tokens=len(arrays.token_ids),
            draft_us=0 if self._speculator is None else self._speculator.draft_us,
            **(fields if self._rank == 0 else {}),
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
        if self._speculator is None:
            _refuse_speculation(plan)
        else:
            self._speculator.apply(plan)
        self._next_step_id = plan.step_id + 1
        self._batch.apply(plan)
        for added in plan.added_slots:
            self._sampler.add(added)
            (self._hidden_slots.add if added.sampling.wants_hidden else self._hidden_slots.discard)(added.slot)
        self._grammars.apply(plan)
        self._draft = None if self._speculator is None else self._speculator.draft(plan)
        arrays = self._batch.prepare(plan, self._draft)
        if not len(arrays.token_ids):
            return arrays, None
        num_drafted = 0 if self._draft is None else int(self._draft.counts.sum())
        self._masks.start(arrays.sample_slots[: len(arrays.sample_slots) - num_drafted])
        logits, self._hidden, self._aux = self._model.step(
            arrays.token_ids, arrays.positions, arrays.token_slots, self._batch.page_table, arrays.sample_rows
        )
        return arrays, logits

    def sample(self, arrays: StepArrays, logits: Any) -> tuple[Array, dict[int, TokenLogprobs]]:
        """Sample what `forward` returned of a step without drafts, and make it the next step's input.

        See `Sampler.sample`.
        """
        self._masks.wait()
        token_ids, logprobs = self._sampler.sample(logits, arrays.sample_slots, arrays.sample_positions)
        self._batch.commit(arrays, token_ids)
        self._masks.took(token_ids)
        if not self._hidden_slots.isdisjoint(logprobs):
            row_of = {int(slot): row for row, slot in enumerate(arrays.sample_slots)}
            logprobs = {slot: self._with_hidden(row_of[slot], slot, item) for slot, item in logprobs.items()}
        return token_ids, logprobs

    def sample_drafted(self, arrays: StepArrays, logits: Any, draft: DraftTokens) -> Sampled:
        """Sample what `forward` returned of a step that verifies drafts, and make it the next step's input."""
        sampled = verify(arrays, logits, draft, self._sampler, self._masks, self._with_hidden)
        self._batch.commit_runs(sampled.slots, sampled.token_ids, sampled.counts)
        return sampled

    def _sample_all(self, arrays: StepArrays, logits: Any) -> dict[str, Any]:
        """Sample a step; return the result's fields that only rank 0 carries."""
        if self._draft is not None:
            sampled = self.sample_drafted(arrays, logits, self._draft)
            fields = sampled.fields()
            emitted = sampled.slots, sampled.token_ids, sampled.counts
        else:
            failures, mask_us = self._masks.wait()
            token_ids, logprobs = self.sample(arrays, logits)
            fields = {
                "slots": tuple(arrays.sample_slots.tolist()),
                "token_ids": tuple(token_ids.tolist()),
                "logprobs": {slot: (item,) for slot, item in logprobs.items()},
                "failures": failures,
                "mask_us": mask_us,
            }
            emitted = arrays.sample_slots, token_ids[:, None], np.ones(len(token_ids), np.int32)
        if self._speculator is not None:
            self._speculator.settle(*emitted)
            self._speculator.computed(arrays, self._aux)
        return fields

    def _with_hidden(self, row: int, slot: int, logprobs: TokenLogprobs) -> TokenLogprobs:
        """Add a row of the final norm for a slot that asked for its."""
        if slot not in self._hidden_slots:
            return logprobs
        hidden = as_array(self._hidden)[row].astype(np.float32)  # of (R, hidden_size)
        return replace(logprobs, hidden=hidden.tobytes())

    def _collective_totals(self) -> dict[str, CollectiveStats]:
        """Return totals of the model and its draft together, by kind."""
        totals = self._model.collective_totals()
        if self._speculator is not None:
            for kind, more in self._speculator.collective_totals().items():
                totals[kind] = more + totals[kind] if kind in totals else more
        return totals

    @property
    def collectives(self) -> str:
        """By which ranks exchange activations."""
        return self._model.collectives

    def close(self) -> None:
        """Leave the group."""
        self._grammars.close()
        self._masks.close()
        self._model.close()
        if self._speculator is not None:
            self._speculator.close()


def _refuse_speculation(plan: StepPlan) -> None:
    if plan.num_draft_tokens:
        raise PlanError(f"step {plan.step_id} asks for {plan.num_draft_tokens} draft tokens: no draft is loaded")
    for added in plan.added_slots:
        if added.max_len:
            raise PlanError(f"step {plan.step_id} lets slot {added.slot} speculate: no draft is loaded")


def _with_ended(fields: dict[str, Any], ended: list[int]) -> dict[str, Any]:
    """Add slots at their end, of which nothing is sampled, to a result's fields."""
    slots: tuple[int, ...] = fields.get("slots", ())
    none = (0,) * len(ended)
    drafted = fields.get("drafted", ())
    return fields | {
        "slots": (*slots, *ended),
        "counts": (*fields.get("counts", (1,) * len(slots)), *none),
        "drafted": (*drafted, *none) if drafted else (),
    }


def collectives_since(
    before: dict[str, CollectiveStats], after: dict[str, CollectiveStats]
) -> tuple[CollectiveUse, ...]:
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
