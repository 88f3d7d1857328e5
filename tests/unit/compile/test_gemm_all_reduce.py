"""A GEMM and the all-reduce after it in graphs for several GPUs: one call, whose outputs have memory of their own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tvm
from tvm import relax

from eagle_models import TinyHead, deep
from tiny_models import MODELS
from tpserve.collectives.names import GEMM_ALL_REDUCE_ADD_RMS_NORM, GEMM_ALL_REDUCE_ADD_RMS_NORM_FP8, WHOLE_ROWS
from tpserve.compile import pipeline
from tpserve.compile.config import CompileConfig, ModelConfig
from tpserve.compile.eagle import EagleHeadConfig
from tpserve.compile.pipeline import Graph, build_graph, build_head_graph, lower

BF16 = CompileConfig(2, "q0bf16", "tuned", "cuda", max_model_len=64, max_num_batched_tokens=100, max_num_seqs=4)
FP8 = replace(BF16, quantization="fp8")


def model(folder: Path, name: str = "llama_4q_2kv") -> ModelConfig:
    MODELS[name].write(folder)
    return ModelConfig.from_hf(folder)


def fused_calls(config: ModelConfig, compile_config: CompileConfig) -> list[tuple[str, list[Any]]]:
    """Return the names of the fused calls in their order, and what each takes: shapes of tensors, other values."""
    found: list[tuple[str, list[Any]]] = []

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Call) and expr.op == tvm.ir.Op.get("relax.call_dps_packed"):
            name = str(expr.args[0].global_symbol)
            if "all_reduce" in name:
                takes = [arg.value if isinstance(arg, tvm.ir.StringImm) else arg for arg in expr.args[1].fields]
                found.append((name, takes))

    relax.analysis.post_order_visit(build_graph(config, compile_config).module["step"], visit)
    return found


def test_each_layer_has_two_calls(tmp_path: Path) -> None:
    config = model(tmp_path)
    calls = fused_calls(config, BF16)
    assert [name for name, _ in calls] == [GEMM_ALL_REDUCE_ADD_RMS_NORM] * 2 * config.num_layers
    for _, (gemm, x, weights, residual, norm, eps) in calls:
        assert gemm == "gemm"
        assert [len(value.ty.shape) for value in (x, weights, residual, norm)] == [2, 3, 2, 1]
        assert float(eps) == pytest.approx(config.rms_norm_eps)


def test_the_last_norm_is_not_quantised(tmp_path: Path) -> None:
    calls = fused_calls(model(tmp_path), FP8)
    assert {name for name, _ in calls[:-1]} == {GEMM_ALL_REDUCE_ADD_RMS_NORM_FP8}
    assert calls[-1][0] == GEMM_ALL_REDUCE_ADD_RMS_NORM
    assert {len(takes) for _, takes in calls} == {1 + 4 + 3}  # x and weights come with scales


def test_biases_are_arguments_of_the_gemm(tmp_path: Path) -> None:
    calls = fused_calls(model(tmp_path, "llama_8q_1kv_biases"), BF16)
    assert {takes[0] for _, takes in calls} == {"gemm_bias"}
    assert {len(takes) for _, takes in calls} == {1 + 3 + 3}


@pytest.mark.parametrize(
    ("compile_config", "kernel"),
    [
        (replace(BF16, tp_size=1), "cuda.gemm_add_rms_norm"),
        (replace(FP8, tp_size=1), "cuda.add_rms_norm_fp8"),
        (replace(BF16, target="llvm", quantization="q0f32"), "cpu.add_rms_norm"),
    ],
)
def test_one_gpu_and_cpus_have_kernels_of_their_own(tmp_path: Path, compile_config: CompileConfig, kernel: str) -> None:
    externs = build_graph(model(tmp_path), compile_config).externs
    assert not [name for name in externs if "gemm_all_reduce" in name]
    assert f"tpserve.{kernel}" in externs


def test_norms_on_one_gpu_are_begun_by_one_gemm_and_ended_by_the_next(tmp_path: Path) -> None:
    """But the first, which follows no GEMM, and the last, which is wanted whole."""
    config, counts = model(tmp_path), Counter[str]()

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Call) and expr.op == tvm.ir.Op.get("relax.call_dps_packed"):
            counts[str(expr.args[0].global_symbol).removeprefix("tpserve.cuda.")] += 1

    relax.analysis.post_order_visit(build_graph(config, replace(BF16, tp_size=1)).module["step"], visit)
    assert counts["rms_norm"] == counts["add_rms_norm"] == 1
    assert counts["gemm_add_rms_norm"] == 2 * config.num_layers - 1
    assert counts["gemm_normed"] == config.num_layers - 1
    assert counts["gemm_normed_silu_mul"] == config.num_layers


def graph_of(kind: str, folder: Path) -> Graph:
    """A model with bfloat16 or fp8 weights, the same with hidden rows for a head, or that head."""
    if kind in ("bf16", "fp8"):
        return build_graph(model(folder), BF16 if kind == "bf16" else FP8)
    pair = TinyHead(deep(MODELS["llama_4q_2kv"]), changes={"norm_before_residual": True})
    pair.target.write(folder / "target")
    pair.write(folder / "head")
    target = ModelConfig.from_hf(folder / "target")
    head = EagleHeadConfig.from_hf(folder / "head", target)
    config = replace(BF16, aux_layers=head.aux_layers)
    return build_graph(target, config) if kind == "with rows" else build_head_graph(head, config)


@pytest.mark.parametrize(("kind", "num_layers"), [("bf16", 2), ("fp8", 2), ("with rows", 8), ("head", 1)])
def test_no_output_of_a_call_has_memory_of_its_inputs(
    tmp_path: Path, kind: str, num_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reduction writes its outputs while blocks of the GEMM still read the inputs."""
    planned: list[relax.Function] = []

    def keep(function: relax.Function) -> int:
        planned.append(function)
        return 0

    monkeypatch.setattr(pipeline, "_planned_bytes", keep)
    lower(graph_of(kind, tmp_path).module, tvm.target.Target({"kind": "llvm"}))
    storages: dict[relax.Var, relax.Var] = {}
    tuples: dict[relax.Var, list[relax.Var]] = {}
    seen = seen_whole = 0
    for binding in (b for function in planned for block in function.body.blocks for b in block.bindings):
        value = binding.value
        if isinstance(value, relax.Tuple):
            tuples[binding.var] = list(value.fields)
        if isinstance(value, relax.TupleGetItem) and value.tuple_value in tuples:
            value = tuples[value.tuple_value][value.index]
        if isinstance(value, relax.Var) and value in storages:
            storages[binding.var] = storages[value]
        if not isinstance(value, relax.Call):
            continue
        if value.op == tvm.ir.Op.get("relax.memory.alloc_tensor"):
            storages[binding.var] = value.args[0]
        elif isinstance(value.op, relax.ExternFunc):
            name, used = str(value.op.global_symbol), [storages[arg] for arg in value.args if arg in storages]
            if "gemm_all_reduce" in name:
                seen += 1
                assert len(set(used)) == len(used)
                assert len(used) >= (4 if name.endswith("fp8") else 3) + 2  # outputs, x and the residual stream
            elif name == WHOLE_ROWS:
                seen_whole += 1
                assert len(set(used)) == len(used) == 2
    assert seen == 2 * num_layers
    assert seen_whole == {"with rows": 3, "head": 1}.get(kind, 0)
    assert len(set(storages.values())) < len(storages), "nothing shares memory, so this shows nothing"
