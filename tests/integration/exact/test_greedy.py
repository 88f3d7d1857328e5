"""Greedy text of the demo model, token for token what transformers gives, by the real scheduler on real groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rank_group import Artifacts, RankGroup, RankProcesses, run_scheduler
from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.request import Request
from tpserve.coordinator.scheduler import Scheduler
from tpserve.proto.messages import FinishReason, SamplingParams

GREEDY = SamplingParams(temperature=0.0)
MAX_MODEL_LEN = 1024
MAX_NUM_SEQS = 12
MAX_NUM_TOKENS = 128
END_TOKEN = 2

Outputs = dict[str, list[int]]


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda tp: f"tp{tp}")
def group(
    request: pytest.FixtureRequest, demo_folder: Path, artifacts: Artifacts, rank_processes: RankProcesses
) -> Iterator[RankGroup]:
    tp_size = request.param
    artifact = artifacts.build(
        demo_folder,
        tp_size,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=MAX_NUM_TOKENS,
        max_num_seqs=MAX_NUM_SEQS,
    )
    with rank_processes.group(demo_folder, artifact, tp_size, num_pages=256, max_num_seqs=MAX_NUM_SEQS) as group:
        yield group


def make_scheduler(*, num_pages: int = 256, enable_prefix_cache: bool = False) -> Scheduler:
    return Scheduler(
        SchedulerConfig(
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_NUM_TOKENS,
            max_model_len=MAX_MODEL_LEN,
            page_size=16,
            num_pages=num_pages,
            enable_prefix_cache=enable_prefix_cache,
        )
    )


def generate(group: RankGroup, scheduler: Scheduler, prompts: list[dict[str, Any]]) -> Outputs:
    """Run prompts together; return the tokens of each."""
    for i, prompt in enumerate(prompts):
        scheduler.add_request(Request(i, tuple(prompt["prompt_token_ids"]), GREEDY, len(prompt["output_token_ids"])))
    outputs: Outputs = {prompt["name"]: [] for prompt in prompts}
    for event in run_scheduler(group, scheduler):
        outputs[prompts[event.request_id]["name"]] += event.token_ids
    return outputs


def assert_golden(outputs: Outputs, prompts: list[dict[str, Any]]) -> None:
    wrong = []
    for prompt in prompts:
        expected, actual = prompt["output_token_ids"], outputs[prompt["name"]]
        if actual != expected:
            at = next((i for i, (a, b) in enumerate(zip(actual, expected, strict=False)) if a != b), len(actual))
            wrong.append(f"{prompt['name']} differs at token {at}, where the two best are {prompt['gaps'][at]} apart")
    assert not wrong, "; ".join(wrong)


def first_halves(prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where long texts would only cost time."""
    return [prompt | {"output_token_ids": prompt["output_token_ids"][:32]} for prompt in prompts]


def test_each_prompt_alone(group: RankGroup, demo_golden: dict[str, Any]) -> None:
    """The long one and the first half of two others, which differ by degree: all of them run together below."""
    prompts = demo_golden["prompts"]
    assert len(prompts) >= 12
    assert {len(prompt["output_token_ids"]) for prompt in prompts} == {64}
    *short, long = prompts
    assert len(long["prompt_token_ids"]) > MAX_NUM_TOKENS
    prompts = [*first_halves(short[group.num_ranks - 1 :: 9]), long]
    outputs: Outputs = {}
    for prompt in prompts:
        outputs |= generate(group, make_scheduler(), [prompt])
    assert_golden(outputs, prompts)


def test_all_prompts_together(group: RankGroup, demo_golden: dict[str, Any]) -> None:
    """More prompts than slots, chunked prefill beside decode, and a prefix cache that the chat prompts share."""
    prompts = demo_golden["prompts"]
    scheduler = make_scheduler(enable_prefix_cache=True)
    assert_golden(generate(group, scheduler, prompts), prompts)
    assert scheduler.stats().num_prefix_hit_tokens > 0


def test_preempted_prompts(group: RankGroup, demo_golden: dict[str, Any]) -> None:
    """Pages for two thirds of them: some are preempted and computed again."""
    prompts = [prompt for prompt in demo_golden["prompts"] if len(prompt["prompt_token_ids"]) < 100][:8]
    scheduler, prompts = make_scheduler(num_pages=20), first_halves(prompts)
    assert_golden(generate(group, scheduler, prompts), prompts)
    assert scheduler.stats().num_preemptions > 0


def test_the_end_token_ends(group: RankGroup, demo_golden: dict[str, Any]) -> None:
    (prompt,) = [prompt for prompt in demo_golden["prompts"] if prompt["name"] == "capital"]
    expected = prompt["output_token_ids"]
    scheduler = make_scheduler()
    scheduler.add_request(
        Request(1, tuple(prompt["prompt_token_ids"]), GREEDY, 64, stop_token_ids=frozenset({END_TOKEN}))
    )
    events = run_scheduler(group, scheduler)
    assert [event.token_ids[0] for event in events] == expected[: expected.index(END_TOKEN) + 1]
    assert [event.finish for event in events] == [None] * (len(events) - 1) + [FinishReason.STOP]
