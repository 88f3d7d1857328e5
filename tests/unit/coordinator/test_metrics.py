"""What the engine counts is what has happened, and what it exports is valid, documented and named in one place."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from scripts import ROOT, load_script
from simulated_group import (
    BUCKET_TOKENS,
    COLLECTIVE_BYTES,
    LATE_RANK,
    NUM_CHOICES,
    NUM_TOKENS,
    OTHER_COLLECTIVE_US,
    PROMPT,
    STEP_US,
    generate,
    running_engine,
)
from tpserve.coordinator.gateway.metrics import HttpMetrics
from tpserve.coordinator.metric_values import Histogram
from tpserve.coordinator.metrics import Metrics
from tpserve.coordinator.metrics_catalogue import CATALOGUE, VLLM_PREFIX, sample_names
from tpserve.proto.messages import StepResult


def samples(text: str) -> dict[str, float]:
    """Return every sample by name and labels, the common ones left out."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k not in ("model_name", "engine"))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


async def test_everything_is_counted() -> None:
    metrics = Metrics("m")
    async with running_engine(3, metrics) as engine:
        await generate(engine)
        # The last steps may still be on their way to the readers of some ranks.
        async with asyncio.timeout(20):
            while True:
                found = {name.removeprefix("tpserve_"): value for name, value in samples(metrics.text()).items()}
                num_steps = found["steps_total"]
                if all(found[f"rank_step_seconds_count{{rank={rank}}}"] == num_steps for rank in range(3)):
                    break
                await asyncio.sleep(0.01)
    assert num_steps >= NUM_TOKENS
    assert found["prompt_tokens_total"] == len(PROMPT)
    assert found["generation_tokens_total"] == NUM_CHOICES * NUM_TOKENS
    assert found["request_success_total{finished_reason=length}"] == NUM_CHOICES
    assert found["inter_token_latency_seconds_count"] == NUM_CHOICES * (NUM_TOKENS - 1)
    for name in ("queue_time", "prefill_time", "decode_time", "inference_time", "time_per_output_token"):
        assert found[f"request_{name}_seconds_count"] == NUM_CHOICES, name
    # What a choice waits for adds up.
    parts = found["request_queue_time_seconds_sum"] + found["request_inference_time_seconds_sum"]
    assert parts == pytest.approx(found["e2e_request_latency_seconds_sum"])
    halves = found["request_prefill_time_seconds_sum"] + found["request_decode_time_seconds_sum"]
    assert halves == pytest.approx(found["request_inference_time_seconds_sum"])
    assert found["inter_token_latency_seconds_sum"] == pytest.approx(found["request_decode_time_seconds_sum"])
    assert found["request_params_n_sum"] == NUM_CHOICES
    assert found["request_params_max_tokens_sum"] == NUM_TOKENS
    # Of steps and ranks.
    num_observed = found["step_seconds_count{kind=decode}"] + found["step_seconds_count{kind=mixed}"]
    assert num_observed == num_steps
    assert found[f"graph_bucket_steps_total{{bucket={BUCKET_TOKENS}}}"] == num_observed
    assert found[f"graph_bucket_seconds_total{{bucket={BUCKET_TOKENS}}}"] == pytest.approx(num_observed * STEP_US / 1e6)
    assert found["step_padding_tokens_total"] == num_observed * BUCKET_TOKENS - found["iteration_tokens_sum"]
    assert found["host_gap_seconds_count"] == num_observed - 1  # before the first there was nothing to do
    for rank in range(3):
        count = found[f"rank_step_seconds_count{{rank={rank}}}"]
        assert found[f"collective_bytes_total{{kind=all_reduce,rank={rank}}}"] == count * COLLECTIVE_BYTES
    others = [found[f"straggler_steps_total{{rank={rank}}}"] for rank in range(3) if rank != LATE_RANK]
    assert others == [0, 0]
    late_steps = found[f"straggler_steps_total{{rank={LATE_RANK}}}"]
    assert late_steps == num_observed
    waited_s = late_steps * (OTHER_COLLECTIVE_US - 100) / 1e6
    assert found[f"straggler_wait_seconds_total{{rank={LATE_RANK}}}"] == pytest.approx(waited_s)


