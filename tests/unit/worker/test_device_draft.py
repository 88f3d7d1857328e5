"""Which draft a rank on a GPU loads, and which it refuses, before any device is touched."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tiny_models import MODELS
from tpserve.proto.manifest import HeadFacts, Manifest
from tpserve.proto.rank import RankConfig
from tpserve.proto.speculation import Speculation
from tpserve.worker.device_draft import check_draft_manifest, check_head_manifest, draft_rank_config
from tpserve.worker.errors import LibraryError, WorkerError
from worker_builders import make_manifest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("model")
    MODELS["llama_4q_2kv"].write(folder)
    return folder


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return tmp_path


def config_of(rank: int, tp_size: int, max_num_seqs: int = 4) -> RankConfig:
    return RankConfig(
        rank=rank,
        tp_size=tp_size,
        model_dir=Path("/target"),
        artifact_dir=Path("/target-library"),
        load_format="auto",
        num_pages=8,
        max_num_seqs=max_num_seqs,
        num_threads=1,
        group_name="g",
        collective_timeout_s=1.0,
        device=rank,
        rendezvous="127.0.0.1:1",
    )


def draft_of(model: Path, artifact: Path, tp_size: int) -> Speculation:
    return Speculation(
        "draft", 3, draft_model_dir=model, draft_artifact_dir=artifact, draft_tp_size=tp_size, draft_load_format="dummy"
    )


@pytest.mark.parametrize(("draft_tp_size", "expected"), [(1, (0, 1)), (4, (2, 4))])
def test_each_rank_has_the_whole_draft_or_its_own_shard(
    model: Path, artifact: Path, draft_tp_size: int, expected: tuple[int, int]
) -> None:
    found = draft_rank_config(config_of(2, 4), draft_of(model, artifact, draft_tp_size))
    assert (found.rank, found.tp_size) == expected
    assert (found.model_dir, found.artifact_dir, found.load_format) == (model, artifact, "dummy")
    assert (found.num_pages, found.device) == (8, 2), "it has the pages of the model, on the same device"


@pytest.mark.parametrize(("rank", "tp_size", "draft_tp_size"), [(4, 4, 2), (5, 4, 2), (1, 1, 4), (3, 1, 4), (2, 2, 1)])
def test_a_drafts_own_ranks_have_its_shards(
    model: Path, artifact: Path, rank: int, tp_size: int, draft_tp_size: int
) -> None:
    own = replace(draft_of(model, artifact, draft_tp_size), draft_placement="dedicated")
    found = draft_rank_config(config_of(rank, tp_size), own)
    assert (found.rank, found.tp_size) == (rank - tp_size, draft_tp_size)
    assert (found.model_dir, found.artifact_dir, found.device) == (model, artifact, rank)


@pytest.mark.parametrize(
    ("tp_size", "draft_tp_size", "words"),
    [
        (4, 2, r"draft_tp_size is 2 beside a model of TP=4: .* set --draft-tp 1 or 4"),
        (1, 2, r"draft_tp_size is 2 beside a model of TP=1: .* set --draft-tp 1, or --draft-placement dedicated$"),
        (2, 4, r"draft_tp_size is 4 beside a model of TP=2"),
        (2, 0, r"draft_tp_size is 0 beside a model of TP=2"),
    ],
)
def test_other_degrees_are_refused(model: Path, artifact: Path, tp_size: int, draft_tp_size: int, words: str) -> None:
    with pytest.raises(WorkerError, match=words):
        draft_rank_config(config_of(0, tp_size), draft_of(model, artifact, draft_tp_size))


def test_a_draft_without_a_model_is_refused() -> None:
    with pytest.raises(WorkerError, match="give --draft-model"):
        draft_rank_config(config_of(0, 1), Speculation("draft", 3))


def saved(manifest: Manifest, model: Path, artifact: Path, max_num_seqs: int = 4) -> RankConfig:
    """Write a draft's manifest; return the config of a rank that loads it."""
    shutil.rmtree(artifact)
    artifact.mkdir()
    manifest.save(artifact)
    config = config_of(1, manifest.tp_size, max_num_seqs)
    return draft_rank_config(config, draft_of(model, artifact, manifest.tp_size))


def test_a_shard_is_checked_against_its_model(model: Path, artifact: Path) -> None:
    target = replace(make_manifest(model, 2), hidden_size=1024)
    draft = make_manifest(model, 2)
    found = check_draft_manifest(saved(draft, model, artifact), target)
    assert found == draft
    whole = make_manifest(model, 1)
    assert whole.padded_vocab_size <= target.padded_vocab_size
    config = saved(whole, model, artifact)
    check_draft_manifest(config, target)
    with pytest.raises(LibraryError, match="tp_size is 1 in the library and 2 in the configuration"):
        check_draft_manifest(replace(config, tp_size=2), target)
    with pytest.raises(WorkerError, match="the draft has 100 tokens and pages of 16, the model 200 and 16"):
        check_draft_manifest(saved(replace(draft, vocab_size=100), model, artifact), target)


def test_a_draft_must_take_what_the_model_and_its_own_windows_need(model: Path, artifact: Path) -> None:
    target = make_manifest(model, 2)
    draft = replace(make_manifest(model, 2), max_num_seqs=32)
    config = saved(replace(draft, max_num_batched_tokens=63), model, artifact)
    with pytest.raises(WorkerError, match=r"takes 63 tokens in a step, this replica needs 64 .*-batched-tokens 64"):
        check_draft_manifest(config, target)
    config = saved(draft, model, artifact, max_num_seqs=17)
    with pytest.raises(WorkerError, match=r"needs 68 \(the model's 64, and 4 for each of 17 sequences\)"):
        check_draft_manifest(config, target)
    check_draft_manifest(saved(draft, model, artifact, max_num_seqs=16), target)


def test_a_head_is_checked_against_its_model(model: Path, artifact: Path) -> None:
    target = replace(make_manifest(model, 2), aux_layers=(2, 4, 5))
    facts = HeadFacts(target.vocab_size, target.hidden_size, has_token_map=True)
    head = replace(make_manifest(model, 2), aux_layers=(2, 4, 5), head=facts, vocab_size=100)
    head = replace(head, kv=replace(head.kv, dtype="bfloat16"))
    assert check_head_manifest(saved(head, model, artifact), target) == head
    whole = replace(head, tp_size=1)
    with pytest.raises(WorkerError, match=r"draft_tp_size is 1, the model's 2: an EAGLE-3 head is split as its model"):
        check_head_manifest(saved(whole, model, artifact), target)
    with pytest.raises(WorkerError, match=r"takes 63 tokens in a step, the model's 64: .*-batched-tokens 64"):
        check_head_manifest(saved(replace(head, max_num_batched_tokens=63), model, artifact), target)
    with pytest.raises(WorkerError, match=r"layers of \(1, 4, 5\), the model's library has \(2, 4, 5\)"):
        check_head_manifest(saved(replace(head, aux_layers=(1, 4, 5)), model, artifact), target)
    other = replace(head, kv=replace(head.kv, dtype="float32"))
    with pytest.raises(WorkerError, match="KV pages of float32, on GPUs they are bfloat16: compile again"):
        check_head_manifest(saved(other, model, artifact), target)
    with pytest.raises(WorkerError, match="the draft's library is that of a model, not of an EAGLE-3 head"):
        check_head_manifest(saved(replace(head, head=None), model, artifact), target)
