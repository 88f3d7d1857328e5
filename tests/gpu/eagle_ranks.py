"""A rank on a GPU that keeps from which logits its head drafts; found by its name in each process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import cupy
import numpy as np
import numpy.typing as npt
import tvm_ffi

from tpserve.proto.messages import SlotAdd
from tpserve.proto.speculation import Speculation
from tpserve.worker.arrays import Array
from tpserve.worker.device_head import DeviceHead
from tpserve.worker.device_runner import DeviceRunner
from tpserve.worker.device_speculation import DeviceProposer, DeviceSpeculation, DraftLogits, Round, State

Made = tuple[list[int], list[int], npt.NDArray[np.float32]]
"""Tokens of a sequence, what was drafted behind them, and the logits of each, (K, V)."""


class WatchedProposer:
    """Copies what a proposer gives, within the captured steps; see `DeviceProposer`."""

    def __init__(self, draft: DeviceProposer, kernels: Any, most: int, num_slots: int, width: int) -> None:
        self.logits_by_rank, self.windows = draft.logits_by_rank, draft.windows
        self._draft = draft
        self._address = kernels["device_address"]
        self.logits = cupy.zeros((most, num_slots, width), cupy.float32)
        self.slots = cupy.full((most, num_slots), -1, cupy.int32)
        self.positions = cupy.zeros((most, num_slots), cupy.int32)

    def add(self, added_slots: Sequence[SlotAdd], stream: Any) -> None:
        self._draft.add(added_slots, stream)

    def remove(self, state: State, removed_slots: Sequence[int]) -> None:
        self._draft.remove(state, removed_slots)

    def plain_step(self, decoding: Array) -> None:
        self._draft.plain_step(decoding)

    def prompt_step(self, decoding: Array) -> None:
        self._draft.prompt_step(decoding)

    def look_back(self, decoding: Array) -> int:
        return self._draft.look_back(decoding)

    def catch_up(self, state: State, run: Round) -> None:
        self._draft.catch_up(state, run)

    def settled(self, state: State) -> None:
        self._draft.settled(state)

    def steps(self, state: State, run: Round) -> Iterator[DraftLogits]:
        for index, given in enumerate(self._draft.steps(state, run)):
            for source, target in zip(given[:3], (self.logits, self.slots, self.positions), strict=True):
                num_bytes = 4 * source.numel()
                assert num_bytes <= target[index].nbytes
                runtime, stream = cupy.cuda.runtime, cupy.cuda.get_current_stream()
                copy = (target[index].data.ptr, self._address(source), num_bytes)
                runtime.memcpyAsync(*copy, runtime.memcpyDeviceToDevice, stream.ptr)
            yield given


class WatchedSpeculation(DeviceSpeculation):
    """The same with a proposer that is watched."""

    def __init__(
        self, speculation: Speculation, draft: DeviceProposer, kernels: Any, max_num_seqs: int, *sizes: int
    ) -> None:
        assert isinstance(draft, DeviceHead)
        head = draft.manifest.head
        assert head is not None
        width = -(-head.target_vocab_size // (16 * draft.manifest.tp_size)) * 16 * draft.manifest.tp_size
        self.watched = WatchedProposer(draft, kernels, speculation.max_num_draft_tokens, max_num_seqs, width)
        super().__init__(speculation, self.watched, kernels, max_num_seqs, *sizes)
        self._draft_array = cupy.from_dlpack(self._state[3])
        """What was drafted last, by slot."""

    def take(self, stream: Any) -> list[Made]:
        """Return what was drafted since the last call, at most a round; waits for the device."""
        stream.synchronize()
        watched = self.watched
        slots, positions, logits = watched.slots.get(), watched.positions.get(), watched.logits.get()
        tokens, drafted = self._tokens.get(), self._draft_array.get()
        made: list[Made] = []
        for row in np.flatnonzero(slots[0] >= 0):
            slot, count = int(slots[0, row]), int((slots[:, row] >= 0).sum())
            assert (slots[:count, row] == slot).all()
            before = tokens[slot, : positions[0, row]].tolist()
            made.append((before, drafted[slot, :count].tolist(), logits[:count, row]))
        with stream:
            watched.slots.fill(-1)
        stream.synchronize()
        return made


class WatchedRunner(DeviceRunner):
    """A rank whose proposals can be taken after each step."""

    speculation_type: ClassVar[type[DeviceSpeculation]] = WatchedSpeculation

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.take_proposals()  # of what ran to be captured

    def take_proposals(self) -> list[Made]:
        """Return what the rank drafted in the step before."""
        assert isinstance(self._speculation, WatchedSpeculation)
        self._use_device()
        with tvm_ffi.use_raw_stream(self._device, self._stream.ptr):
            return self._speculation.take(self._stream)
