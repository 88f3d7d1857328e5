"""Speculation on a GPU: the slots' tokens on the device, the draft's own model, and its part of each captured step.

Everything of a round is device work: the draft's steps, the target's step over last and draft tokens, and the
comparison, which sets how far each slot is. The host learns it with the result. Verification is that of
`worker.verify`: a draft token is accepted if it is the token that the target samples in its place.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np
import tvm_ffi

from tpserve.proto.manifest import Manifest
from tpserve.proto.messages import SlotAdd
from tpserve.proto.rank import RankConfig
from tpserve.proto.speculation import DEVICE_DRAFT_WINDOW, Speculation
from tpserve.worker.arrays import Array
from tpserve.worker.device_kv_cache import attention_workspace, device_pages
from tpserve.worker.device_sampler import DeviceSampler
from tpserve.worker.device_weights import Progress, load_device_parameters, pinned
from tpserve.worker.draft_lag import DraftLag
from tpserve.worker.library import Library

logger = logging.getLogger(__name__)


class DeviceDraft:
    """The draft model of one rank: whole, or its shard.

    Whole ones draft the same, and nothing travels between them. Shards exchange activations over the model's own group,
    whose collectives the draft's library finds by their names. Steps of the two take turns on one stream, in an order
    that is the same on all ranks: it hangs on plans and buckets alone. So does how often the draft catches up.

    Parameters
    ----------
    config
        Of the draft's rank; see `draft_rank_config`.
    manifest
        Of the draft; see `check_draft_manifest`.
    """

    def __init__(
        self, config: RankConfig, manifest: Manifest, kernels: Any, device: Any, stream: Any, progress: Progress
    ) -> None:
        self.manifest = manifest
        self._kernels = kernels
        self._step = Library(config.artifact_dir, manifest, kernels, device).step
        self._params = load_device_parameters(manifest, config, kernels, stream, progress)
        kv = manifest.kv
        self._kv = device_pages(kv, config.num_pages)
        self._heads = (config.max_num_seqs, manifest.num_q_heads, kv.num_kv_heads)
        self.max_num_tokens = manifest.max_num_batched_tokens
        words = kernels["attention_plan_size"](self.max_num_tokens, config.max_num_seqs, False)
        # Exchanged once: an exchange by DLPack makes streams wait for each other, which a capture forbids.
        self._plan = tvm_ffi.from_dlpack(cupy.zeros(words, cupy.int32))
        floats = kernels["attention_workspace_size"](self.max_num_tokens, *self._heads, kv.head_dim)
        self._workspace = attention_workspace(floats)
        self._max_num_seqs = config.max_num_seqs

    def forward(
        self, ids: Any, positions: Any, slots: Any, page_table: Any, rows: Any, *, decode_only: bool = False
    ) -> Any:
        """Queue a step over (T,) tokens, with `decode_only` one of a slot at most; return the (R, width) logits."""
        words = self._kernels["attention_plan_size"](ids.shape[0], self._max_num_seqs, decode_only)
        plan = self._plan._create_view((words,))
        self._kernels["attention_plan"](positions, slots, *self._heads, self.manifest.attention_window, plan)
        arguments = (ids, positions, slots, page_table, rows, plan, self._workspace, self._kv, self._params)
        logits, _ = self._step(*arguments)
        return logits


class DeviceSpeculation:
    """State of the slots of one rank, and what is queued for them.

    Parameters
    ----------
    width
        Tokens that a slot can hold.
    """

    def __init__(
        self,
        speculation: Speculation,
        draft: DeviceDraft,
        kernels: Any,
        max_num_seqs: int,
        width: int,
        num_staging: int,
    ) -> None:
        self.max_num_draft_tokens = most = speculation.max_num_draft_tokens
        self._draft = draft
        self._kernels = kernels
        self._tokens = cupy.zeros((max_num_seqs, width), cupy.int32)
        self._max_len = cupy.zeros(max_num_seqs, cupy.int32)
        arrays = (
            self._tokens,
            cupy.zeros(max_num_seqs, cupy.int32),
            self._max_len,
            cupy.full((max_num_seqs, most), -1, cupy.int32),
        )
        self._state = tuple(tvm_ffi.from_dlpack(array) for array in arrays)
        """tokens, num_tokens, max_len, draft_tokens."""
        self._counts = cupy.zeros(max_num_seqs, cupy.int32)
        self._drafted = cupy.zeros(max_num_seqs, cupy.int32)
        self._group_tensors = tuple(tvm_ffi.from_dlpack(array) for array in (self._counts, self._drafted))
        self._results = [(pinned(max_num_seqs, np.int32), pinned(max_num_seqs, np.int32)) for _ in range(num_staging)]
        work = [cupy.zeros(draft.max_num_tokens, cupy.int32) for _ in range(3)] + [
            cupy.zeros(max_num_seqs, cupy.int32) for _ in "ab"
        ]
        self._work = tuple(tvm_ffi.from_dlpack(array) for array in work)
        """ids, positions, slots of the draft's steps; slots and positions that it samples."""
        # Rows that are sampled: the last of each window, or each.
        windows = cupy.arange(max_num_seqs, dtype=cupy.int32) * DEVICE_DRAFT_WINDOW + (DEVICE_DRAFT_WINDOW - 1)
        self._window_rows = tvm_ffi.from_dlpack(windows)
        self._all_rows = tvm_ffi.from_dlpack(cupy.arange(max_num_seqs, dtype=cupy.int32))
        self._lag = DraftLag(max_num_seqs)

    # ---- between steps

    def add(self, added_slots: Sequence[SlotAdd], stream: Any) -> None:
        """Take what is known of sequences that enter slots, in order with the steps on `stream`.

        One with a `max_len` of 0 may not be drafted for: all its rows but the first are padding, to the draft, the
        model and both samplings. So a step gives it one token, by its own penalties or mask.
        """
        self._lag.add(added_slots)
        for added in added_slots:
            self._max_len[added.slot : added.slot + 1].set(np.asarray([added.max_len], np.int32), stream)
            if added.prefix_token_ids:
                prefix = np.asarray(added.prefix_token_ids, np.int32)
                self._tokens[added.slot, : len(prefix)].set(prefix, stream)

    def catch_up(
        self, decoding: Array, token_slots: Any, num_slots: int, num_draft_tokens: int, page_table: Any
    ) -> None:
        """Before a round, let the draft compute what plain steps have left out; not captured, since it is rare.

        Parameters
        ----------
        decoding : (B,) int32
            The slots that decode.
        token_slots : (num_slots * (1 + num_draft_tokens),) int32 tensor
            As the step is laid out.
        """
        behind = self._lag.take(decoding)
        if behind <= DEVICE_DRAFT_WINDOW - 2:
            return
        size = max(1, self._draft.max_num_tokens // num_slots)
        passes = range(DEVICE_DRAFT_WINDOW, behind + 2, size)
        logger.info("the draft catches up with %d plain steps in %d passes", behind, len(passes))
        stride, one = 1 + num_draft_tokens, self._all_rows._create_view((1,))
        for begin in reversed(passes):  # the earliest tokens first
            self._run_window(token_slots, stride, num_slots, size, begin, page_table, one)

    def plain_step(self, decoding: Array) -> None:
        """Note that slots, (B,) int32, move on without the draft."""
        self._lag.plain_step(decoding)

    # ---- within a captured step

    def draft(
        self, token_slots: Any, num_slots: int, num_draft_tokens: int, page_table: Any, sampler: DeviceSampler
    ) -> None:
        """Queue the draft's part of a round.

        Parameters
        ----------
        token_slots : (num_slots * (1 + num_draft_tokens),) int32 tensor
            As the step is laid out.
        """
        stride = 1 + num_draft_tokens
        rows = self._window_rows._create_view((num_slots,))
        logits = self._run_window(token_slots, stride, num_slots, DEVICE_DRAFT_WINDOW, 0, page_table, rows)
        sample_slots, sample_positions = (tensor._create_view((num_slots,)) for tensor in self._work[3:])
        for index in range(num_draft_tokens):
            if index:
                ids, positions, slots = (tensor._create_view((num_slots,)) for tensor in self._work[:3])
                where = (ids, positions, slots, sample_positions)
                self._kernels["draft_continue"](
                    *self._state, token_slots, stride, index, self._draft.manifest.max_model_len, *where
                )
                rows = self._all_rows._create_view((num_slots,))
                logits = self._draft.forward(ids, positions, slots, page_table, rows, decode_only=True)
                sample_slots = slots
            sampled = sampler.queue_draft(logits, sample_slots, sample_positions)
            self._kernels["draft_store"](*self._state, token_slots, stride, index, sampled, sample_slots)

    def compute_prompts(
        self, token_ids: Any, positions: Any, token_slots: Any, page_table: Any, decode_only: bool
    ) -> None:
        """Queue the draft's pass over a step that has run, so that it has the KV of prompts too.

        `decode_only`: no slot has several of the tokens.
        """
        rows = self._all_rows._create_view((1,))
        self._draft.forward(token_ids, positions, token_slots, page_table, rows, decode_only=decode_only)

    def load(self, num_draft_tokens: int, tensors: Sequence[Any]) -> None:
        """Queue what gives a step's rows their tokens, positions and slots, in place."""
        self._kernels["speculation_load"](*self._state, num_draft_tokens, *tensors)

    def accept(
        self, num_slots: int, num_draft_tokens: int, sampled: Any, sample_slots: Any, sample_positions: Any
    ) -> None:
        """Queue the comparison of draft tokens with what was sampled; it moves the slots on."""
        groups = sample_slots.shape[0] - num_slots * num_draft_tokens
        counts, drafted = (tensor._create_view((groups,)) for tensor in self._group_tensors)
        where = (sampled, sample_slots, sample_positions, counts, drafted)
        self._kernels["speculation_accept"](*self._state, num_slots, num_draft_tokens, *where)

    def fetch(self, num_groups: int, staging: int, stream: Any) -> None:
        """Queue the copies of what each group gave."""
        for device, host in zip((self._counts, self._drafted), self._results[staging], strict=True):
            if num_groups:
                device.data.copy_to_host_async(host.ctypes.data, 4 * num_groups, stream)

    def results(self, num_groups: int, staging: int) -> tuple[Array, Array]:
        """Return a finished step's tokens and verified draft tokens by group, (G,) int32 each."""
        counts, drafted = self._results[staging]
        return counts[:num_groups].copy(), drafted[:num_groups].copy()

    def _run_window(
        self, slots_at: Any, stride: int, num_slots: int, window: int, behind: int, page_table: Any, rows: Any
    ) -> Any:
        ids, positions, slots = (tensor._create_view((num_slots * window,)) for tensor in self._work[:3])
        sampled = tuple(tensor._create_view((num_slots,)) for tensor in self._work[3:])
        where = (ids, positions, slots, *sampled)
        limits = (window, behind, self._draft.manifest.max_model_len)
        self._kernels["draft_begin"](*self._state, slots_at, stride, *limits, *where)
        return self._draft.forward(ids, positions, slots, page_table, rows)
