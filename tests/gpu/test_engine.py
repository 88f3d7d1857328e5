"""Greedy text of SmolLM2 on GPUs against transformers' in float32: the real scheduler, real ranks, one process each.

bfloat16 activations move logits by a few hundredths, so a text may part from the reference where the reference's two
best logits are that close, and nowhere else; fp8, of weights or of KV pages, moves them by more. Within the engine
neither the prefix cache nor preemption may change what a bfloat16 tie allows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpu_devices import NUM_DEVICES
from rank_group import Artifacts, RankGroup, RankProcesses, run_scheduler
from tpserve.compile.gguf import convert_gguf
from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.request import Request
from tpserve.coordinator.scheduler import Scheduler
from tpserve.proto.manifest import Manifest
from tpserve.proto.messages import SamplingParams
from tpserve.proto.rank import SizeTime
from tpserve.worker.buckets import make_buckets

GOLDENS = Path(__file__).parents[1] / "goldens" / "smollm2.json"
TIE = {("q0bf16", "auto"): 0.25, ("fp8", "auto"): 2.5, ("q0bf16", "fp8"): 2.0, ("fp8", "fp8"): 3.0}
"""Gap of the reference's two best logits below which the engine may choose the other, by types of weights and of KV
pages. The largest seen were 0.20, 1.94, 1.63 and 1.16: 135 million parameters bear e4m3 badly. A last bit of bfloat16
decides how a key is rounded, and a key of much weight moves the scores."""
NUM_PAGES = 1024
MAX_NUM_SEQS, MAX_NUM_TOKENS, MAX_MODEL_LEN = 16, 256, 2048
FOLDERS_VARIABLE = "TPSERVE_CUDA_FOLDERS"
"""JSON list of what `tpserve compile` printed on another machine, in place of compiling here."""

Texts = list[list[int]]


@pytest.fixture(scope="session")
def rank_processes() -> Iterator[RankProcesses]:
    processes = RankProcesses()
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def goldens() -> list[dict[str, Any]]:
    prompts: list[dict[str, Any]] = json.loads(GOLDENS.read_text())["prompts"]
    return prompts


Types = tuple[str, str]
"""Of weights, and --kv-cache-dtype."""


def folders(
    tmp_path_factory: pytest.TempPathFactory, tp_size: int, types: Types, max_num_draft_tokens: int = 0
) -> tuple[Path, Path]:
    """Return the model's and the artifact's folder; with draft tokens, of a library that verifies at least so many."""
    quantization, kv_cache_dtype = types
    dtype = "float8_e4m3fn" if kv_cache_dtype == "fp8" else "bfloat16"
    for given in json.loads(os.environ.get(FOLDERS_VARIABLE, "[]")):
        manifest = Manifest.load(Path(given["artifact_dir"]))
        fits = (
            manifest.max_num_rows >= manifest.max_num_seqs * (1 + max_num_draft_tokens)
            if max_num_draft_tokens
            else manifest.max_num_rows == manifest.max_num_seqs
        )
        if fits and (manifest.tp_size, manifest.quantization, manifest.kv.dtype) == (tp_size, quantization, dtype):
            return Path(given["model_dir"]), Path(given["artifact_dir"])
    if FOLDERS_VARIABLE in os.environ:
        wanted = f"TP={tp_size} in {quantization} with KV of {dtype}, for {max_num_draft_tokens} draft tokens"
        pytest.skip(f"{FOLDERS_VARIABLE} has no library of {wanted}")
    source = os.environ.get("TPSERVE_DEMO_MODEL")
    assert source, "set TPSERVE_DEMO_MODEL to the demo model's GGUF file, as `make test-gpu` does"
    model = tmp_path_factory.getbasetemp() / "demo"
    if not model.exists():
        model.mkdir()
        convert_gguf(Path(source), model, lambda done, total: None)
    artifact = Artifacts(tmp_path_factory.getbasetemp() / "artifacts").build(
        model,
        tp_size,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=MAX_NUM_TOKENS,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_draft_tokens=max_num_draft_tokens,
        target="cuda",
        quantization=quantization,  # type: ignore[arg-type]  # from the parameters below
        kv_cache_dtype=kv_cache_dtype,  # type: ignore[arg-type]
    )
    return model, artifact


CASES = [
    pytest.param((1, ("q0bf16", "auto"), "auto"), marks=pytest.mark.gpu(count=1), id="tp1"),
    pytest.param((1, ("fp8", "auto"), "auto"), marks=pytest.mark.gpu(count=1), id="tp1-fp8"),
    pytest.param((1, ("q0bf16", "fp8"), "auto"), marks=pytest.mark.gpu(count=1), id="tp1-fp8kv"),
    pytest.param((1, ("fp8", "fp8"), "auto"), marks=pytest.mark.gpu(count=1), id="tp1-fp8-fp8kv"),
    pytest.param((2, ("q0bf16", "auto"), "push"), marks=pytest.mark.gpu(count=2), id="tp2"),
    pytest.param((2, ("q0bf16", "auto"), "nccl"), marks=pytest.mark.gpu(count=2), id="tp2-nccl"),
    pytest.param((2, ("fp8", "auto"), "push"), marks=pytest.mark.gpu(count=2), id="tp2-fp8"),
    pytest.param((2, ("q0bf16", "fp8"), "push"), marks=pytest.mark.gpu(count=2), id="tp2-fp8kv"),
    # On two GPUs the ranks take turns; slow, but the same kernels and protocol.
    pytest.param((4, ("q0bf16", "auto"), "push"), marks=pytest.mark.gpu(count=2), id="tp4"),
]


@pytest.fixture(scope="module", params=CASES)
def group(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, rank_processes: RankProcesses
) -> Iterator[tuple[RankGroup, Types]]:
    tp_size, types, collectives = request.param
    model, artifact = folders(tmp_path_factory, tp_size, types)
    devices = [rank % NUM_DEVICES for rank in range(tp_size)]
    with rank_processes.group(
        model,
        artifact,
        tp_size,
        num_pages=NUM_PAGES,
        max_num_seqs=MAX_NUM_SEQS,
        devices=devices,
        collectives=collectives,
    ) as ranks:
        yield ranks, types


def generate(
    ranks: RankGroup,
    goldens: list[dict[str, Any]],
    scheduler: Scheduler | None = None,
    *,
    first_id: int = 0,
    goes_on: bool = False,
) -> Texts:
    """Return the greedy tokens of prompts that run together."""
    scheduler = scheduler or make_scheduler()
    out: dict[int, list[int]] = {}
    for request_id, golden in enumerate(goldens, first_id):
        prompt, count = tuple(golden["prompt_token_ids"]), len(golden["output_token_ids"])
        scheduler.add_request(Request(request_id, prompt, SamplingParams(temperature=0.0), count))
        out[request_id] = []
    for event in run_scheduler(ranks, scheduler, clear=not goes_on):
        out[event.request_id] += event.token_ids
    return list(out.values())


def make_scheduler(num_pages: int = NUM_PAGES, *, enable_prefix_cache: bool = True) -> Scheduler:
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


def check(goldens: list[dict[str, Any]], texts: Texts, types: Types) -> None:
    wrong, largest = [], 0.0
    for golden, text in zip(goldens, texts, strict=True):
        pairs = zip(golden["output_token_ids"], text, strict=True)
        first = next((i for i, (want, have) in enumerate(pairs) if want != have), None)
        if first is not None:
            gap = golden["gaps"][first]
            largest = max(largest, gap)
            if gap >= TIE[types]:
                wrong.append(f"{golden['name']} parts at {first}, where the reference's best are {gap} apart")
    print(f"largest gap at which a text parted: {largest:.3f}")
    assert not wrong, "; ".join(wrong)


def test_each_prompt_alone(group: tuple[RankGroup, Types], goldens: list[dict[str, Any]]) -> None:
    ranks, types = group
    check(goldens, [generate(ranks, [golden])[0] for golden in goldens], types)


def test_all_together_and_again_from_the_prefix_cache(
    group: tuple[RankGroup, Types], goldens: list[dict[str, Any]]
) -> None:
    ranks, types = group
    scheduler = make_scheduler()
    together = generate(ranks, goldens, scheduler, goes_on=True)
    check(goldens, together, types)
    again = generate(ranks, goldens, scheduler, first_id=100)
    assert scheduler.stats().num_prefix_hit_tokens > 0
    check(goldens, again, types)


def test_preempted_prompts(group: tuple[RankGroup, Types], goldens: list[dict[str, Any]]) -> None:
    """Pages for less than half of them: some are preempted and computed again."""
    ranks, types = group
    prompts = [golden for golden in goldens if len(golden["prompt_token_ids"]) < 100][:8]
    scheduler = make_scheduler(30, enable_prefix_cache=False)
    check(prompts, generate(ranks, prompts, scheduler), types)
    assert scheduler.stats().num_preemptions > 0


def test_steps_of_each_size_are_timed_and_chosen_by_it(
    group: tuple[RankGroup, Types], goldens: list[dict[str, Any]]
) -> None:
    ranks, types = group
    times: list[tuple[SizeTime, ...]] = ranks.call("__getattribute__", "size_times")
    buckets = {(each.num_tokens, each.decode_only) for each in make_buckets(MAX_NUM_SEQS, MAX_NUM_TOKENS)}
    for of_rank in times:
        assert {(each.num_tokens, each.decode_only) for each in of_rank} == buckets
        assert all(0 < each.step_us < 1e6 for each in of_rank)
    scheduler = make_scheduler()
    scheduler.learn_size_times(times[0])
    check(goldens, generate(ranks, goldens, scheduler), types)
