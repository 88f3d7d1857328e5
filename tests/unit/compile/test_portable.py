"""Tuned kernels and their portable twins in whole graphs: same plans, same logits but for rounding."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest

from rank_group import Artifacts
from tiny_models import MODELS
from tpserve.proto.messages import PromptChunk, SamplingParams, SlotAdd, StepPlan
from tpserve.proto.rank import RankConfig
from tpserve.worker.runner import Runner

NUM_PAGES = 24
VOCAB = 200
"""Of the smallest model."""
LogitsOfSteps = list[npt.NDArray[np.float32]]


def run(folder: Path, artifact: Path, load_format: Literal["auto", "dummy"] = "auto") -> LogitsOfSteps:
    """Three sequences over six steps: chunks, decodes, pages out of order."""
    config = RankConfig(
        rank=0,
        tp_size=1,
        model_dir=folder,
        artifact_dir=artifact,
        load_format=load_format,
        num_pages=NUM_PAGES,
        max_num_seqs=4,
        num_threads=1,
        group_name=f"unused-{os.getpid()}",
        collective_timeout_s=10.0,
    )
    runner = Runner(config, lambda done, total: None)
    rng = np.random.default_rng(5)
    pages = [int(page) for page in rng.permutation(NUM_PAGES)]
    tokens = [int(token) for token in rng.integers(0, 200, 100)]

    def add(slot: int, first: int, last: int) -> SlotAdd:
        return SlotAdd(slot, SamplingParams(temperature=0.0), tuple(pages[first:last]))

    def chunk(slot: int, start: int, stop: int, sample: bool = True) -> PromptChunk:
        return PromptChunk(slot, start, tuple(tokens[start:stop]), sample)

    plans = [
        StepPlan(1, added_slots=(add(2, 0, 4),), chunks=(chunk(2, 0, 20, False),)),
        StepPlan(2, added_slots=(add(0, 4, 6),), chunks=(chunk(2, 20, 45), chunk(0, 0, 1))),
        StepPlan(3, added_slots=(add(1, 6, 12),), chunks=(chunk(1, 0, 60),)),
        StepPlan(4),
        StepPlan(5, removed_slots=(2,)),
        StepPlan(6),
    ]
    out: LogitsOfSteps = []
    for plan in plans:
        arrays, logits = runner.forward(plan)
        out.append(np.from_dlpack(logits)[:, :VOCAB].astype(np.float32))
        runner.sample(arrays, logits)
    runner.close()
    return out


@pytest.mark.parametrize("name", ["llama_9q_3kv_tied", "mistral_4q_1kv_window", "qwen3_5q_5kv"])
def test_both_kernel_sets_agree(tmp_path: Path, artifacts: Artifacts, name: str) -> None:
    MODELS[name].write(tmp_path)
    tuned = run(tmp_path, artifacts.build(tmp_path, 1, kernels="tuned"))
    portable = run(tmp_path, artifacts.build(tmp_path, 1, kernels="portable"))
    assert [len(logits) for logits in tuned] == [0, 2, 3, 3, 2, 2]
    scale = max(np.abs(logits).max() for logits in tuned[1:])
    for one, two in zip(tuned, portable, strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", ["llama_8q_1kv_biases", "qwen2_6q_2kv_tied"])
def test_dummy_weights_give_finite_logits_that_differ(tmp_path: Path, artifacts: Artifacts, name: str) -> None:
    model = MODELS[name]
    model.write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for logits in run(tmp_path, artifacts.build(tmp_path, 1), "dummy")[1:]:
        assert np.isfinite(logits).all()
        assert 0.1 < logits.std() < 100
        assert (np.ptp(logits, axis=0) > 0).all(), "sequences differ"
