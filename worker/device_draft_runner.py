"""One rank of a draft that has GPUs of its own: follows the model's batch, and drafts where a step verifies.

It keeps the slots as the model's ranks do. What only their GPUs know, how many tokens a step gave each slot and which,
their first rank tells after each step, from device to device: this rank's host waits for nothing within a step.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import cupy
import tvm_ffi

from tpserve.proto.messages import StepPlan, StepResult
from tpserve.proto.rank import RankConfig, SizeTime
from tpserve.worker.batch import Batch
from tpserve.worker.buckets import capture_order, make_buckets
from tpserve.worker.captured_step import CapturedStep, capture_graph
from tpserve.worker.device_draft import check_draft_manifest, draft_rank_config
from tpserve.worker.device_draft_link import DeviceDraftLink
from tpserve.worker.device_draft_model import DeviceDraft
from tpserve.worker.device_group import DeviceGroup
from tpserve.worker.device_inputs import NUM_STAGING, DeviceInputs, choose_step, without_limits
from tpserve.worker.device_sampler import DeviceSampler
from tpserve.worker.device_speculation import DeviceSpeculation
from tpserve.worker.device_weights import Progress
from tpserve.worker.errors import PlanError, WorkerError
from tpserve.worker.library import check_manifest, load_cuda_runtime, load_kernels, tvm
from tpserve.worker.verify_layout import lay_out_verify, make_verify_buckets

logger = logging.getLogger(__name__)


class _Times:
    """Of one step: where the draft begins and ends, and where the model has. Its own, as results may be read late."""

    def __init__(self) -> None:
        self.begin, self.end, self.settled = (cupy.cuda.Event(block=True) for _ in range(3))


@dataclass(frozen=True, slots=True)
class _Followed:
    """A step on its way; without times nothing was queued."""

    runner: DeviceDraftRunner
    plan: StepPlan
    num_tokens: int = 0
    times: _Times | None = None

    def wait(self) -> StepResult:
        """Block until it is done."""
        return self.runner.finish(self)


class DeviceDraftRunner:
    """The draft with its weights, pages and a copy of the model's batch on one GPU; see `draft_runner` for a CPU's.

    It takes the same plans as the model's ranks, and decides from them as they do what a step drafts and whether it
    runs tokens, so neither side waits for a letter that the other does not send.

    Parameters
    ----------
    group_door
        Of the draft's first rank, where it has several: what those come to, at `config.rendezvous`.
    link_door
        Of the draft's first rank: what the model's ranks and the draft's come to, at `config.draft_door`.

    Raises
    ------
    WorkerError
        If the draft cannot be used beside this model, or here.
    TimeoutError
        If a rank of the model or the draft does not come in time; names it.
    """

    size_times: ClassVar[tuple[SizeTime, ...]] = ()
    """What a step takes is for the model's ranks to say."""

    def __init__(
        self,
        config: RankConfig,
        progress: Progress,
        group_door: socket.socket | None = None,
        link_door: socket.socket | None = None,
    ) -> None:
        speculation, draft_rank = config.speculation, config.draft_rank
        if speculation is None or draft_rank is None:
            raise WorkerError(f"rank {config.name} is none of a draft's own")
        target = check_manifest(config.artifact_dir, config.model_dir, config.tp_size, config.max_num_seqs)
        draft_config = draft_rank_config(config, speculation)
        manifest = check_draft_manifest(draft_config, target)
        self._config, self._rank = config, config.rank
        cupy.cuda.Device(config.device).use()
        load_cuda_runtime()
        self._device = tvm.cuda(config.device)
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._kernels = load_kernels(draft_config.artifact_dir)
        self._kernels["init_device"](config.device)
        self._link = DeviceDraftLink(self._kernels, config, speculation, link_door)
        self._group: DeviceGroup | None = None
        if speculation.draft_tp_size > 1:  # before the library, which looks its collectives up
            ranks = range(config.tp_size, config.tp_size + speculation.draft_tp_size)
            self._group = DeviceGroup(self._kernels, draft_config, manifest.hidden_size, group_door, ranks)
        with tvm_ffi.use_raw_stream(self._device, self._stream.ptr), self._stream:
            self._draft = DeviceDraft(draft_config, manifest, self._kernels, self._device, self._stream, progress)
            sizes = (config.max_num_seqs, target.max_model_len + 1, NUM_STAGING)
            self._speculation = DeviceSpeculation(speculation, self._draft, self._kernels, *sizes)
        self._sampler = DeviceSampler(
            self._kernels,
            config.max_num_seqs,
            manifest.vocab_size,
            manifest.padded_vocab_size,
            NUM_STAGING,
            gather=None if self._group is None else self._group.gather_logits,
            num_ranks=speculation.draft_tp_size,
        )
        page_size = target.kv.page_size
        max_pages = -(-target.max_model_len // page_size)
        self._batch = Batch(
            config.max_num_seqs, target.max_num_batched_tokens, max_pages, page_size, tokens_on_device=True
        )
        plain = [CapturedStep(each) for each in make_buckets(config.max_num_seqs, target.max_num_batched_tokens)]
        most = speculation.max_num_draft_tokens
        rounds = [
            CapturedStep(each.bucket, each, window)
            for each in make_verify_buckets(config.max_num_seqs, target.max_num_rows, most)
            for window in self._speculation.windows
        ]
        size = max(step.bucket.num_inputs for step in (*plain, *rounds))
        self._inputs = DeviceInputs(self._kernels, self._stream, config.max_num_seqs, max_pages, size)
        self._last_use = [cupy.cuda.Event(block=True, disable_timing=True) for _ in range(NUM_STAGING)]
        """Behind the last step that used each of the pinned copies."""
        self._next_step_id: int | None = None
        if self._group is not None:
            self._group.meet("weights")  # a rank that is still loading must not look late to a kernel
        self._prompts = self._capture(plain, self._run_prompts)
        self._rounds = self._capture(rounds, self._run_round)
        if self._group is not None:
            self._group.meet("graphs")

    # ---- capture

    def _capture(self, steps: list[CapturedStep], run: Callable[[CapturedStep], None]) -> list[CapturedStep]:
        """Capture each step's graph, largest first; return the steps, smallest first."""
        started = time.perf_counter()
        steps = sorted(steps, key=lambda step: capture_order(step.bucket), reverse=True)
        with tvm_ffi.use_raw_stream(self._device, self._stream.ptr), self._stream:
            for step in steps:
                step.graph = capture_graph(self._stream, partial(run, step))
            self._stream.synchronize()
        logger.info("captured %d graphs of the draft in %.1f s", len(steps), time.perf_counter() - started)
        return steps[::-1]

    def _run_prompts(self, step: CapturedStep) -> None:
        """Queue the draft's pass over a step's tokens, whose draft KV is wanted later."""
        self._speculation.load(0, step.tensors)
        self._draft.run_prompts(step.tensors, self._inputs.page_table, decode_only=step.bucket.decode_only)

    def _run_round(self, step: CapturedStep) -> None:
        """Queue the draft's part of a round."""
        self._speculation.draft(step.round_over(self._inputs.page_table), self._sampler)

    # ---- steps

    def submit(self, plan: StepPlan) -> _Followed:
        """Queue what the draft does in a step, and the wait for what the model has given; returns at once.

        Raises
        ------
        PlanError
            If the plan contradicts the batch, or comes out of order.
        """
        if self._next_step_id is not None and plan.step_id != self._next_step_id:
            raise PlanError(f"step {plan.step_id} came where {self._next_step_id} was due")
        self._next_step_id = plan.step_id + 1
        updates = self._batch.apply(without_limits(plan))
        drafts = plan.num_draft_tokens
        arrays = lay_out_verify(self._batch.running(), drafts) if drafts else self._batch.prepare(plan)
        slots = arrays.sample_slots[:: 1 + drafts].copy()
        staging = self._inputs.next_staging()
        cupy.cuda.Device(self._config.device).use()
        last_use = self._last_use[staging]
        last_use.synchronize()  # the coordinator waits for the model, and this may be further behind than that
        times = _Times()
        with tvm_ffi.use_raw_stream(self._device, self._stream.ptr), self._stream:
            if updates:
                self._inputs.update_pages(updates, staging)
            if plan.added_slots:
                self._sampler.add(plan.added_slots, staging, self._stream)
                self._speculation.add(plan.added_slots, self._stream)
            if not len(arrays.token_ids):
                last_use.record(self._stream)
                return _Followed(self, plan)
            if drafts or plan.chunks:
                window = self._speculation.look_back(slots) if drafts else 0
                step = choose_step(self._rounds if drafts else self._prompts, arrays, drafts, window)
                self._inputs.fill(step, arrays, staging)
            times.begin.record(self._stream)
            if drafts:
                self._speculation.catch_up(step.round_over(self._inputs.page_table))
                step.graph.launch(self._stream)
                self._link.send_drafts(self._speculation.state)
            else:
                self._speculation.note_step(slots, has_prompts=bool(plan.chunks))
                if plan.chunks:
                    step.graph.launch(self._stream)
            times.end.record(self._stream)
            self._link.take_told(self._speculation.state)
            times.settled.record(self._stream)
            last_use.record(self._stream)
        if not drafts:
            self._batch.commit(arrays, None)
        return _Followed(self, plan, len(arrays.token_ids), times)

    def finish(self, followed: _Followed) -> StepResult:
        """Wait for a step that was submitted, up to where the model has told what it gave.

        Returns
        -------
        StepResult
            Without tokens. `step_us` is what the draft took, not what it waited for the model.
        """
        plan, times = followed.plan, followed.times
        if times is None:
            return StepResult(plan.step_id, self._rank)
        cupy.cuda.Device(self._config.device).use()
        times.settled.synchronize()
        if self._group is not None:
            self._group.raise_if_late()
        self._link.raise_if_late()
        step_us = int(cupy.cuda.get_elapsed_time(times.begin, times.end) * 1e3)
        return StepResult(
            plan.step_id,
            self._rank,
            step_us=step_us,
            started_us=time.time_ns() // 1000 - step_us,
            num_tokens=followed.num_tokens,
            draft_us=step_us if plan.num_draft_tokens else 0,
        )

    @property
    def collectives(self) -> str:
        """By which the draft's ranks exchange activations."""
        return "none" if self._group is None else self._group.backend

    def close(self) -> None:
        """Wait for what is queued, so that its memory may go, and leave the draft's ranks and the model's."""
        cupy.cuda.Device(self._config.device).use()
        self._stream.synchronize()
        for step in (*self._prompts, *self._rounds):
            step.release()
        if self._group is not None:
            self._group.close()
        self._link.close()
