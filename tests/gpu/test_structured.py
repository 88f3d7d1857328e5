"""Constrained and free requests in one batch on one GPU, through the real scheduler and device runner."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.request import Request, TokenEvent
from tpserve.coordinator.scheduler import Scheduler
from tpserve.proto.manifest import Manifest
from tpserve.proto.messages import FinishReason, Grammar, GrammarKind, SamplingParams
from tpserve.proto.rank import RankConfig

pytestmark = pytest.mark.gpu(count=1)

NUM_PAGES = 1024
EOS = 2
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^[a-z]{1,12}$"}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


class GpuEngine:
    """The scheduler and one rank on the GPU, with plans in flight."""

    def __init__(self, folders: dict[str, str]) -> None:
        from tpserve.worker.device_runner import DeviceRunner

        artifact, model_dir = Path(folders["artifact_dir"]), Path(folders["model_dir"])
        manifest = Manifest.load(artifact)
        seqs = manifest.max_num_seqs
        config = RankConfig(0, 1, model_dir, artifact, "auto", NUM_PAGES, seqs, 1, "test", 60.0, device=0)
        self._runner = DeviceRunner(config, lambda done, total: None)
        self._scheduler = Scheduler(
            SchedulerConfig(seqs, manifest.max_num_batched_tokens, manifest.max_model_len, 16, NUM_PAGES)
        )
        self._next_id = 0
        self.tokenizer = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        self.masks_seen = 0

    def run(self, requests: Sequence[tuple[str, SamplingParams, Grammar | None]], max_tokens: int) -> list[Answer]:
        """Return what became of prompts that run together."""
        answers: dict[int, Answer] = {}
        for prompt, sampling, grammar in requests:
            ids = tuple(self.tokenizer.encode(prompt, add_special_tokens=False).ids)
            request = Request(
                self._next_id, ids, sampling, max_tokens, stop_token_ids=frozenset({EOS}), grammar=grammar
            )
            self._scheduler.add_request(request)
            answers[self._next_id] = Answer(self.tokenizer)
            self._next_id += 1
        pending: deque[Any] = deque()
        while self._scheduler.has_unfinished or pending:
            while (plan := self._scheduler.schedule()) is not None:
                pending.append(self._runner.submit(plan))
            result = pending.popleft().wait()
            self.masks_seen += result.mask_us > 0
            for event in self._scheduler.update(result):
                answers[event.request_id].take(event)
        return list(answers.values())


class Answer:
    """One request's tokens."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.token_ids: list[int] = []
        self.finish: FinishReason | None = None

    def take(self, event: TokenEvent) -> None:
        self.token_ids += event.token_ids
        self.finish = event.finish

    @property
    def text(self) -> str:
        return str(self._tokenizer.decode(self.token_ids))


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


def schema_grammar() -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA), (EOS,))


def test_every_constrained_answer_matches_and_free_ones_stay_as_they_are(engine: GpuEngine) -> None:
    greedy = SamplingParams(temperature=0.0)
    free = [(f"Number {number}: the story of a", greedy, None) for number in range(4)]
    alone = [engine.run([request], 40)[0].token_ids for request in free]
    constrained = [
        (f"Person {seed} is", SamplingParams(temperature=1.5, seed=seed, num_logprobs=5), schema_grammar())
        for seed in range(6)
    ]
    phone = ("Call", SamplingParams(temperature=1.0, seed=3), Grammar(GrammarKind.REGEX, r"\d{3}-\d{4}", (EOS,)))
    before = engine.masks_seen
    answers = engine.run([*free, *constrained, phone], 40)
    assert engine.masks_seen > before
    for answer in answers[4:10]:
        if answer.finish is FinishReason.STOP:
            value = json.loads(answer.text)
            assert re.fullmatch("[a-z]{1,12}", value["name"])
            assert value["age"] <= 99
        else:
            assert answer.text.lstrip().startswith("{")
    assert any(answer.finish is FinishReason.STOP for answer in answers[4:10])
    assert re.fullmatch(r"\d{3}-\d{4}", answers[10].text)
    # Not whole texts: in bfloat16, sizes of batches move logits by a little.
    assert [answer.token_ids[:4] for answer in answers[:4]] == [ids[:4] for ids in alone]


def test_masks_go_with_their_requests(engine: GpuEngine) -> None:
    """After constrained ones, the slots of free requests are free of masks."""
    greedy = SamplingParams(temperature=0.0)
    free = [("Once upon a time", greedy, None)] * 3
    first = [answer.token_ids for answer in engine.run(free, 30)]
    yes = Grammar(GrammarKind.REGEX, "yes|no", (EOS,))
    assert {answer.text for answer in engine.run([("Is it so?", greedy, yes)] * 16, 10)} <= {"yes", "no"}
    assert [answer.token_ids for answer in engine.run(free, 30)] == first


def test_the_same_seed_gives_the_same_constrained_answer(engine: GpuEngine) -> None:
    request = ("A person:", SamplingParams(temperature=1.2, seed=11), schema_grammar())
    others = [("Something else", SamplingParams(temperature=1.0, seed=5), None)] * 5
    one, two = (engine.run([*others, request, *others], 40)[5].token_ids for _ in range(2))
    assert one == two
