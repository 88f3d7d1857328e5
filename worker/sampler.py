"""Sampling state of every slot, and the call of the sampling kernel.

The kernel is an extern of the artifact (`sample`); its rules are written out in `worker.reference_sampler`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tpserve.proto.messages import SamplingParams, SlotAdd, TokenLogprobs
from tpserve.worker.arrays import Array, aligned_empty, aligned_zeros, as_tensor
from tpserve.worker.grammar import MaskBuffer, num_mask_words

MAX_LOGPROBS = 20
"""Most alternatives that one position can report."""


class Sampler:
    """Parameters by slot as the kernel reads them; grown lazily where most batches need nothing.

    Parameters
    ----------
    kernel
        `sample` of the artifact's kernel library.
    """

    def __init__(self, kernel: Callable[..., None], max_num_seqs: int, vocab_size: int) -> None:
        self._kernel = kernel
        self._max_num_seqs = max_num_seqs
        self._vocab_size = vocab_size
        self._floats = {
            name: aligned_zeros((max_num_seqs,), np.float32)
            for name in ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty")
        }
        self._top_k = aligned_zeros((max_num_seqs,), np.int32)
        self._seed = aligned_zeros((max_num_seqs,), np.int64)
        self._num_logprobs = np.full_like(self._top_k, -1)
        self._bias_count = aligned_zeros((max_num_seqs,), np.int32)
        self._bias_ids = aligned_zeros((max_num_seqs, 1), np.int32)
        self._bias_values = aligned_zeros((max_num_seqs, 1), np.float32)
        # Counts of output tokens, (max_num_seqs, vocab_size) once a sequence with penalties has come.
        self._output_counts = aligned_empty((0, vocab_size), np.int32)
        self.mask_buffer = MaskBuffer(
            aligned_empty((max_num_seqs, num_mask_words(vocab_size)), np.int32),
            aligned_empty((max_num_seqs,), np.int32),
        )
        """Grammar masks, to be filled before `sample`."""
        self._out_ids = aligned_empty((max_num_seqs,), np.int32)
        self._out_logprob = aligned_empty((max_num_seqs,), np.float32)
        self._out_top_ids = aligned_empty((max_num_seqs, MAX_LOGPROBS), np.int32)
        self._out_top_logprobs = aligned_empty((max_num_seqs, MAX_LOGPROBS), np.float32)
        self._state = self._state_tensors()

    def add(self, added: SlotAdd) -> None:
        """Take the parameters of a sequence that enters a slot."""
        slot, sampling = added.slot, added.sampling
        for name, values in self._floats.items():
            values[slot] = getattr(sampling, name)
        self._top_k[slot] = sampling.top_k or 0
        self._seed[slot] = np.uint64(sampling.seed).astype(np.int64)
        self._num_logprobs[slot] = -1 if sampling.num_logprobs is None else sampling.num_logprobs
        self._set_bias(slot, sampling)
        if sampling.needs_output_history:
            if not len(self._output_counts):
                self._output_counts = aligned_zeros((self._max_num_seqs, self._vocab_size), np.int32)
            counts = self._output_counts[slot]
            counts.fill(0)
            np.add.at(counts, np.asarray(added.output_token_ids, np.int64), 1)
        self._state = self._state_tensors()

    def copy_counts(self, source: Sampler, slots: Array) -> None:
        """Take another sampler's counts of output tokens for the slots that have penalties; both know the slots."""
        counted = slots[
            (self._floats["frequency_penalty"][slots] != 0) | (self._floats["presence_penalty"][slots] != 0)
        ]
        if len(counted):
            self._output_counts[counted] = source._output_counts[counted]

    def count(self, slots: Array, token_ids: Array) -> None:
        """Count tokens that were sampled elsewhere, for the slots that have penalties.

        Parameters
        ----------
        slots, token_ids : (N,) int32
            A slot may come several times.
        """
        counted = (self._floats["frequency_penalty"][slots] != 0) | (self._floats["presence_penalty"][slots] != 0)
        if counted.any():
            np.add.at(self._output_counts, (slots[counted], token_ids[counted]), 1)

    def sample(self, logits: Any, slots: Array, positions: Array) -> tuple[Array, dict[int, TokenLogprobs]]:
        """Sample one token for each row.

        Parameters
        ----------
        logits : tensor (R, padded_vocab_size) float32
            Changed in place; what is past the vocabulary is not read.
        slots : (R,) int32
            Each at most once, since what was sampled counts for the slot's next token.
        positions : (R,) int32
            That the sampled tokens will have.

        Returns
        -------
        token ids : (R,) int32, a view that the next call overwrites
        log-probabilities by slot, for the slots that asked
        """
        rows = len(slots)
        ids = self._out_ids[:rows]
        self._kernel(
            logits,
            self._vocab_size,
            as_tensor(slots),
            as_tensor(positions),
            *self._state,
            as_tensor(ids),
            as_tensor(self._out_logprob[:rows]),
            as_tensor(self._out_top_ids[:rows]),
            as_tensor(self._out_top_logprobs[:rows]),
        )
        wanted = self._num_logprobs[slots]
        logprobs: dict[int, TokenLogprobs] = {}
        for row in np.flatnonzero(wanted >= 0):
            count = int(wanted[row])
            top = best_alternatives(self._out_top_ids[row, :count], self._out_top_logprobs[row, :count])
            logprobs[int(slots[row])] = TokenLogprobs(float(self._out_logprob[row]), top)
        return ids, logprobs

    def _set_bias(self, slot: int, sampling: SamplingParams) -> None:
        count = len(sampling.logit_bias)
        width = self._bias_ids.shape[1]
        if count > width:
            ids, values = self._bias_ids, self._bias_values
            self._bias_ids = aligned_zeros((self._max_num_seqs, count), np.int32)
            self._bias_values = aligned_zeros((self._max_num_seqs, count), np.float32)
            self._bias_ids[:, :width] = ids
            self._bias_values[:, :width] = values
        self._bias_count[slot] = count
        self._bias_ids[slot, :count] = [token for token, _ in sampling.logit_bias]
        self._bias_values[slot, :count] = [value for _, value in sampling.logit_bias]

    def _state_tensors(self) -> tuple[Any, ...]:
        floats = self._floats
        arrays = (
            floats["temperature"],
            floats["top_p"],
            self._top_k,
            floats["min_p"],
            floats["frequency_penalty"],
            floats["presence_penalty"],
            self._seed,
            self._bias_ids,
            self._bias_values,
            self._bias_count,
            self._output_counts,
            self._num_logprobs,
            self.mask_buffer.masks,
            self.mask_buffer.mask_rows,
        )
        return tuple(as_tensor(array) for array in arrays)


def best_alternatives(token_ids: Array, logprobs: Array) -> tuple[tuple[int, float], ...]:
    """Return (token id, log-probability) of the best tokens without those that a grammar forbids."""
    pairs = zip(token_ids.tolist(), logprobs.tolist(), strict=True)
    return tuple((token, value) for token, value in pairs if value > -math.inf)
