"""An EAGLE-3 head on a GPU: its part of each captured step, on the ranks of its target.

In every step of the target, plain, verifying or with prompts, the head's projections run behind the target over all of
the step's tokens: that gives the head KV of every pair whose row is the target's (`head_rows.cuh` says which, and why
no more needs to be kept than one row of each slot). So a slot may be drafted for at any time, a rejection is nothing
to undo, and pages of the prefix cache hold the head's KV as soon as they hold the target's. Plain steps pay for it with
the projection of three hidden rows, of queries, keys and values, two norms and some copies: of a model of 80 layers
about a hundredth of the step; there is no attention in it, no feed-forward layer and no logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import cupy
import numpy as np
import tvm_ffi

from tpserve.proto.manifest import Manifest
from tpserve.proto.messages import SlotAdd
from tpserve.proto.rank import RankConfig
from tpserve.worker.device_kv_cache import attention_workspace, device_pages
from tpserve.worker.device_speculation import DraftLogits, ProposerBase, Round, State
from tpserve.worker.device_weights import Progress, as_device_tensor, load_device_parameters
from tpserve.worker.head_facts import head_token_ids
from tpserve.worker.later_steps import LaterSteps
from tpserve.worker.library import Library


class DeviceHead(ProposerBase):
    """The head of one rank, split as its target is; see `DeviceProposer`.

    Its steps use the target's group, in an order that is the same on all ranks. It is never behind: all steps of the
    target compute what it needs. A slot whose kept row is not that of
    its last token but one proposes nothing.

    Parameters
    ----------
    config
        Of the head's rank; see `draft_rank_config`.
    manifest
        Of the head; see `check_head_manifest`.
    target, target_params
        Manifest and parameters of its model, some of which it takes.
    """

    def __init__(
        self,
        config: RankConfig,
        manifest: Manifest,
        kernels: Any,
        device: Any,
        stream: Any,
        progress: Progress,
        *,
        target: Manifest,
        target_params: Sequence[Any],
    ) -> None:
        self.manifest = manifest  # its logits come whole: its tokens are so few that its library brings them together
        self._kernels = kernels
        library = Library(config.artifact_dir, manifest, kernels, device)
        self._project, self._append, self._step = map(library.function, ("project", "append", "step"))
        own = (target, target_params)
        self._params = load_device_parameters(manifest, config, kernels, stream, progress, own)
        kv, slots, hidden = manifest.kv, config.max_num_seqs, manifest.hidden_size
        self._kv = device_pages(kv, config.num_pages)
        self._heads = (slots, manifest.num_q_heads, kv.num_kv_heads)
        self._later = LaterSteps(kernels, self._heads, manifest.attention_window, manifest.max_model_len, behind=1)
        # Each exchanged once: an exchange by DLPack makes streams wait for each other, which a capture forbids.
        words = kernels["attention_plan_size"](slots, slots, True)
        self._plan = tvm_ffi.from_dlpack(cupy.zeros(words, cupy.int32))
        self._workspace = attention_workspace(kernels["attention_workspace_size"](slots, *self._heads, kv.head_dim))
        self._work = tuple(tvm_ffi.from_dlpack(cupy.zeros(slots, cupy.int32)) for _ in range(4))
        """ids, positions and slots of the first step of a round, and positions that are sampled."""
        self._all_rows = tvm_ffi.from_dlpack(cupy.arange(slots, dtype=cupy.int32))
        self._kept = _rows(slots, hidden)
        """By slot, the projected row that its next pair is of."""
        self._kept_at = cupy.full(slots, -1, cupy.int32)
        """Positions of those rows; -1 where there is none."""
        self._kept_at_tensor = tvm_ffi.from_dlpack(self._kept_at)
        self._first_rows = _rows(slots, hidden)
        num_tokens = target.max_num_batched_tokens
        self._pairs = tuple(tvm_ffi.from_dlpack(cupy.zeros(num_tokens, cupy.int32)) for _ in range(2))
        """Positions and slots of the pairs of a target's step."""
        self._pair_rows = _rows(num_tokens, hidden)
        token_ids = head_token_ids(manifest, config.model_dir, target.vocab_size)
        self._token_ids = tvm_ffi.from_dlpack(cupy.asarray(token_ids.astype(np.int32)))
        shape = (slots, target.padded_vocab_size)
        self._logits = tvm_ffi.from_dlpack(cupy.full(shape, -np.inf, cupy.float32))
        """Of a step's slots, by the target's tokens: those that the head does not have keep -inf."""

    # ---- between steps

    def add(self, added_slots: Sequence[SlotAdd], stream: Any) -> None:
        """See DeviceProposer."""
        for added in added_slots:
            self._kept_at[added.slot : added.slot + 1].set(np.asarray([-1], np.int32), stream)

    # ---- within a captured step

    def steps(self, state: State, run: Round) -> Iterator[DraftLogits]:
        """See DeviceProposer."""
        ids, positions, slots, sample_positions = (tensor._create_view((run.num_slots,)) for tensor in self._work)
        at, max_len = (run.token_slots, run.stride), self.manifest.max_model_len
        rows = self._all_rows._create_view((run.num_slots,))
        hidden = self._first_rows._create_view((run.num_slots, self.manifest.hidden_size))
        out = self._logits._create_view((run.num_slots, self._logits.shape[1]))
        words = self._kernels["attention_plan_size"](run.num_slots, self._heads[0], True)
        plan = self._plan._create_view((words,))
        self._kernels["head_begin"](*state, self._kept_at_tensor, *at, max_len, ids, positions, slots, sample_positions)
        self._kernels["take_rows"](self._kept, slots, hidden)
        self._later.queue(state, run, slots)
        self._kernels["attention_plan"](positions, slots, *self._heads, self.manifest.attention_window, plan)
        next_ids = self._later.token_ids._create_view((run.num_slots,))
        for index in range(run.num_draft_tokens):
            if index:
                ids, positions, slots, sample_positions, plan = self._later.step(index, run.num_slots)
            arguments = (ids, positions, slots, run.page_table, rows, plan, self._workspace, hidden)
            logits, hidden = self._step(*arguments, self._kv, self._params)
            self._kernels["spread_logits"](logits, self._token_ids, out)
            yield out, slots, sample_positions, next_ids

    def extend(self, tensors: Sequence[Any], aux: Any, page_table: Any) -> Any:
        """Queue the head KV of a step's pairs, behind the target.

        Parameters
        ----------
        tensors
            Token ids, positions and slots that the target ran, (T,) int32 each, and what else it takes.
        aux : (T, 3 * target's hidden size) bfloat16 tensor
            The step's hidden rows.

        Returns
        -------
        (T, hidden size) bfloat16 tensor
            Projected rows, for `keep`.
        """
        token_ids, positions, token_slots = tensors[:3]
        count = token_ids.shape[0]
        rows = self._project(aux, self._params)
        pair_positions, pair_slots = (tensor._create_view((count,)) for tensor in self._pairs)
        pair_rows = self._pair_rows._create_view((count, self.manifest.hidden_size))
        source = (self._kept_at_tensor, self.manifest.max_model_len, rows, self._kept)
        self._kernels["head_pairs"](positions, token_slots, *source, pair_positions, pair_slots, pair_rows)
        self._append(token_ids, pair_positions, pair_slots, page_table, pair_rows, self._kv, self._params)
        return rows

    def keep(self, num_tokens: Any, tensors: Sequence[Any], rows: Any) -> None:
        """Queue the copy of the row that each slot goes on from, when it is known what was accepted.

        Parameters
        ----------
        num_tokens : (S,) int32 tensor
            Of each slot; 0 while its prompt runs.
        tensors, rows
            As `extend` was given and gave them.
        """
        positions, token_slots = tensors[1:3]
        self._kernels["head_keep"](positions, token_slots, num_tokens, rows, self._kept, self._kept_at_tensor)


def _rows(count: int, hidden: int) -> Any:
    """Return (count, hidden) bfloat16 zeros."""
    return as_device_tensor(cupy.zeros((count, hidden), cupy.uint16), "bfloat16")
