"""The graph's second output: hidden rows of the slots that asked, from which their logits come."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import tvm
from tvm import relax

from rank_group import Artifacts
from reference_llama import to_bfloat16
from tiny_models import MODELS
from tpserve.compile.config import CompileConfig, ModelConfig
from tpserve.compile.pipeline import build_graph
from tpserve.proto.messages import PromptChunk, SamplingParams, SlotAdd, StepPlan, StepResult
from tpserve.proto.rank import RankConfig
from tpserve.worker.runner import Runner


@pytest.mark.parametrize(
    ("kernels", "quantization"),
    [("tuned", "q0f32"), ("portable", "q0f32"), ("portable", "q0bf16"), ("portable", "fp8")],
)
def test_logits_come_from_the_row(
    tmp_path: Path,
    artifacts: Artifacts,
    kernels: Literal["tuned", "portable"],
    quantization: Literal["q0f32", "q0bf16", "fp8"],
) -> None:
    """A row is float32 whatever the type of activations."""
    model = MODELS["llama_9q_3kv_tied"]
    model.write(tmp_path)
    config = RankConfig(
        rank=0,
        tp_size=1,
        model_dir=tmp_path,
        artifact_dir=artifacts.build(tmp_path, 1, kernels=kernels, quantization=quantization),
        load_format="auto",
        num_pages=8,
        max_num_seqs=4,
        num_threads=1,
        group_name=f"unused-{os.getpid()}",
        collective_timeout_s=10.0,
    )
    asks = SamplingParams(temperature=0.0, num_logprobs=5, wants_hidden=True)
    free = SamplingParams(temperature=0.0, num_logprobs=0)
    prompt = tuple(range(3, 23))
    runner = Runner(config, lambda done, total: None)
    try:
        added = (SlotAdd(2, free, (0, 1)), SlotAdd(1, asks, (2, 3)))
        result = runner.execute(
            StepPlan(1, added_slots=added, chunks=(PromptChunk(2, 0, (5, 6), True), PromptChunk(1, 0, prompt, True)))
        )
        # The slot's next owner did not ask.
        owner = SlotAdd(1, free, (4, 5))
        chunk = PromptChunk(1, 0, prompt, True)
        again = runner.execute(StepPlan(2, removed_slots=(1,), added_slots=(owner,), chunks=(chunk,)))
    finally:
        runner.close()
    wire = StepResult.from_pb(result.to_pb())  # as the coordinator gets it
    row = np.frombuffer(wire.logprobs[1][0].hidden, "<f4")
    embedding = model.weights()["model.embed_tokens.weight"]
    if quantization != "q0f32":
        embedding = to_bfloat16(embedding)
    assert row.shape == (embedding.shape[1],)
    logits = embedding @ row
    logprobs = logits - np.log(np.exp(logits).sum())
    best = np.argsort(-logprobs)[:5]
    assert [token for token, _ in wire.logprobs[1][0].top] == best.tolist()
    assert [value for _, value in wire.logprobs[1][0].top] == pytest.approx(logprobs[best].tolist(), abs=1e-4)
    assert wire.logprobs[2][0].hidden == b""
    assert again.logprobs[1][0].hidden == b""


def norms_of(config: ModelConfig, compile_config: CompileConfig) -> list[str]:
    """Return how many rows each norm's residual stream has, in the order of the calls."""
    found: list[str] = []

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Call) and expr.op == tvm.ir.Op.get("relax.call_dps_packed"):
            if "add_rms_norm" in str(expr.args[0].global_symbol):
                found.append(str(expr.ty.fields[0].shape[0]))

    relax.analysis.post_order_visit(build_graph(config, compile_config).module["step"], visit)
    return found


@pytest.mark.parametrize(
    ("tp_size", "quantization", "target", "within"),
    [
        (1, "q0f32", "llvm", True),
        (2, "q0f32", "llvm", True),
        (1, "q0bf16", "cuda", True),
        (2, "q0bf16", "cuda", False),  # ranks have some rows of the stream each
        (1, "fp8", "cuda", False),
    ],
)
def test_the_last_layer_has_wanted_rows_alone(
    tmp_path: Path,
    tp_size: int,
    quantization: Literal["q0f32", "q0bf16", "fp8"],
    target: Literal["llvm", "cuda"],
    within: bool,
) -> None:
    """Behind its attention."""
    MODELS["llama_4q_2kv"].write(tmp_path)
    model = ModelConfig.from_hf(tmp_path)
    config = CompileConfig(
        tp_size, quantization, "tuned", target, max_model_len=64, max_num_batched_tokens=100, max_num_seqs=4
    )
    rows = norms_of(model, config)
    assert len(rows) == 2 * model.num_layers
    assert set(rows[:-2]) == {"num_tokens"}
    assert rows[-2:] == ["num_rows" if within else "num_tokens"] * 2
