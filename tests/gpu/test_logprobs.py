"""Log-probabilities of greedy text against a float32 reference, through the kernels that real sizes take.

The models are random. One has heads of 128 and whole groups of e4m3 scales, so that at each TP degree decodes go by the
fused kernels; one the sizes of a draft, whose layers take three. Prompts end on both sides of pages, stages and chunks
of attention, and one text grows across a chunk's end. Each token that the engine chose is looked up in the reference's
distribution after the same text: a wrong scale, order or split is off by whole units, bfloat16 by hundredths.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gpu_devices import NUM_DEVICES
from rank_group import Artifacts, RankGroup, RankProcesses, run_scheduler
from reference_llama import log_probs, rounded
from tiny_models import JOINED, WIDE, TinyModel
from tpserve.coordinator.config import SchedulerConfig
from tpserve.coordinator.request import Request
from tpserve.coordinator.scheduler import Scheduler
from tpserve.proto.manifest import Manifest
from tpserve.proto.messages import SamplingParams

FOLDERS_VARIABLE = "TPSERVE_CUDA_WIDE"
"""JSON list of artifact folders of the models, compiled on another machine, in place of compiling here."""
OFF_BY = {"q0bf16": 0.25, "fp8": 1.5}
"""Largest difference of a log-probability, and largest gap below the reference's best token."""
TYPICAL = {"q0bf16": 0.03, "fp8": 0.25}
"""Their median."""
PROMPTS = [1, 7, 16, 33, 64, 127, 200, 255, 256, 505, 700]
NUM_TOKENS = 24
MAX_NUM_SEQS, MAX_NUM_TOKENS, MAX_MODEL_LEN, NUM_PAGES = 16, 256, 2048, 512

CASES = [
    pytest.param(WIDE, tp_size, quantization, marks=pytest.mark.gpu(count=tp_size), id=f"tp{tp_size}-{quantization}")
    for quantization in ("q0bf16", "fp8")
    for tp_size in (1, 2, 4)
]
CASES.append(pytest.param(JOINED, 1, "fp8", marks=pytest.mark.gpu, id="tp1-fp8-joined"))


@pytest.fixture(scope="session")
def rank_processes() -> Iterator[RankProcesses]:
    processes = RankProcesses()
    yield processes
    processes.close()


def artifact(
    tmp_path_factory: pytest.TempPathFactory, model: TinyModel, folder: Path, tp_size: int, quantization: str
) -> Path:
    given = [Path(each) for each in json.loads(os.environ.get(FOLDERS_VARIABLE, "[]"))]
    for each in given:
        manifest = Manifest.load(each)
        wanted = (model.config["hidden_size"], tp_size, quantization)
        if (manifest.hidden_size, manifest.tp_size, manifest.quantization) == wanted:
            return each
    if given:
        pytest.skip(f"{FOLDERS_VARIABLE} has no library of {model.name}, TP={tp_size} in {quantization}")
    return Artifacts(tmp_path_factory.getbasetemp() / "artifacts").build(
        folder,
        tp_size,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=MAX_NUM_TOKENS,
        max_num_seqs=MAX_NUM_SEQS,
        target="cuda",
        quantization=quantization,  # type: ignore[arg-type]  # from the parameters above
    )


def prompt(size: int) -> list[int]:
    assert WIDE.config["vocab_size"] == JOINED.config["vocab_size"]
    ids: list[int] = np.random.default_rng(size).integers(0, WIDE.config["vocab_size"], size).tolist()
    return ids


def generate(ranks: RankGroup, sizes: list[int]) -> list[tuple[list[int], list[float]]]:
    """Return the tokens and their log-probabilities of prompts that run together."""
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_NUM_TOKENS,
            max_model_len=MAX_MODEL_LEN,
            page_size=16,
            num_pages=NUM_PAGES,
            enable_prefix_cache=False,
        )
    )
    sampling = SamplingParams(temperature=0.0, num_logprobs=0)
    for i, size in enumerate(sizes):
        scheduler.add_request(Request(i, tuple(prompt(size)), sampling, NUM_TOKENS))
    found: list[tuple[list[int], list[float]]] = [([], []) for _ in sizes]
    for event in run_scheduler(ranks, scheduler):
        found[event.request_id][0].extend(event.token_ids)
        found[event.request_id][1].extend(each.logprob for each in event.logprobs)
    return found


def check(model: TinyModel, sizes: list[int], found: list[tuple[list[int], list[float]]], quantization: str) -> None:
    weights = rounded(model.weights())
    off = []
    for size, (tokens, logprobs) in zip(sizes, found, strict=True):
        assert len(tokens) == len(logprobs) == NUM_TOKENS
        reference = log_probs(model.config, weights, prompt(size) + tokens[:-1])[size - 1 :]
        chosen = reference[np.arange(NUM_TOKENS), tokens]
        off.append(np.maximum(np.abs(chosen - logprobs), reference.max(-1) - chosen))
    worst, median = float(np.max(off)), float(np.median(off))
    print(f"{quantization}: off by {worst:.3f} at most, {median:.4f} in the median")
    assert worst < OFF_BY[quantization]
    assert median < TYPICAL[quantization]


@pytest.mark.parametrize(("model", "tp_size", "quantization"), CASES)
def test_decodes_are_those_of_the_reference(
    model: TinyModel,
    tp_size: int,
    quantization: str,
    rank_processes: RankProcesses,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("model")
    model.write(folder)
    with rank_processes.group(
        folder,
        artifact(tmp_path_factory, model, folder, tp_size, quantization),
        tp_size,
        num_pages=NUM_PAGES,
        max_num_seqs=MAX_NUM_SEQS,
        devices=[rank % NUM_DEVICES for rank in range(tp_size)],
    ) as ranks:
        check(model, PROMPTS, generate(ranks, PROMPTS), quantization)
        check(model, PROMPTS[:3], generate(ranks, PROMPTS[:3]), quantization)
