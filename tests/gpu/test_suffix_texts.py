"""Suffix decoding on GPUs: texts of SmolLM2 that come a second time, drafted from those that have left."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from gpu.test_engine import GOLDENS, check
from gpu.test_speculation import make_scheduler, speculating
from rank_group import RankGroup, run_scheduler
from tpserve.coordinator.request import Request
from tpserve.proto.messages import SamplingParams
from unit.compile.test_cuda_speculation import MOST

pytestmark = pytest.mark.gpu(count=1)

CASES = [
    # TP of the model, and by which the ranks exchange activations.
    pytest.param((1, "auto"), marks=pytest.mark.gpu(count=1), id="tp1-suffix"),
    pytest.param((2, "push"), marks=pytest.mark.gpu(count=2), id="tp2-suffix"),
]


@pytest.fixture(scope="module", params=CASES)
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankGroup]:
    tp_size, collectives = request.param
    with speculating(tmp_path_factory, tp_size, None, collectives, lookup="suffix") as (ranks, _):
        yield ranks


@pytest.mark.parametrize("num_draft_tokens", [1, 3, MOST])
def test_greedy_texts_are_the_references_and_are_drafted_once_they_were_seen(
    group: RankGroup, num_draft_tokens: int
) -> None:
    goldens: list[dict[str, Any]] = json.loads(GOLDENS.read_text())["prompts"]
    for _ in range(2):
        scheduler = make_scheduler(num_draft_tokens)
        out: dict[int, list[int]] = {}
        several = num_tokens = 0
        for request_id, golden in enumerate(goldens):
            prompt, count = tuple(golden["prompt_token_ids"]), len(golden["output_token_ids"])
            scheduler.add_request(Request(request_id, prompt, SamplingParams(temperature=0.0), count))
            out[request_id] = []
        for event in run_scheduler(group, scheduler):
            out[event.request_id] += event.token_ids
            several += len(event.token_ids) > 1
            num_tokens += len(event.token_ids)
        check(goldens, list(out.values()), ("q0bf16", "auto"))
    assert several > 0.5 * num_tokens / (1 + num_draft_tokens), "what has left is hardly drafted from"
