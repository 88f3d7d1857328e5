"""Speculation on a GPU: the slots' tokens on the device, and the part of each captured step that drafts and verifies.

Everything of a round is device work: the draft's steps, the target's step over last and draft tokens, and the
comparison, which sets how far each slot is. The host learns it with the result. Verification is that of
`worker.verify`: a draft token is accepted if it is the token that the target samples in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import cupy
import numpy as np
import tvm_ffi

from tpserve.proto.messages import SlotAdd
from tpserve.proto.speculation import Speculation
from tpserve.worker.arrays import Array
from tpserve.worker.device_sampler import DeviceSampler
from tpserve.worker.device_weights import pinned

State = tuple[Any, ...]
"""Tensors by slot: tokens, num_tokens, max_len, draft_tokens; `SlotState` of speculation_rows.cuh."""
DraftLogits = tuple[Any, Any, Any, Any]
"""(B, width) float32 logits of one draft token of each slot, (B,) int32 slots and positions to sample, and where the
tokens go that the next step runs; slot -1: nothing is drafted there, and the next step gets some token."""


_TIME_WORDS = 4
"""Two times of the device's clock, in nanoseconds."""


@dataclass(frozen=True, slots=True)
class Round:
    """A step that drafts and verifies, as it is laid out."""

    token_slots: Any
    """(num_slots * stride,) int32 tensor: decoding slot b is that of row b * stride."""
    num_slots: int
    num_draft_tokens: int
    page_table: Any
    window: int = 0
    """Tokens of each slot that the draft's first step runs: one of the proposer's windows."""

    @property
    def stride(self) -> int:
        """Rows of one slot."""
        return 1 + self.num_draft_tokens


class DeviceProposer(Protocol):
    """What drafts for the slots of one rank: a model, here or elsewhere, a head, or tokens that were seen before."""

    logits_by_rank: bool
    """Whether a step gives one rank's part of the vocabulary."""
    windows: tuple[int, ...]
    """Tokens of each slot that the first step of a round may run, fewest first: rounds are captured with each."""

    def add(self, added_slots: Sequence[SlotAdd], stream: Any) -> None:
        """Take sequences that enter slots, in order with the steps on `stream`."""

    def remove(self, state: State, removed_slots: Sequence[int]) -> None:
        """Let sequences go, before others are added; their tokens still stand in `state`, in order with the steps."""

    def plain_step(self, decoding: Array) -> None:
        """Note that slots, (B,) int32, move on in a step without drafts and without prompts."""

    def prompt_step(self, decoding: Array) -> None:
        """Note that slots, (B,) int32, move on in a step with prompts."""

    def look_back(self, decoding: Array) -> int:
        """Return which of the windows a round with slots, (B,) int32, must have, which is launched next."""

    def catch_up(self, state: State, run: Round) -> None:
        """Queue what must run before a round that is about to be launched."""

    def steps(self, state: State, run: Round) -> Iterator[DraftLogits]:
        """Queue the draft's steps of a round, one for each draft token, which is stored before the next begins.

        One that has no logits to sample stores all of them itself, and yields nothing.
        """

    def settled(self, state: State) -> None:
        """Queue what must follow each step that has run tokens; `state` is behind it."""


