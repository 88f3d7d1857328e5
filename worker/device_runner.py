"""Executes step plans on one GPU: one captured CUDA graph per bucket, token ids to sampled ids, host never waiting.

A plan becomes one copy of a few hundred bytes and one graph launch. Sampled tokens stay on the device, where the next
step finds them; the host learns them later. Decides nothing.

A step with grammars is two parts: a graph up to the logits, and the sampling behind it. While the graph runs, the host
learns the tokens of the step before, follows them in their grammars, and sends the masks that the sampling waits for.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import cupy
import numpy as np
import tvm_ffi

from tpserve.proto.manifest import Manifest
from tpserve.proto.messages import StepPlan, StepResult
from tpserve.proto.rank import RankConfig
from tpserve.proto.speculation import SPARSE_METHODS
from tpserve.worker.arrays import Array
from tpserve.worker.batch import Batch
from tpserve.worker.buckets import Bucket, capture_order, make_buckets
from tpserve.worker.captured_step import CapturedStep, PendingStep, capture_graph, time_steps, unowned
from tpserve.worker.device_draft import check_draft_manifest, check_head_manifest, draft_rank_config
from tpserve.worker.device_draft_link import DeviceDraftLink
from tpserve.worker.device_draft_model import DeviceDraft
from tpserve.worker.device_group import DeviceGroup
from tpserve.worker.device_head import DeviceHead
from tpserve.worker.device_inputs import NUM_STAGING, DeviceInputs, choose_step, without_limits
from tpserve.worker.device_kv_cache import attention_workspace, device_pages
from tpserve.worker.device_lookup import DeviceLookup
from tpserve.worker.device_remote import DeviceRemote
from tpserve.worker.device_sampler import DeviceSampler
from tpserve.worker.device_speculation import DeviceProposer, DeviceSpeculation
from tpserve.worker.device_suffix import DeviceSuffix
from tpserve.worker.device_weights import Progress, load_device_parameters, pinned
from tpserve.worker.errors import PlanError
from tpserve.worker.grammar import ConstrainedRow, GrammarFollower
from tpserve.worker.library import Library, check_manifest, load_cuda_runtime, load_kernels, tvm
from tpserve.worker.verify_layout import VerifyBucket, lay_out_verify, make_verify_buckets, read_groups

logger = logging.getLogger(__name__)


class DeviceRunner:
    """The compiled model with its weights, pages and batch on one GPU, as one rank of its group."""

    speculation_type: ClassVar[type[DeviceSpeculation]] = DeviceSpeculation
    """What queues a round's draft and comparison; another one in a benchmark's subclass."""

    def __init__(self, config: RankConfig, progress: Progress, door: socket.socket | None = None) -> None:
        """Join the group, load everything and capture every bucket; returns when all ranks have.

        Parameters
        ----------
        door
            Of rank 0 in a group: what the ranks come to, at `config.rendezvous`.

        Raises
        ------
        WorkerError
            If the artifact or the weights cannot be used.
        TimeoutError
            If a rank of the group does not come in time; names it.
        """
        manifest = check_manifest(config.artifact_dir, config.model_dir, config.tp_size, config.max_num_seqs)
        self._config = config
        self._rank = config.rank
        draft = self._find_draft(manifest)
        self._grammars = GrammarFollower(config.model_dir, manifest.vocab_size, _num_mask_threads(config.tp_size))
        self._grammars.warm_up()  # while weights are read
        cupy.cuda.Device(config.device).use()
        load_cuda_runtime()
        self._device = tvm.cuda(config.device)
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._kernels = load_kernels(config.artifact_dir)
        self._kernels["init_device"](config.device)
        self._group: DeviceGroup | None = None
        if config.tp_size > 1:  # before the library, which looks its collectives up
            sizes = [manifest.hidden_size] if draft is None else [manifest.hidden_size, draft[1].hidden_size]
            self._group = DeviceGroup(self._kernels, config, max(sizes), door)
        self._link: DeviceDraftLink | None = None
        if config.speculation is not None and config.speculation.num_draft_ranks:
            self._link = DeviceDraftLink(self._kernels, config, config.speculation)
        library = Library(config.artifact_dir, manifest, self._kernels, self._device)
        self._step = library.step
        with tvm_ffi.use_raw_stream(self._device, self._stream.ptr), self._stream:
            self._params = load_device_parameters(manifest, config, self._kernels, self._stream, progress)
        kv = manifest.kv
        self._kv = device_pages(kv, config.num_pages)
        max_pages = -(-manifest.max_model_len // kv.page_size)
        self._batch = Batch(
            config.max_num_seqs, manifest.max_num_batched_tokens, max_pages, kv.page_size, tokens_on_device=True
        )
        self._last_token = tvm_ffi.from_dlpack(cupy.zeros(config.max_num_seqs, cupy.int32))
        self._sampler = DeviceSampler(
            self._kernels,
            config.max_num_seqs,
            manifest.vocab_size,
            manifest.padded_vocab_size,
            NUM_STAGING,
            manifest.max_num_rows,
            None if self._group is None else self._group.gather_logits,
            config.tp_size,
        )
        self._draft: DeviceDraft | None = None
        self._head: DeviceHead | None = None
        self._speculation = self._make_speculation(manifest, draft, progress)
        self._constrained: tuple[list[ConstrainedRow], int, int, int] = ([], 0, 0, 1)
        """Groups of rows of the last step that had grammars, its number of rows, its staging, and rows of a group."""
        self._heads = (config.max_num_seqs, manifest.num_q_heads, kv.num_kv_heads)
        self._window = manifest.attention_window
        num_tokens = manifest.max_num_batched_tokens
        floats = self._kernels["attention_workspace_size"](num_tokens, *self._heads, kv.head_dim)
        self._plan = cupy.zeros(self._plan_words(Bucket(num_tokens, config.max_num_seqs)), cupy.int32)
        self._workspace = attention_workspace(floats)
        buckets = make_buckets(config.max_num_seqs, manifest.max_num_batched_tokens)
        verify_buckets: list[VerifyBucket] = []
        if self._speculation is not None:
            most = self._speculation.max_num_draft_tokens
            verify_buckets = make_verify_buckets(config.max_num_seqs, manifest.max_num_rows, most)
        size = max(bucket.num_inputs for bucket in (*buckets, *(each.bucket for each in verify_buckets)))
        self._inputs = DeviceInputs(self._kernels, self._stream, config.max_num_seqs, max_pages, size)
        self._events = [cupy.cuda.Event(block=True, disable_timing=True) for _ in range(NUM_STAGING)]
        self._next_step_id: int | None = None
        self._hidden_slots: set[int] = set()
        """Slots whose sequence wants its hidden rows."""
        self._last_finish = time.perf_counter()
        if self._group is not None:
            self._group.meet("weights")  # a rank that is still loading must not look late to a kernel
        self._captured = self._capture([CapturedStep(bucket) for bucket in buckets])
        windows = () if self._speculation is None else self._speculation.windows
        rounds = [CapturedStep(each.bucket, each, window) for each in verify_buckets for window in windows]
        self._verifying = self._capture(rounds)
        self.size_times = time_steps(self._captured, self._stream, manifest.vocab_size)
        """What steps of each size take but for attention, which hangs on what they hold."""
        self._grammars.wait_warm()
        if self._group is not None:
            self._group.meet("graphs")

    def _find_draft(self, manifest: Manifest) -> tuple[RankConfig, Manifest] | None:
        """Return what this rank is told of the draft that it loads, and its manifest, if there is one."""
        speculation = self._config.speculation
        if speculation is None or speculation.method in SPARSE_METHODS or speculation.num_draft_ranks:
            return None
        config = draft_rank_config(self._config, speculation)
        check = check_head_manifest if speculation.method == "eagle3" else check_draft_manifest
        return config, check(config, manifest)

    def _make_speculation(
        self, manifest: Manifest, draft: tuple[RankConfig, Manifest] | None, progress: Progress
    ) -> DeviceSpeculation | None:
        """Make what drafts, if anything does, and load it."""
        speculation = self._config.speculation
        if speculation is None:
            return None
        with tvm_ffi.use_raw_stream(self._device, self._stream.ptr), self._stream:
            proposer: DeviceProposer
            if self._link is not None:
                proposer = DeviceRemote(self._link)
            elif speculation.method == "suffix":
                proposer = DeviceSuffix(self._kernels)
            elif draft is None:
                proposer = DeviceLookup(speculation, self._kernels)
            else:
                given = (*draft, self._kernels, self._device, self._stream, progress)
                if speculation.method == "eagle3":
                    proposer = self._head = DeviceHead(*given, target=manifest, target_params=self._params)
                else:
                    proposer = self._draft = DeviceDraft(*given)
            sizes = (self._config.max_num_seqs, manifest.max_model_len + 1, NUM_STAGING)
            return self.speculation_type(speculation, proposer, self._kernels, *sizes)

    # ---- capture

    def _capture(self, steps: list[CapturedStep]) -> list[CapturedStep]:
        """Capture each step's graph, largest first so that the allocator's pool has room for all.

        Returns
        -------
        The steps, smallest first.
        """
        started = time.perf_counter()
        steps = sorted(steps, key=lambda step: capture_order(step.bucket), reverse=True)
        with tvm_ffi.use_raw_stream(self._device, self._stream.ptr), self._stream:
            for step in steps:
                step.plan = tvm_ffi.from_dlpack(self._plan[: self._plan_words(step.bucket)])
                step.graph = capture_graph(self._stream, partial(self._run, step))
                if self._draft is not None and not step.num_draft_tokens:
                    step.prompt_graph = capture_graph(self._stream, partial(self._run_draft, step))
            self._stream.synchronize()
        logger.info("captured %d graphs in %.1f s", len(steps), time.perf_counter() - started)
        return steps[::-1]

    def _run_draft(self, step: CapturedStep) -> None:
        """Queue the draft's pass over a step that has run."""
        assert self._draft is not None
        self._draft.run_prompts(step.tensors, self._inputs.page_table, decode_only=step.bucket.decode_only)

    def _capture_forward(self, step: CapturedStep) -> None:
        """Capture a bucket's step up to the logits; nothing runs, and the pool has room from the whole step's capture.

        The memory of the logits, and of a head's rows, goes back to the pool, as it does in every other graph: only
        what is launched later writes to it, and the sampling stands before that in the stream. Holding it would cost
        megabytes for each bucket.
        """
        started = time.perf_counter()
        self._stream.begin_capture(cupy.cuda.runtime.streamCaptureModeRelaxed)
        logits, step.forward_hidden, head_rows = self._forward(step)
        step.forward_graph = self._stream.end_capture()
        step.logits = unowned(logits)
        step.head_rows = None if head_rows is None else unowned(head_rows)
        step.forward_graph.upload(self._stream)
        took_ms = (time.perf_counter() - started) * 1e3
        logger.info("captured the forward pass of %d tokens for grammars in %.1f ms", step.bucket.num_tokens, took_ms)

    def _run(self, step: CapturedStep) -> None:
        """Queue everything that one step does on the device."""
        logits, step.hidden, head_rows = self._forward(step)
        self._sample(step, logits, head_rows)

    def _sample(self, step: CapturedStep, logits: Any, head_rows: Any) -> None:
        """Queue the sampling of a step's logits, and what hangs on it; `head_rows` as `_forward` gave them."""
        sample_slots, sample_positions = step.tensors[4:]
        ids = self._sampler.queue(logits, sample_slots, sample_positions)
        if self._speculation is not None:
            where = (ids, sample_slots, sample_positions)
            self._speculation.accept(step.num_slots, step.num_draft_tokens, *where)
            if self._head is not None:
                self._head.keep(self._speculation.num_tokens, step.tensors, head_rows)
        else:
            self._kernels["store_last_tokens"](ids, sample_slots, self._last_token)

    def _forward(self, step: CapturedStep) -> tuple[Any, Any, Any]:
        """Queue a step up to its logits; return them, the hidden rows that they are of, and rows of a head or None."""
        token_ids, positions, token_slots, sample_rows = step.tensors[:4]
        if self._speculation is None:
            self._kernels["load_last_tokens"](token_slots, self._last_token, token_ids)
        else:
            drafts = step.num_draft_tokens
            if drafts:
                self._speculation.draft(step.round_over(self._inputs.page_table), self._sampler)
            self._speculation.load(drafts, step.tensors)
        self._kernels["attention_plan"](positions, token_slots, *self._heads, self._window, step.plan)
        logits, hidden, *aux = self._step(
            token_ids,
            positions,
            token_slots,
            self._inputs.page_table,
            sample_rows,
            step.plan,
            self._workspace,
            self._kv,
            self._params,
        )
        head_rows = None if self._head is None else self._head.extend(step.tensors, aux[0], self._inputs.page_table)
        return logits, hidden, head_rows

    # ---- steps

    def submit(self, plan: StepPlan) -> PendingStep:
        """Queue one step behind those before it; returns at once.

        Raises
        ------
        PlanError
            If the plan contradicts the batch, or comes out of order.
        """
        if self._next_step_id is not None and plan.step_id != self._next_step_id:
            raise PlanError(f"step {plan.step_id} came where {self._next_step_id} was due")
        self._check_drafts(plan)
        self._next_step_id = plan.step_id + 1
        staging = self._inputs.next_staging()
        # How far slots that speculate are, and where they end, only the device knows.
        updates = self._batch.apply(without_limits(plan))
        self._grammars.apply(plan)
        drafts = plan.num_draft_tokens
        arrays = lay_out_verify(self._batch.running(), drafts) if drafts else self._batch.prepare(plan)
        slots = arrays.sample_slots[:: 1 + drafts].copy()
        self._use_device()
        with tvm_ffi.use_raw_stream(self._device, self._stream.ptr), self._stream:
            if updates:
                self._inputs.update_pages(updates, staging)
            if plan.removed_slots and self._speculation is not None:
                self._speculation.remove(plan.removed_slots)
            if plan.added_slots:
                self._sampler.add(plan.added_slots, staging, self._stream)
                if self._speculation is not None:
                    self._speculation.add(plan.added_slots, self._stream)
                for added in plan.added_slots:
                    (self._hidden_slots.add if added.sampling.wants_hidden else self._hidden_slots.discard)(added.slot)
            if not len(arrays.token_ids):
                return PendingStep(self, plan, staging)
            window = self._speculation.look_back(slots) if self._speculation is not None and drafts else 0
            step = choose_step(self._verifying if drafts else self._captured, arrays, drafts, window)
            self._inputs.fill(step, arrays, staging)
            rows = self._grammars.rows(slots)
            if self._speculation is not None and drafts:
                self._speculation.catch_up(step.round_over(self._inputs.page_table))
            failures, mask_us = self._launch(step, rows, staging)
            self._constrained = (rows, len(arrays.sample_slots), staging, 1 + drafts)
            self._sampler.fetch(len(arrays.sample_slots), arrays.sample_slots, staging, self._stream)
            if self._speculation is not None:
                self._speculation.fetch(len(slots), staging, self._stream)
            hidden = {}
            if self._hidden_slots:
                hidden = self._fetch_hidden(step.forward_hidden if rows else step.hidden, slots, 1 + drafts)
            self._events[staging].record(self._stream)
            if self._speculation is not None:
                self._speculation.settled()
            if self._speculation is not None and not drafts:
                self._speculation.note_step(slots, has_prompts=bool(plan.chunks))
                if plan.chunks and step.prompt_graph is not None:  # behind the result: no first token waits for it
                    step.prompt_graph.launch(self._stream)
        if not drafts:
            self._batch.commit(arrays, None)
        return PendingStep(self, plan, staging, slots, len(arrays.token_ids), step.bucket, failures, mask_us, hidden)

    def _check_drafts(self, plan: StepPlan) -> None:
        most = 0 if self._speculation is None else self._speculation.max_num_draft_tokens
        if plan.num_draft_tokens > most:
            raise PlanError(
                f"step {plan.step_id} asks for {plan.num_draft_tokens} draft tokens, this replica verifies {most}"
            )
        if plan.num_draft_tokens and plan.chunks:
            raise PlanError(f"step {plan.step_id} verifies draft tokens beside prompts, which a GPU does not")

    def _launch(self, step: CapturedStep, rows: list[ConstrainedRow], staging: int) -> tuple[dict[int, str], int]:
        """Queue a step whose inputs are queued; return which slots cannot go on, and the microseconds of its masks."""
        before, num_before, staging_before, width = self._constrained
        buffer = self._sampler.mask_buffers[staging]
        if not rows:
            if before:  # followed no further: those slots have left, or wait for nothing that this step samples
                buffer.mask_rows.fill(-1)
                self._sampler.send_masks(staging, 0, self._stream)
            step.graph.launch(self._stream)
            return {}, 0
        if step.forward_graph is None:
            self._capture_forward(step)
        step.forward_graph.launch(self._stream)
        if before:
            self._events[staging_before].synchronize()
        started = time.perf_counter()
        self._grammars.advance(before, self._sampler.token_ids(num_before, staging_before)[::width])
        failures = self._grammars.fill(rows, buffer)
        self._sampler.send_masks(staging, int(buffer.mask_rows.max()) + 1, self._stream)
        mask_us = int((time.perf_counter() - started) * 1e6)
        self._sample(step, step.logits, step.head_rows)
        return failures, mask_us

    def finish(self, pending: PendingStep) -> StepResult:
        """Wait for a submitted step; see `PendingStep.wait`."""
        plan, slots, bucket = pending.plan, pending.slots, pending.bucket
        if slots is None or bucket is None:
            return StepResult(plan.step_id, self._rank)
        self._use_device()
        self._events[pending.staging].synchronize()
        if self._group is not None:
            self._group.raise_if_late()
        if self._link is not None:
            self._link.raise_if_late()
        now = time.perf_counter()
        # It ran from the end of the step before it, or from its submission where the device had nothing to do.
        step_us = int((now - max(self._last_finish, pending.submitted)) * 1e6)
        self._last_finish = now
        is_first = self._rank == 0  # only it carries tokens
        rows, num_tokens = np.arange(len(slots)), pending.num_tokens
        fields: dict[str, Any] = {"slots": tuple(slots.tolist())}
        draft_us = 0
        if self._speculation is not None:
            counts, drafted = self._speculation.results(len(slots), pending.staging)
            emitted = read_groups(slots, plan.num_draft_tokens, counts, drafted)
            rows, fields = emitted.rows, emitted.fields
            # Rows without a draft token, and those of slots at their end, were padding.
            num_tokens -= int((counts == 0).sum()) + len(slots) * plan.num_draft_tokens - int(drafted.sum())
            slots = np.repeat(slots, counts)
            draft_us = self._speculation.draft_us(pending.staging) if plan.num_draft_tokens else 0
        if is_first:
            fields["token_ids"], logprobs = self._sampler.results(slots, rows, pending.staging)
            for slot, row in pending.hidden.items():
                # bfloat16 is the upper half of a float32.
                last = replace(logprobs[slot][0], hidden=(row.astype(np.uint32) << 16).tobytes())
                logprobs[slot] = (last,)
            fields["logprobs"] = logprobs
        return StepResult(
            plan.step_id,
            self._rank,
            **fields if is_first else {},
            step_us=step_us,
            started_us=time.time_ns() // 1000 - step_us,
            num_tokens=num_tokens,
            bucket_tokens=bucket.num_tokens,
            bucket_rows=bucket.num_rows,
            failures=pending.failures if is_first else {},
            mask_us=pending.mask_us if is_first else 0,
            draft_us=draft_us,
        )

    @property
    def collectives(self) -> str:
        """By which ranks exchange activations."""
        return "none" if self._group is None else self._group.backend

    def close(self) -> None:
        """Wait for what is queued, so that its memory may go, and leave the group."""
        self._grammars.close()
        self._use_device()
        self._stream.synchronize()
        for step in (*self._captured, *self._verifying):
            step.release()  # NCCL's communicator waits for the last graph that holds its kernels
        if self._group is not None:
            self._group.close()
        if self._link is not None:
            self._link.close()

    def _fetch_hidden(self, hidden: Any, slots: Array, stride: int) -> dict[int, Array]:
        """Queue copies of the hidden rows of slots that asked; rare, so each has memory of its own.

        Such a slot has one row, the first of its `stride`.
        """
        rows: dict[int, Array] = {}
        width = hidden.shape[1]
        for group, slot in enumerate(slots.tolist()):
            if slot in self._hidden_slots:
                host = rows[slot] = pinned(width, np.uint16)
                source = self._kernels["device_address"](hidden) + 2 * width * group * stride
                cupy.cuda.runtime.memcpyAsync(
                    host.ctypes.data, source, host.nbytes, cupy.cuda.runtime.memcpyDeviceToHost, self._stream.ptr
                )
        return rows

    def _use_device(self) -> None:
        """Make the rank's GPU this thread's: CUDA's current device is a thread's own, and calls come from several."""
        cupy.cuda.Device(self._config.device).use()

    def _plan_words(self, bucket: Bucket) -> int:
        slots = self._config.max_num_seqs
        return int(self._kernels["attention_plan_size"](bucket.num_tokens, slots, bucket.decode_only))


def _num_mask_threads(tp_size: int) -> int:
    """Ranks of one host share its cores; a mask takes microseconds, so a few threads are enough."""
    return max(1, min(8, (os.cpu_count() or 1) // (2 * tp_size)))
