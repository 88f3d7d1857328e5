"""Samples a step that verifies draft tokens: what it emits is what plain decoding would have emitted.

A draw depends on nothing but the logits, the slot's parameters, its seed and the position (`worker.reference_sampler`).
So the token that plain decoding samples behind a prefix is a function of that prefix, and a draft token is accepted if
and only if it is that token. Text, log-probabilities and the state of penalties and grammars are those of plain
decoding with the same seed, whatever was drafted: nothing depends on the proposer, on how many tokens it proposed, or
on a step's having been run again. The first rule of speculative sampling (Leviathan et al., 2023, theorem on output
distribution) is met trivially, and no draft probabilities are kept; a draft that draws with the same numbers is
accepted as often as two coupled draws agree.

Rows are sampled in waves: the first row of every slot, then the second of those whose draft token was accepted, and so
on, so that each wave finds the penalties and the grammar as the tokens before left them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tpserve.proto.messages import TokenLogprobs
from tpserve.worker.arrays import Array, aligned_empty, as_tensor
from tpserve.worker.batch import DraftTokens, StepArrays
from tpserve.worker.masks import StepMasks
from tpserve.worker.sampler import Sampler


@dataclass(slots=True)
class Sampled:
    """What a step emitted."""

    slots: Array
    """(N,) int32, each once."""
    token_ids: Array
    """(N, W) int32: of each slot the first `counts`."""
    counts: Array
    """(N,) int32. The last token of a slot with a failure is void, those before it are not."""
    drafted: Array
    """(N,) int32: draft tokens verified."""
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """By slot, for the slots that asked, one for each of its tokens."""
    failures: dict[int, str] = field(default_factory=dict)
    """By slot, why its sequence cannot go on."""
    mask_us: int = 0

    @property
    def last(self) -> Array:
        """The last token of each slot, (N,) int32."""
        last: Array = self.token_ids[np.arange(len(self.slots)), self.counts - 1]
        return last

    def fields(self) -> dict[str, Any]:
        """Return the fields of `StepResult` that say this."""
        emitted = np.arange(self.token_ids.shape[1]) < self.counts[:, None]
        return {
            "slots": tuple(self.slots.tolist()),
            "token_ids": tuple(self.token_ids[emitted].tolist()),
            "counts": tuple(self.counts.tolist()),
            "drafted": tuple(self.drafted.tolist()),
            "logprobs": {slot: tuple(items) for slot, items in self.logprobs.items()},
            "failures": self.failures,
            "mask_us": self.mask_us,
        }


def verify(
    arrays: StepArrays,
    logits: Any,
    draft: DraftTokens,
    sampler: Sampler,
    masks: StepMasks,
    with_hidden: Callable[[int, int, TokenLogprobs], TokenLogprobs],
) -> Sampled:
    """Sample what a step with draft tokens emits.

    Parameters
    ----------
    arrays : StepArrays
        With the rows of `draft`; slots that decode come first.
    logits : tensor (R, padded_vocab_size) float32
        Changed in place.
    draft
        What the rows behind the first of each slot verify.
    with_hidden
        Called with (row, slot, its log-probabilities); adds the hidden row where it is wanted.
    """
    num_slots = len(arrays.sample_slots) - int(draft.counts.sum())
    slots, positions = arrays.sample_slots[:num_slots], arrays.sample_positions[:num_slots]
    drafted = np.zeros(num_slots, np.int32)
    drafted[: len(draft.counts)] = draft.counts
    width = 1 + int(draft.counts.max(initial=0))
    failures, mask_us = masks.wait()
    out = Sampled(slots, np.zeros((num_slots, width), np.int32), np.ones(num_slots, np.int32), drafted)
    out.failures, out.mask_us = dict(failures), mask_us
    # The last wave's rows of `arrays` and their slots by number, of which `alive` are sampled.
    alive, rows = np.arange(num_slots), np.arange(num_slots)
    end = num_slots
    for wave in range(width):
        ids, logprobs = sampler.sample(_take_rows(logits, rows), slots[alive], positions[alive] + np.int32(wave))
        out.token_ids[alive, wave] = ids
        out.counts[alive] = wave + 1
        row_of = dict(zip(slots[alive].tolist(), rows.tolist(), strict=True)) if logprobs else {}
        for slot, item in logprobs.items():
            out.logprobs.setdefault(slot, []).append(with_hidden(row_of[slot], slot, item))
        if wave == width - 1:
            break
        alive = alive[_accepted(draft, alive, wave, ids)]
        if out.failures:
            alive = alive[~np.isin(slots[alive], list(out.failures))]
        if not len(alive):
            break
        members = np.flatnonzero(drafted > wave)
        rows = end + np.searchsorted(members, alive)
        end += len(members)
        failures, mask_us = masks.follow(alive, out.token_ids[:, wave])
        out.failures |= failures
        out.mask_us += mask_us
    masks.took(out.last)
    return out


def _accepted(draft: DraftTokens, alive: Array, wave: int, token_ids: Array) -> Array:
    """Return which slots' next draft token is the token just sampled, (A,) bool."""
    decoding = alive < len(draft.counts)  # a prompt that was just sampled has no draft
    accepted = np.zeros(len(alive), np.bool_)
    among = alive[decoding]
    accepted[decoding] = (draft.counts[among] > wave) & (draft.token_ids[among, wave] == token_ids[decoding])
    return accepted


def _take_rows(logits: Any, rows: Array) -> Any:
    """Return some rows of the logits, which ascend; without a copy where they stand side by side."""
    first, count, width = int(rows[0]), len(rows), logits.shape[1]
    if int(rows[-1]) - first == count - 1:
        return logits._create_view((count, width), relative_byte_offset=4 * first * width)
    out = aligned_empty((count, width), np.float32)
    np.take(np.from_dlpack(logits), rows, axis=0, out=out)
    return as_tensor(out)