class ProposerBase:
    """What a `DeviceProposer` does that keeps nothing between steps, for such ones to build on."""

    logits_by_rank = False
    windows: tuple[int, ...] = (0,)

    def add(self, added_slots: Sequence[SlotAdd], stream: Any) -> None:
        """Nothing."""

    def remove(self, state: State, removed_slots: Sequence[int]) -> None:
        """Nothing."""

    def plain_step(self, decoding: Array) -> None:
        """Nothing."""

    def prompt_step(self, decoding: Array) -> None:
        """Nothing."""

    def look_back(self, decoding: Array) -> int:
        """Nowhere."""
        return 0

    def catch_up(self, state: State, run: Round) -> None:
        """Nothing."""

    def settled(self, state: State) -> None:
        """Nothing."""


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
        draft: DeviceProposer,
        kernels: Any,
        max_num_seqs: int,
        width: int,
        num_staging: int,
    ) -> None:
        self.max_num_draft_tokens = most = speculation.max_num_draft_tokens
        self._draft = draft
        self._kernels = kernels
        self._tokens = cupy.zeros((max_num_seqs, width), cupy.int32)
        self._num_tokens = cupy.zeros(max_num_seqs, cupy.int32)
        self._max_len = cupy.zeros(max_num_seqs, cupy.int32)
        arrays = (
            self._tokens,
            self._num_tokens,
            self._max_len,
            cupy.full((max_num_seqs, most), -1, cupy.int32),
        )
        self._state: State = tuple(tvm_ffi.from_dlpack(array) for array in arrays)
        # In one array, for one copy: when drafting began and ended, and what each group gave.
        size = -(-max_num_seqs // 4) * 4  # kernels want multiples of 16 bytes
        self._starts = (_TIME_WORDS, _TIME_WORDS + size)
        self._outcome = cupy.zeros(_TIME_WORDS + 2 * size, cupy.int32)
        self._times = tvm_ffi.from_dlpack(self._outcome[:_TIME_WORDS].view(cupy.int64))
        self._group_tensors = tuple(
            tvm_ffi.from_dlpack(self._outcome[start : start + max_num_seqs]) for start in self._starts
        )
        self._results = [pinned(self._outcome.size, np.int32) for _ in range(num_staging)]

    @property
    def state(self) -> State:
        """What is known of the slots."""
        return self._state

    @property
    def num_tokens(self) -> Any:
        """(S,) int32 tensor: tokens of each slot; 0 while its prompt runs."""
        return self._state[1]

    # ---- between steps

    def remove(self, removed_slots: Sequence[int]) -> None:
        """Let sequences leave their slots; before `add`, which may give those to others."""
        self._draft.remove(self._state, removed_slots)

    def add(self, added_slots: Sequence[SlotAdd], stream: Any) -> None:
        """Take what is known of sequences that enter slots, in order with the steps on `stream`.

        One with a `max_len` of 0 may not be drafted for: all its rows but the first are padding, to the draft, the
        model and both samplings. So a step gives it one token, by its own penalties or mask.
        """
        self._draft.add(added_slots, stream)
        for added in added_slots:
            self._num_tokens[added.slot : added.slot + 1].set(np.zeros(1, np.int32), stream)
            self._max_len[added.slot : added.slot + 1].set(np.asarray([added.max_len], np.int32), stream)
            if added.prefix_token_ids:
                prefix = np.asarray(added.prefix_token_ids, np.int32)
                self._tokens[added.slot, : len(prefix)].set(prefix, stream)

    @property
    def windows(self) -> tuple[int, ...]:
        """With each of which rounds are captured; see `DeviceProposer`."""
        return self._draft.windows

    def look_back(self, decoding: Array) -> int:
        """Return which of the windows the next round needs, which is of slots, (B,) int32."""
        return self._draft.look_back(decoding)

    def catch_up(self, run: Round) -> None:
        """Queue what the draft must compute before a round."""
        self._kernels["note_time"](self._times, 0)
        self._draft.catch_up(self._state, run)

    def note_step(self, decoding: Array, *, has_prompts: bool) -> None:
        """Note that slots, (B,) int32, move on in a step without drafts."""
        (self._draft.prompt_step if has_prompts else self._draft.plain_step)(decoding)

    def settled(self) -> None:
        """Queue what must follow a step that has run tokens."""
        self._draft.settled(self._state)

    # ---- within a captured step

    def draft(self, run: Round, sampler: DeviceSampler) -> None:
        """Queue the draft's part of a round."""
        at = (run.token_slots, run.stride)
        for index, (logits, slots, positions, next_ids) in enumerate(self._draft.steps(self._state, run)):
            sampled = sampler.queue_draft(logits, slots, positions, by_rank=self._draft.logits_by_rank)
            self._kernels["draft_store"](*self._state, *at, index, sampled, slots, next_ids)
        self._kernels["note_time"](self._times, 1)

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
        """Queue the copy of what each group gave."""
        if num_groups:
            self._outcome.data.copy_to_host_async(self._results[staging].ctypes.data, self._outcome.nbytes, stream)

    def results(self, num_groups: int, staging: int) -> tuple[Array, Array]:
        """Return a finished step's tokens and verified draft tokens by group, (G,) int32 each."""
        found = self._results[staging]
        counts, drafted = (found[start : start + num_groups].copy() for start in self._starts)
        return counts, drafted

    def draft_us(self, staging: int) -> int:
        """Return what drafting took of a finished round, with what was caught up, or what was waited for."""
        began, ended = self._results[staging][:_TIME_WORDS].view(np.int64)
        return int(ended - began) // 1000
