"""Which draft a rank on a GPU loads beside its model, and whether the two fit. Knows no device.

On the model's ranks either each has the whole draft, and nothing travels between them, or each has its shard, as it has
one of the model: then the draft's library calls the collectives of the model's own group. Ranks of a draft's own have
its shards, whatever the model's degree.
"""

from __future__ import annotations

from dataclasses import replace

from tpserve.proto.manifest import Manifest
from tpserve.proto.rank import RankConfig
from tpserve.proto.speculation import DEVICE_DRAFT_WINDOWS, Speculation
from tpserve.worker.errors import WorkerError
from tpserve.worker.head_facts import check_head
from tpserve.worker.library import check_manifest


def draft_rank_config(config: RankConfig, speculation: Speculation) -> RankConfig:
    """Return what a rank of the model, or of a draft that has its own, is told as a rank of the draft.

    Raises
    ------
    WorkerError
        If there is no draft model, or on the model's ranks its TP degree is neither 1 nor theirs; names the remedy.
    """
    if speculation.draft_artifact_dir is None or speculation.draft_model_dir is None:
        raise WorkerError(f"method {speculation.method} needs a draft and its library: give --draft-model")
    size, own_rank = speculation.draft_tp_size, config.draft_rank
    if own_rank is None and size not in (1, config.tp_size):
        raise WorkerError(
            f"draft_tp_size is {size} beside a model of TP={config.tp_size}: on GPUs each rank has the whole draft or "
            f"its shard; set --draft-tp {' or '.join(map(str, dict.fromkeys((1, config.tp_size))))}, or "
            "--draft-placement dedicated"
        )
    return replace(
        config,
        rank=own_rank if own_rank is not None else config.rank if size > 1 else 0,
        tp_size=size,
        model_dir=speculation.draft_model_dir,
        artifact_dir=speculation.draft_artifact_dir,
        load_format=speculation.draft_load_format,
    )


def check_head_manifest(config: RankConfig, target: Manifest) -> Manifest:
    """Read the manifest of an EAGLE-3 head's library and compare it with its model's.

    Parameters
    ----------
    config
        Of the head's rank, as `draft_rank_config` gives it.
    target
        Of the model.

    Raises
    ------
    WorkerError
        Naming what does not fit, with both values.
    """
    if config.tp_size != target.tp_size:
        raise WorkerError(
            f"draft_tp_size is {config.tp_size}, the model's {target.tp_size}: an EAGLE-3 head is split as its model "
            "is; leave --draft-tp away"
        )
    head = check_manifest(config.artifact_dir, config.model_dir, config.tp_size, config.max_num_seqs)
    check_head(head, target, config.max_num_seqs)
    # All tokens that the model computes run through the head's projections behind it.
    if head.max_num_batched_tokens < target.max_num_batched_tokens:
        raise WorkerError(
            f"the head's library takes {head.max_num_batched_tokens} tokens in a step, the model's "
            f"{target.max_num_batched_tokens}: compile it with --max-num-batched-tokens {target.max_num_batched_tokens}"
        )
    if head.kv.dtype != "bfloat16":
        raise WorkerError(
            f"the head's library has KV pages of {head.kv.dtype}, on GPUs they are bfloat16: compile again"
        )
    return head


def check_draft_manifest(config: RankConfig, target: Manifest) -> Manifest:
    """Read the manifest of a draft's library and compare it with its model's.

    Parameters
    ----------
    config
        Of the draft's rank, as `draft_rank_config` gives it.

    Raises
    ------
    WorkerError
        Naming what does not fit, with both values.
    """
    draft = check_manifest(config.artifact_dir, config.model_dir, config.tp_size, config.max_num_seqs)
    if draft.vocab_size != target.vocab_size or draft.kv.page_size != target.kv.page_size:
        raise WorkerError(
            f"the draft has {draft.vocab_size} tokens and pages of {draft.kv.page_size}, the model "
            f"{target.vocab_size} and {target.kv.page_size}: give a draft of the same family"
        )
    # Of the same vocabulary and on as many ranks it is padded the same, and on one rank no further: on the model's
    # ranks the draft's logits fit where the sampler adjusts the model's.
    has_own_ranks = config.speculation is not None and config.speculation.num_draft_ranks > 0
    assert has_own_ranks or draft.padded_vocab_size <= target.padded_vocab_size
    # Prompts run through the draft as they ran through the model; and a round begins with a window of each sequence.
    window = max(DEVICE_DRAFT_WINDOWS)
    needed = max(target.max_num_batched_tokens, window * config.max_num_seqs)
    if draft.max_num_batched_tokens < needed:
        raise WorkerError(
            f"the draft's library takes {draft.max_num_batched_tokens} tokens in a step, this replica needs {needed} "
            f"(the model's {target.max_num_batched_tokens}, and {window} for each of "
            f"{config.max_num_seqs} sequences): compile it with --max-num-batched-tokens {needed}"
        )
    return draft
