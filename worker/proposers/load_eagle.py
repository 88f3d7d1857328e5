"""Loads an EAGLE-3 head beside the target on its ranks."""

from __future__ import annotations

from tpserve.proto.rank import RankConfig
from tpserve.worker.batch import Batch
from tpserve.worker.errors import WorkerError
from tpserve.worker.head_facts import check_head, head_token_ids
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
    return EagleHead(
        head,
        head_token_ids(manifest, speculation.draft_model_dir, target.manifest.vocab_size),
        batch,
        sampler,
        max_num_seqs=config.max_num_seqs,
        num_pages=config.num_pages,
        padded_vocab_size=target.manifest.padded_vocab_size,
        max_num_draft_tokens=speculation.max_num_draft_tokens,
    )
