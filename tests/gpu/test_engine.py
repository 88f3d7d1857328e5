"""Greedy text of SmolLM2 on one GPU against transformers' in float32: through the real scheduler and device runner.

bfloat16 activations move logits by a few hundredths, so a text may part from the reference where the reference's two
best logits are that close, and nowhere else. Within the engine the prefix cache must not change a bit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.request import Request
from tpserve.coordinator.scheduler import Scheduler
from tpserve.proto.manifest import Manifest
from tpserve.proto.messages import SamplingParams
from tpserve.proto.rank import RankConfig

pytestmark = pytest.mark.gpu(count=1)

GOLDENS = Path(__file__).parents[1] / "goldens" / "smollm2.json"
TIE = 0.25
"""Gap of the reference's two best logits below which bfloat16 may choose the other; the largest seen was 0.20."""
NUM_PAGES = 2048


class GpuEngine:
    """The scheduler and one rank on the GPU, with two plans in flight."""

    def __init__(self, folders: dict[str, str]) -> None:
        from tpserve.worker.device_runner import DeviceRunner

        artifact = Path(folders["artifact_dir"])
        self._manifest = Manifest.load(artifact)
        max_num_seqs = self._manifest.max_num_seqs
        self._runner = DeviceRunner(
            RankConfig(
                0, 1, Path(folders["model_dir"]), artifact, "auto", NUM_PAGES, max_num_seqs, 1, "test", 60.0, device=0
            ),
            lambda done, total: None,
        )
        self._scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs, self._manifest.max_num_batched_tokens, self._manifest.max_model_len, 16, NUM_PAGES
            )
        )
        self._next_id = 0

    def run(self, goldens: list[dict[str, Any]]) -> list[list[int]]:
        """Return the greedy tokens of prompts that run together."""
        out: dict[int, list[int]] = {}
        for golden in goldens:
            prompt, count = tuple(golden["prompt_token_ids"]), len(golden["output_token_ids"])
            self._scheduler.add_request(Request(self._next_id, prompt, SamplingParams(temperature=0.0), count))
            out[self._next_id] = []
            self._next_id += 1
        pending: deque[Any] = deque()
        while self._scheduler.has_unfinished or pending:
            while (plan := self._scheduler.schedule()) is not None:
                pending.append(self._runner.submit(plan))
            for event in self._scheduler.update(pending.popleft().wait()):
                out[event.request_id] += event.token_ids
        return list(out.values())


@pytest.fixture(scope="module")
def goldens() -> list[dict[str, Any]]:
    prompts: list[dict[str, Any]] = json.loads(GOLDENS.read_text())["prompts"]
    return prompts


@pytest.fixture(scope="module")
def engine() -> GpuEngine:
    given = os.environ.get("TPSERVE_CUDA_FOLDERS")  # JSON as `tpserve compile` prints it, built on another machine
    if given is None:
        model = os.environ.get("TPSERVE_DEMO_MODEL")
        assert model, "set TPSERVE_DEMO_MODEL to the demo model's GGUF file, as `make test-gpu` does"
        command = [sys.executable, "-m", "tpserve.compile", "compile", model, "--device", "cuda:sm_90a"]
        command += ["--max-num-seqs", "16", "--max-num-batched-tokens", "256", "--max-model-len", "2048"]
        given = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return GpuEngine(json.loads(given))


def check(goldens: list[dict[str, Any]], texts: list[list[int]]) -> None:
    for golden, text in zip(goldens, texts, strict=True):
        pairs = zip(golden["output_token_ids"], text, strict=True)
        first = next((i for i, (want, have) in enumerate(pairs) if want != have), None)
        if first is not None:
            assert golden["gaps"][first] < TIE, f"{golden['name']} parts at {first}, where the reference is certain"


def test_each_prompt_alone(engine: GpuEngine, goldens: list[dict[str, Any]]) -> None:
    check(goldens, [engine.run([golden])[0] for golden in goldens])


def test_all_together_and_again_from_the_prefix_cache(engine: GpuEngine, goldens: list[dict[str, Any]]) -> None:
    together = engine.run(goldens)
    check(goldens, together)
    assert engine.run(goldens) == together
