"""Sampling state of every slot on a GPU, at addresses that captured graphs keep, and the copies that change it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cupy
import numpy as np
import tvm_ffi

from tpserve.proto.messages import SlotAdd, TokenLogprobs
from tpserve.worker.arrays import Array
from tpserve.worker.device_weights import pinned
from tpserve.worker.errors import PlanError, WorkerError
from tpserve.worker.grammar import MaskBuffer, num_mask_words
from tpserve.worker.sampler import MAX_LOGPROBS, best_alternatives

MAX_BIAS = 512
"""Entries of logit_bias that one sequence may have: graphs need a fixed size."""
_LOGPROBS_STATE = 11
"""Place of `num_logprobs` among the kernel's parameters by slot."""
_GREEDY_STATE = (0, 4, 5, 9, _LOGPROBS_STATE, 13)
"""Places of temperature, frequency and presence penalty, and of `bias_count`, `num_logprobs` and mask rows."""
_BEST_SLICES = 8
"""Parts of a row's columns of which each has a best token, as in kernels/cuda/ranked_token.cuh."""
_FLOATS = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty")


class DeviceSampler:
    """Parameters by slot, in one block that is copied whole when a slot is added.

    Parameters
    ----------
    kernels
        The artifact's kernel library.
    num_staging
        Pinned copies, so that the host may prepare steps ahead.
    max_num_rows
        Of one step: more than slots where draft tokens are verified.
    gather, num_ranks
        In a group, `DeviceGroup.gather_logits`: logits then come by rank.
    """

    def __init__(
        self,
        kernels: Any,
        max_num_seqs: int,
        vocab_size: int,
        width: int,
        num_staging: int,
        max_num_rows: int = 0,
        gather: Callable[..., bool] | None = None,
        num_ranks: int = 1,
    ) -> None:
        self._sample = kernels["sample"]
        self._gather = gather
        self._num_ranks = num_ranks
        self._max_num_seqs = max_num_seqs
        self._vocab_size = vocab_size
        size = -(-max_num_seqs // 4) * 4  # every array begins at a multiple of 16 bytes
        self._stride = size
        # 8-byte seeds first, then everything of 4 bytes.
        self._block_bytes = 8 * size + 4 * size * (len(_FLOATS) + 3)
        self._host = np.zeros(self._block_bytes, np.uint8)
        self._device = cupy.zeros(self._block_bytes, cupy.uint8)
        self._staging = [pinned(self._block_bytes, np.uint8) for _ in range(num_staging)]
        self._host_views = self._views(self._host)
        views = self._views(self._device)
        self._host_views["num_logprobs"][:] = -1
        self._bias_ids = cupy.zeros((size, MAX_BIAS), cupy.int32)
        self._bias_values = cupy.zeros((size, MAX_BIAS), cupy.float32)
        self._output_counts = cupy.zeros((size, vocab_size), cupy.int32)
        self._masks = cupy.zeros((size, num_mask_words(vocab_size)), cupy.int32)
        # As the kernel's other parameters by slot; padded, so that its view has an aligned size.
        self._mask_rows = cupy.full(size, -1, cupy.int32)
        self.mask_buffers = [
            MaskBuffer(
                pinned(self._masks.size, np.int32).reshape(self._masks.shape), pinned(size, np.int32)[:max_num_seqs]
            )
            for _ in range(num_staging)
        ]
        """Grammar masks of a step in the staging of that number, to be filled before `send_masks`."""
        self._has_masks = False
        state = (
            views["temperature"],
            views["top_p"],
            views["top_k"],
            views["min_p"],
            views["frequency_penalty"],
            views["presence_penalty"],
            views["seed"],
            self._bias_ids,
            self._bias_values,
            views["bias_count"],
            self._output_counts,
            views["num_logprobs"],
            self._masks,
            self._mask_rows[:max_num_seqs],
        )
        self._state = tuple(tvm_ffi.from_dlpack(array) for array in state)
        # Logits with penalties and bias applied, and those that were gathered; width is the padded vocabulary.
        rows = -(-max(max_num_rows, max_num_seqs) // 4) * 4
        self._best = tvm_ffi.from_dlpack(cupy.zeros((rows, _BEST_SLICES), cupy.int64))
        self._arrived = tvm_ffi.from_dlpack(cupy.zeros(rows, cupy.int32))
        """By row, blocks that have found the best of their part; zero between steps."""
        self._adjusted = tvm_ffi.from_dlpack(cupy.empty((rows, width), cupy.float32))
        self._out = _outputs(rows)
        # Made once: an exchange by DLPack makes streams wait for each other, which a capture forbids.
        self._out_tensors = [tvm_ffi.from_dlpack(array) for array in self._out]
        # What a draft samples: nobody wants its log-probabilities.
        self._draft_out = [tvm_ffi.from_dlpack(array) for array in _outputs(size)]
        self._no_logprobs = tvm_ffi.from_dlpack(cupy.full(size, -1, cupy.int32)[:max_num_seqs])
        self._results = [
            [pinned(array.size, array.dtype).reshape(array.shape) for array in self._out] for _ in range(num_staging)
        ]
        self._wanted = [self._host_views["num_logprobs"].copy() for _ in range(num_staging)]
        """Log-probabilities by slot as a step was to give them: when it is read, others may have come into slots."""

    def _views(self, block: Any) -> dict[str, Any]:
        size, used = self._stride, self._max_num_seqs
        views = {"seed": block[: 8 * size].view(np.int64)[:used]}
        start = 8 * size
        for name in (*_FLOATS, "top_k", "num_logprobs", "bias_count"):
            dtype = np.float32 if name in _FLOATS else np.int32
            views[name] = block[start : start + 4 * size].view(dtype)[:used]
            start += 4 * size
        return views

    def add(self, added_slots: Sequence[SlotAdd], staging: int, stream: Any) -> None:
        """Take the parameters of sequences that enter slots, in order with the steps on `stream`."""
        views = self._host_views
        for added in added_slots:
            slot, sampling = added.slot, added.sampling
            for name in _FLOATS:
                views[name][slot] = getattr(sampling, name)
            views["top_k"][slot] = sampling.top_k or 0
            views["seed"][slot] = np.uint64(sampling.seed).astype(np.int64)
            views["num_logprobs"][slot] = -1 if sampling.num_logprobs is None else sampling.num_logprobs
            count = len(sampling.logit_bias)
            if count > MAX_BIAS:
                raise PlanError(f"slot {slot} has {count} logit_bias entries, this device takes {MAX_BIAS}")
            views["bias_count"][slot] = count
            if count:
                ids = np.asarray([token for token, _ in sampling.logit_bias], np.int32)
                values = np.asarray([value for _, value in sampling.logit_bias], np.float32)
                self._bias_ids[slot, :count].set(ids, stream)
                self._bias_values[slot, :count].set(values, stream)
            if sampling.needs_output_history:
                counts = np.zeros(self._vocab_size, np.int32)
                np.add.at(counts, np.asarray(added.output_token_ids, np.int64), 1)
                self._output_counts[slot].set(counts, stream)
        self._staging[staging][:] = self._host
        self._device.data.copy_from_host_async(self._staging[staging].ctypes.data, self._block_bytes, stream)

    def send_masks(self, staging: int, num_masks: int, stream: Any) -> None:
        """Queue the copies of a step's masks to the device; with none, slots lose those that the last step had.

        Parameters
        ----------
        num_masks
            Leading rows of the staging's masks that are in use.
        """
        if not num_masks and not self._has_masks:
            return
        self._has_masks = num_masks > 0
        buffer = self.mask_buffers[staging]
        if num_masks:
            size = num_masks * self._masks[:1].nbytes
            self._masks.data.copy_from_host_async(buffer.masks.ctypes.data, size, stream)
        self._mask_rows.data.copy_from_host_async(buffer.mask_rows.ctypes.data, buffer.mask_rows.nbytes, stream)

    def queue(self, logits: Any, slots: Any, positions: Any) -> Any:
        """Queue the sampling kernel; return the tensor of sampled ids, (R,) int32."""
        rows = slots.shape[0]
        out = [tensor._create_view((rows, *tensor.shape[1:])) for tensor in self._out_tensors]
        self._queue(logits, slots, positions, self._state, out, by_rank=self._gather is not None)
        return out[0]

    def queue_draft(self, logits: Any, slots: Any, positions: Any, *, by_rank: bool) -> Any:
        """Queue the sampling of a draft's logits by its slots' parameters; return the tensor of ids, (R,) int32.

        The numbers drawn are those that the target will draw at these positions, so the two agree as often as they can.

        Parameters
        ----------
        by_rank
            The draft has the model's ranks, and this is one rank's part of its logits.
        """
        rows = slots.shape[0]
        out = [tensor._create_view((rows, *tensor.shape[1:])) for tensor in self._draft_out]
        state = (*self._state[:_LOGPROBS_STATE], self._no_logprobs, *self._state[_LOGPROBS_STATE + 1 :])
        self._queue(logits, slots, positions, state, out, by_rank=by_rank)
        return out[0]

    def _queue(
        self, logits: Any, slots: Any, positions: Any, state: Sequence[Any], out: Sequence[Any], *, by_rank: bool
    ) -> None:
        rows, width = logits.shape
        best = self._best._create_view((rows, _BEST_SLICES))
        is_best_told = False
        # A draft pads its vocabulary no further than the model does: see `check_draft_manifest`.
        adjusted = self._adjusted._create_view((rows, width * self._num_ranks if by_rank else width))
        if by_rank:
            assert self._gather is not None
            greedy_state = [state[place] for place in _GREEDY_STATE]
            is_best_told = self._gather(logits, self._vocab_size, slots, greedy_state, adjusted, best)
            logits = adjusted
        arrived = self._arrived._create_view((rows,))
        self._sample(logits, best, is_best_told, arrived, self._vocab_size, slots, positions, *state, adjusted, *out)

    def fetch(self, num_rows: int, slots: Array, staging: int, stream: Any) -> None:
        """Queue the copies of a step's results to the host; `slots` are those of its rows, or of some of them."""
        self._wanted[staging][:] = self._host_views["num_logprobs"]
        wanted = bool((self._wanted[staging][slots] >= 0).any())
        for device, host in zip(self._out, self._results[staging], strict=True):
            size = num_rows * device[:1].nbytes
            if size:
                device.data.copy_to_host_async(host.ctypes.data, size, stream)
            if not wanted:
                break

    def results(
        self, slots: Array, rows: Array, staging: int
    ) -> tuple[tuple[int, ...], dict[int, tuple[TokenLogprobs, ...]]]:
        """Return a finished step's token ids, and log-probabilities of the slots that asked.

        Parameters
        ----------
        slots, rows : (E,) int32
            Of what was emitted, slot by slot.

        Raises
        ------
        WorkerError
            If the logits of a slot had a NaN or no finite maximum.
        """
        ids, chosen, top_ids, top_values = self._results[staging]
        emitted = ids[rows]
        for index in np.flatnonzero(emitted < 0):
            raise WorkerError(f"logits of slot {slots[index]} have a NaN or no finite maximum")
        logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        wanted = self._wanted[staging][slots]
        for index in np.flatnonzero(wanted >= 0):
            row, slot, count = int(rows[index]), int(slots[index]), int(wanted[index])
            top = best_alternatives(top_ids[row, :count], top_values[row, :count])
            logprobs[slot] = (*logprobs.get(slot, ()), TokenLogprobs(float(chosen[row]), top))
        return tuple(emitted.tolist()), logprobs

    def token_ids(self, num_rows: int, staging: int) -> Array:
        """Return the ids that a finished step sampled, (R,) int32; a view that the staging's next use overwrites."""
        ids: Array = self._results[staging][0]
        return ids[:num_rows]


def _outputs(rows: int) -> tuple[Any, ...]:
    """Return memory for what the kernel gives: ids, log-probabilities, and those of the best alternatives."""
    return (
        cupy.zeros(rows, cupy.int32),
        cupy.zeros(rows, cupy.float32),
        cupy.zeros((rows, MAX_LOGPROBS), cupy.int32),
        cupy.zeros((rows, MAX_LOGPROBS), cupy.float32),
    )
