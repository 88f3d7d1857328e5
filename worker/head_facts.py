"""Whether an EAGLE-3 head and its target belong together, and what the head's tokens are. Knows no device."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tpserve.proto.manifest import Manifest
from tpserve.worker.arrays import Array
from tpserve.worker.checkpoint import Checkpoint
from tpserve.worker.errors import WeightsError, WorkerError


def check_head(head: Manifest, target: Manifest, max_num_seqs: int) -> None:
    """Check that a head was compiled for its target.

    Raises
    ------
    WorkerError
        Naming what differs, with both values.
    """
    facts = head.head
    if facts is None:
        raise WorkerError("the draft's library is that of a model, not of an EAGLE-3 head: compile the head")
    if not target.aux_layers:
        raise WorkerError(
            "the model's library gives no hidden rows, which an EAGLE-3 head reads: compile the model again with the "
            "head as --draft-model"
        )
    for name, ours, theirs in (
        ("layers", target.aux_layers, head.aux_layers),
        ("a vocabulary", target.vocab_size, facts.target_vocab_size),
        ("a hidden size", target.hidden_size, facts.target_hidden_size),
        ("pages", target.kv.page_size, head.kv.page_size),
    ):
        if ours != theirs:
            raise WorkerError(
                f"the head was compiled for {name} of {theirs}, the model's library has {ours}: compile both again, "
                "with the head as --draft-model and the model as --target-model"
            )
    if head.max_num_batched_tokens < max_num_seqs:
        raise WorkerError(
            f"the head's library takes {head.max_num_batched_tokens} tokens in a step, {max_num_seqs} sequences need "
            "as many: compile it again with a larger --max-num-batched-tokens"
        )


def target_token_ids(offsets: Array, draft_vocab_size: int, vocab_size: int) -> Array:
    """Return the target's id of each of a head's tokens, given `d2t`: how far it is from the head's own.

    Parameters
    ----------
    offsets : (draft_vocab_size,) of integers

    Returns
    -------
    (draft_vocab_size,) int64

    Raises
    ------
    WeightsError
        If the table is no table of distinct tokens of the target.
    """
    if offsets.shape != (draft_vocab_size,) or not np.issubdtype(offsets.dtype, np.integer):
        raise WeightsError(
            f"d2t is {offsets.shape} {offsets.dtype}, expected ({draft_vocab_size},) of integers: fetch the head again"
        )
    token_ids: Array = np.arange(draft_vocab_size) + offsets.astype(np.int64)
    wrong = np.flatnonzero((token_ids < 0) | (token_ids >= vocab_size))
    if len(wrong):
        raise WeightsError(
            f"d2t makes token {token_ids[wrong[0]]} of the head's token {wrong[0]}, the model has {vocab_size}: give "
            "the EAGLE-3 head of this very model"
        )
    if len(np.unique(token_ids)) < draft_vocab_size:
        raise WeightsError("d2t makes the same token of two of the head's tokens: fetch the head again")
    return token_ids


def head_token_ids(head: Manifest, model_dir: Path, vocab_size: int) -> Array:
    """Return the target's id of each of a head's tokens, as its checkpoint says; the same ids if it says nothing.

    Parameters
    ----------
    vocab_size
        Of the target.

    Returns
    -------
    (draft_vocab_size,) int64

    Raises
    ------
    WeightsError
        If the checkpoint's table is no table of distinct tokens of the target.
    """
    if head.head is None or not head.head.has_token_map:
        return np.arange(head.vocab_size)
    return target_token_ids(Checkpoint(model_dir).tensor("d2t"), head.vocab_size, vocab_size)
