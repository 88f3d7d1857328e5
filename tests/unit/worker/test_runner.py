"""One rank on a real compiled library: what it checks before it loads, and what a step gives back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rank_group import Artifacts
from tiny_models import MODELS
from tpserve.proto.manifest import MANIFEST_NAME
from tpserve.proto.messages import PromptChunk, SamplingParams, SlotAdd, StepPlan
from tpserve.proto.rank import RankConfig
from tpserve.worker.errors import LibraryError, PlanError, WeightsError
from tpserve.worker.runner import Runner

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    MODELS["llama_4q_2kv"].write(path)
    return path


@pytest.fixture(scope="module")
def artifact(folder: Path, artifacts: Artifacts) -> Path:
    return artifacts.build(folder, 1, max_num_batched_tokens=32, max_num_seqs=4)


@pytest.fixture
def config(folder: Path, artifact: Path) -> RankConfig:
    return RankConfig(
        rank=0,
        tp_size=1,
        model_dir=folder,
        artifact_dir=artifact,
        load_format="auto",
        num_pages=8,
        max_num_seqs=4,
        num_threads=1,
        group_name="unused",
        collective_timeout_s=10.0,
    )


def start(config: RankConfig) -> Runner:
    return Runner(config, lambda done, total: None)


def edited(artifact: Path, folder: Path, **fields: object) -> Path:
    """A copy of an artifact whose manifest says otherwise."""
    copy = folder / "edited"
    shutil.copytree(artifact, copy)
    raw = json.loads((copy / MANIFEST_NAME).read_text())
    (copy / MANIFEST_NAME).write_text(json.dumps(raw | fields))
    return copy


def test_progress_counts_every_parameter(config: RankConfig) -> None:
    seen: list[tuple[int, int]] = []
    Runner(config, lambda done, total: seen.append((done, total))).close()
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
    assert len(seen) > 10


def test_steps_in_order_give_tokens_and_times(config: RankConfig) -> None:
    runner = start(config)
    assert runner.execute(StepPlan(7)).token_ids == ()  # nothing to run; the first id may be any
    plan = StepPlan(8, added_slots=(SlotAdd(3, GREEDY, (0, 1)),), chunks=(PromptChunk(3, 0, (5, 6), sample=False),))
    unsampled = runner.execute(plan)
    assert (unsampled.slots, unsampled.token_ids) == ((), ())
    first = runner.execute(StepPlan(9, chunks=(PromptChunk(3, 2, (7,), sample=True),)))
    assert (first.step_id, first.rank, first.slots, len(first.token_ids)) == (9, 0, (3,), 1)
    assert first.step_us > 0
    assert first.collective_us == 0
    assert runner.execute(StepPlan(10)).slots == (3,)
    for wrong in (10, 12):
        with pytest.raises(PlanError, match=f"step {wrong} came where 11 was due"):
            runner.execute(StepPlan(wrong))
    with pytest.raises(PlanError, match="step 11 asks for 2 draft tokens: no draft is loaded"):
        runner.execute(StepPlan(11, num_draft_tokens=2))


def test_another_configuration_is_refused_with_both_values(config: RankConfig, tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match="tp_size is 1 in the library and 2 in the configuration"):
        start(replace(config, tp_size=2))
    with pytest.raises(LibraryError, match="max_num_seqs 5 is more than the library's 4: compile again"):
        start(replace(config, max_num_seqs=5))
    other = tmp_path / "other"
    MODELS["llama_9q_3kv_tied"].write(other)
    with pytest.raises(LibraryError, match=r"model_config_sha256 is .* in the library and .* in the configuration"):
        start(replace(config, model_dir=other))
    with pytest.raises(LibraryError, match=r"config\.json"):
        start(replace(config, model_dir=tmp_path))


def test_a_library_of_another_cpu_or_with_other_files_is_refused(
    config: RankConfig, artifact: Path, tmp_path: Path
) -> None:
    other = edited(artifact, tmp_path / "cpu", target={"kind": "llvm", "cpu_features": "z80"})
    with pytest.raises(LibraryError, match=r"was compiled for a CPU with \[z80\], this one has \[.+\]: compile again"):
        start(replace(config, artifact_dir=other))
    raw = json.loads((artifact / MANIFEST_NAME).read_text())
    more = edited(artifact, tmp_path / "extern", externs=[*raw["externs"], "tpserve.unheard_of"])
    with pytest.raises(LibraryError, match=r"the library needs tpserve\.unheard_of, which no backend has registered"):
        start(replace(config, artifact_dir=more))
    (more / "model.so").write_bytes(b"not a library")
    with pytest.raises(LibraryError, match=r"model\.so has sha256 .*: compile again"):
        start(replace(config, artifact_dir=more))
    with pytest.raises(LibraryError, match=r"manifest\.json is missing"):
        start(replace(config, artifact_dir=tmp_path))


def test_missing_weights_are_refused_unless_dummies_will_do(config: RankConfig, tmp_path: Path) -> None:
    shutil.copy(config.model_dir / "config.json", tmp_path)
    with pytest.raises(WeightsError, match="cannot read the weights of"):
        start(replace(config, model_dir=tmp_path))
    runner = start(replace(config, model_dir=tmp_path, load_format="dummy"))
    plan = StepPlan(1, added_slots=(SlotAdd(0, GREEDY, (0,)),), chunks=(PromptChunk(0, 0, (1,), sample=True),))
    assert len(runner.execute(plan).token_ids) == 1
