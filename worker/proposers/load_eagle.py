"""Loads an EAGLE-3 head beside the target on its ranks, and checks that the two belong together."""

from __future__ import annotations

import numpy as np

from tpserve.proto.manifest import Manifest
from tpserve.proto.rank import RankConfig
from tpserve.worker.arrays import Array
from tpserve.worker.batch import Batch
from tpserve.worker.checkpoint import Checkpoint
from tpserve.worker.errors import WeightsError, WorkerError
from tpserve.worker.library import check_manifest
from tpserve.worker.model import HeadModel, Model, ModelRank, Progress
from tpserve.worker.proposers.eagle import EagleHead
from tpserve.worker.sampler import Sampler


def load_head(config: RankConfig, target: Model, batch: Batch, sampler: Sampler, progress: Progress) -> EagleHead:
    """Load this rank's part of the head, which is split as its target is.

    Raises
    ------
    WorkerError
        If the head cannot be used beside this target, or here.
    """
    speculation = config.speculation
    if speculation is None or speculation.draft_artifact_dir is None or speculation.draft_model_dir is None:
        raise WorkerError("method eagle3 needs a head and its library: give --draft-model")
    manifest = check_manifest(
        speculation.draft_artifact_dir, speculation.draft_model_dir, config.tp_size, config.max_num_seqs
    )
    check_head(manifest, target.manifest, config.max_num_seqs)
    head = HeadModel(
        ModelRank(
            manifest=manifest,
            artifact_dir=speculation.draft_artifact_dir,
            model_dir=speculation.draft_model_dir,
            rank=config.rank,
            tp_size=config.tp_size,
            group_name=config.group_name,
            load_format=speculation.draft_load_format,
            num_pages=config.num_pages,
            num_threads=config.num_threads,
            collective_timeout_s=config.collective_timeout_s,
        ),
        progress,
        target,
    )
    token_ids = np.arange(manifest.vocab_size)
    if manifest.head is not None and manifest.head.has_token_map:
        offsets = Checkpoint(speculation.draft_model_dir).tensor("d2t")
        token_ids = target_token_ids(offsets, manifest.vocab_size, target.manifest.vocab_size)
    return EagleHead(
        head,
        token_ids,
        batch,
        sampler,
        max_num_seqs=config.max_num_seqs,
        num_pages=config.num_pages,
        padded_vocab_size=target.manifest.padded_vocab_size,
        max_num_draft_tokens=speculation.max_num_draft_tokens,
    )


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
