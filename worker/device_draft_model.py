"""A draft model on a GPU: the first step of its rounds looks back at the last tokens, and needs nothing else.

Knows when it is behind the slots that it drafts for (`draft_lag`), and nothing of verification.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import cupy
import tvm_ffi

from tpserve.proto.manifest import Manifest
from tpserve.proto.messages import SlotAdd
from tpserve.proto.rank import RankConfig
from tpserve.proto.speculation import DEVICE_DRAFT_WINDOWS
from tpserve.worker.arrays import Array
from tpserve.worker.device_kv_cache import attention_workspace, device_pages
from tpserve.worker.device_speculation import DraftLogits, ProposerBase, Round, State
from tpserve.worker.device_weights import Progress, load_device_parameters
from tpserve.worker.draft_lag import DraftLag, passes_before, smallest_window
from tpserve.worker.later_steps import LaterSteps
from tpserve.worker.library import Library

logger = logging.getLogger(__name__)


class DeviceDraft(ProposerBase):
    """The draft model of one rank: whole, or its shard; see `DeviceProposer`.

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

    windows: tuple[int, ...] = DEVICE_DRAFT_WINDOWS

    def __init__(
        self, config: RankConfig, manifest: Manifest, kernels: Any, device: Any, stream: Any, progress: Progress
    ) -> None:
        self.manifest = manifest
        self.logits_by_rank = config.tp_size > 1
        self._kernels = kernels
        self._step = Library(config.artifact_dir, manifest, kernels, device).step
        self._params = load_device_parameters(manifest, config, kernels, stream, progress)
        kv = manifest.kv
        self._kv = device_pages(kv, config.num_pages)
        self._max_num_seqs = config.max_num_seqs
        self._heads = (config.max_num_seqs, manifest.num_q_heads, kv.num_kv_heads)
        self._max_num_tokens = manifest.max_num_batched_tokens
        words = kernels["attention_plan_size"](self._max_num_tokens, config.max_num_seqs, False)
        # Exchanged once: an exchange by DLPack makes streams wait for each other, which a capture forbids.
        self._plan = tvm_ffi.from_dlpack(cupy.zeros(words, cupy.int32))
        floats = kernels["attention_workspace_size"](self._max_num_tokens, *self._heads, kv.head_dim)
        self._workspace = attention_workspace(floats)
        work = [cupy.zeros(self._max_num_tokens, cupy.int32) for _ in range(3)] + [
            cupy.zeros(config.max_num_seqs, cupy.int32) for _ in "ab"
        ]
        self._work = tuple(tvm_ffi.from_dlpack(array) for array in work)
        """ids, positions, slots of the draft's windows and prompts; slots and positions that it samples of those."""
        self._later = LaterSteps(kernels, self._heads, manifest.attention_window, manifest.max_model_len, behind=0)
        # Rows that are sampled: the last of each window, or each.
        places = cupy.arange(config.max_num_seqs, dtype=cupy.int32)
        self._window_rows = {size: tvm_ffi.from_dlpack(places * size + (size - 1)) for size in self.windows}
        self._all_rows = tvm_ffi.from_dlpack(cupy.arange(config.max_num_seqs, dtype=cupy.int32))
        self._lag = DraftLag(config.max_num_seqs)
        self._num_missing = 0
        """Of the round that is about to be launched; see `DraftLag.take`."""

    # ---- between steps

    def add(self, added_slots: Sequence[SlotAdd], stream: Any) -> None:
        """See DeviceProposer."""
        self._lag.add(added_slots)

    def plain_step(self, decoding: Array) -> None:
        """See DeviceProposer."""
        self._lag.plain_step(decoding)

    def prompt_step(self, decoding: Array) -> None:
        """See DeviceProposer."""
        self._lag.prompt_step(decoding)

    def look_back(self, decoding: Array) -> int:
        """See DeviceProposer."""
        self._num_missing = self._lag.take(decoding)
        return smallest_window(self._num_missing, self.windows)

    def catch_up(self, state: State, run: Round) -> None:
        """Let the draft compute what lies before the round's window; not captured, since it is rare."""
        passes = passes_before(run.window, self._num_missing, max(1, self._max_num_tokens // run.num_slots))
        if passes:
            logger.debug("the draft catches up with %d tokens of each slot in %s", self._num_missing, passes)
        one = self._all_rows._create_view((1,))
        for size, behind in passes:
            self._forward(*self._begin_window(state, run, size, behind), run.page_table, one)

    # ---- within a captured step

    def steps(self, state: State, run: Round) -> Iterator[DraftLogits]:
        """See DeviceProposer."""
        rows = self._window_rows[run.window]._create_view((run.num_slots,))
        sample_slots, sample_positions = sampled = self._sampled(run)
        window = self._begin_window(state, run, run.window, 0)
        self._later.queue(state, run, sample_slots)
        logits = self._forward(*window, run.page_table, rows)
        next_ids = self._later.token_ids._create_view((run.num_slots,))
        yield logits, *sampled, next_ids
        rows = self._all_rows._create_view((run.num_slots,))
        for index in range(1, run.num_draft_tokens):
            ids, positions, slots, sample_positions, plan = self._later.step(index, run.num_slots)
            logits = self._run(ids, positions, slots, run.page_table, rows, plan)
            yield logits, slots, sample_positions, next_ids

    def run_prompts(self, tensors: Sequence[Any], page_table: Any, *, decode_only: bool) -> None:
        """Queue the draft's pass over a step that has run, so that it has the KV of prompts too.

        Parameters
        ----------
        tensors
            Token ids, positions and slots of the step, (T,) int32 each, and what else it takes.
        decode_only
            No slot has several of the tokens.
        """
        ids, positions, slots = tensors[:3]
        own_slots = self._work[2]._create_view(slots.shape)
        self._kernels["draft_prompts"](positions, slots, self.manifest.max_model_len, own_slots)
        rows = self._all_rows._create_view((1,))
        self._forward(ids, positions, own_slots, page_table, rows, decode_only=decode_only)

    def _sampled(self, run: Round) -> tuple[Any, Any]:
        """Return the (B,) slots and positions that a window samples."""
        slots, positions = (tensor._create_view((run.num_slots,)) for tensor in self._work[3:])
        return slots, positions

    def _begin_window(self, state: State, run: Round, window: int, behind: int) -> tuple[Any, Any, Any]:
        """Queue what finds the last `window` tokens of each slot before its last `behind`; return (T,) of each."""
        ids, positions, slots = (tensor._create_view((run.num_slots * window,)) for tensor in self._work[:3])
        limits = (window, behind, self.manifest.max_model_len)
        where = (ids, positions, slots, *self._sampled(run))
        self._kernels["draft_begin"](*state, run.token_slots, run.stride, *limits, *where)
        return ids, positions, slots

    def _forward(
        self, ids: Any, positions: Any, slots: Any, page_table: Any, rows: Any, *, decode_only: bool = False
    ) -> Any:
        """Queue a step over (T,) tokens, with `decode_only` one of a slot at most; return the (R, width) logits."""
        words = self._kernels["attention_plan_size"](ids.shape[0], self._max_num_seqs, decode_only)
        plan = self._plan._create_view((words,))
        self._kernels["attention_plan"](positions, slots, *self._heads, self.manifest.attention_window, plan)
        return self._run(ids, positions, slots, page_table, rows, plan)

    def _run(self, *where: Any) -> Any:
        return self._step(*where, self._workspace, self._kv, self._params)[0]