def test_drafts_are_counted_by_position() -> None:
    metrics = Metrics("m")
    # Slot 0 does not speculate, 1 accepts both of its draft tokens, 2 none, 3 one of two, 4 has nothing proposed.
    counts, drafted = (1, 3, 1, 2, 1), (0, 2, 2, 2, 0)
    result = StepResult(1, slots=(0, 1, 2, 3, 4), token_ids=(0,) * 8, counts=counts, drafted=drafted, num_tokens=11)
    metrics.observe_step(replace(result, step_us=5000, draft_us=700), None)
    metrics.observe_step(StepResult(2, slots=(0, 1), token_ids=(0, 0), num_tokens=2, step_us=1000), None)
    metrics.observe_step(replace(result, num_tokens=20), None)  # nine tokens of a prompt beside
    for length, num_given_up in ((2, 0), (0, 3), (2, 1)):
        metrics.count_drafting(length, num_given_up)
    found = {name.removeprefix("tpserve_"): value for name, value in samples(metrics.text()).items()}
    assert found["spec_decode_num_drafts_total"] == 6
    assert found["spec_decode_num_draft_tokens_total"] == 12
    assert found["spec_decode_num_accepted_tokens_total"] == 6
    assert found["spec_decode_num_accepted_tokens_per_pos_total{position=0}"] == 4
    assert found["spec_decode_num_accepted_tokens_per_pos_total{position=1}"] == 2
    assert found["spec_decode_draft_seconds_total"] == pytest.approx(700e-6)
    assert found["spec_decode_steps_total{length=2}"] == 2
    assert found["spec_decode_given_up_total"] == 4
    kinds = {kind: found[f"step_seconds_count{{kind={kind}}}"] for kind in ("decode", "verify", "mixed")}
    assert kinds == {"decode": 1, "verify": 1, "mixed": 1}


async def test_the_scrape_holds_what_the_catalogue_says_and_nothing_else() -> None:
    metrics = Metrics("m", compat="vllm")
    http = HttpMetrics()
    http.begin("/x")
    http.end("/x", 200, 0.1)
    http.stream_failed(499)
    http.key_request("alice")
    http.key_limited("alice", "tokens")
    http.key_tokens("alice", prompt=3, generation=2)
    async with running_engine(2, metrics) as engine:
        await generate(engine)
        metrics.count_lost_rank("0")
        text = http.render(metrics.text())
    names = {name.partition("{")[0] for name in samples(text)}
    own = {name for name in names if not name.startswith(VLLM_PREFIX)}
    assert own == sample_names()
    vllm = {VLLM_PREFIX + spec.vllm + suffix for spec in CATALOGUE if spec.vllm is not None for suffix in spec.suffixes}
    assert names - own == vllm
    assert "vllm:iteration_tokens_total_bucket" in vllm
    if promtool := shutil.which("promtool"):
        # vLLM's own names do not pass: they have a colon.
        lines = [line for line in text.splitlines() if VLLM_PREFIX not in line]
        checked = await asyncio.to_thread(
            subprocess.run,
            [promtool, "check", "metrics"],
            input="\n".join(lines) + "\n",
            text=True,
            capture_output=True,
            timeout=30,
        )
        assert (checked.returncode, checked.stderr) == (0, ""), checked.stderr


def test_vllm_values_are_ours() -> None:
    metrics = Metrics("m", compat="vllm")
    metrics.ttft.observe(0.0123, 3)
    found = samples(metrics.text())
    for suffix in ("bucket{le=0.015}", "sum", "count"):
        name = "time_to_first_token_seconds_" + suffix
        assert found["vllm:" + name] == found["tpserve_" + name] > 0


async def test_the_cache_is_described() -> None:
    metrics = Metrics("m", cache_dtype="float8_e4m3fn")
    async with running_engine(1, metrics):
        found = samples(metrics.text())
    (name,) = (name for name in found if name.startswith("tpserve_cache_config_info{"))
    labels = dict(part.split("=") for part in name.partition("{")[2].removesuffix("}").split(","))
    assert labels["cache_dtype"] == "float8_e4m3fn"
    assert labels.keys() == {"block_size", "num_gpu_blocks", "enable_prefix_caching", "cache_dtype"}


def test_a_histogram_counts_equal_values_at_once_and_borders_as_prometheus_does() -> None:
    histogram = Histogram((1.0, 2.0))
    for value, count in ((1.0, 1), (1.5, 3), (9.0, 2)):
        histogram.observe(value, count)
    assert histogram.cumulative() == [("1.0", 1.0), ("2.0", 4.0), ("+Inf", 6.0)]
    assert histogram.sum == 1.0 + 4.5 + 18.0


def test_ranks_that_are_level_make_no_straggler() -> None:
    metrics = Metrics("m")
    metrics.make_ranks(["0", "1"])
    metrics.observe_group([StepResult(1, rank, step_us=1000, collective_us=100 + 50 * rank) for rank in range(2)])
    found = samples(metrics.text())
    assert found["tpserve_straggler_steps_total{rank=0}"] == 0
    assert found["tpserve_straggler_wait_seconds_total{rank=0}"] == pytest.approx(50e-6)


def test_the_table_of_metrics_is_that_of_the_code() -> None:
    table = load_script("docs/make_metrics_table.py").table()
    assert (ROOT / "docs/metrics.md").read_text() == table, "run docs/make_metrics_table.py"
