"""Grouped scales of e4m3 activations: in graphs, their memory, and where one stands; nothing here needs a GPU."""

from __future__ import annotations

import ctypes
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import tvm
from tvm import relax

from scripts import ROOT
from tiny_models import MODELS
from tpserve.compile.config import CompileConfig, ModelConfig
from tpserve.compile.pipeline import Graph, build_graph, lower

FP8 = CompileConfig(1, "fp8", "tuned", "cuda", max_model_len=64, max_num_batched_tokens=100, max_num_seqs=4)
ATTENTION = {"attention_grouped", "gemm_fp8_grouped"}
SILU = {"gemm_fp8_silu_mul", "gemm_fp8_after_silu"}
GROUPED = ATTENTION | SILU
BY_ROW = {"quantize_fp8", "silu_mul_fp8", "gemm_fp8"}
HEADERS = f"-I{ROOT / 'compile/kernels/cuda'}"


def model(folder: Path, *, heads: int = 4, head_dim: int = 128, ffn: int = 512, bias: bool = False) -> ModelConfig:
    MODELS["llama_8q_1kv_biases" if bias else "llama_4q_2kv"].write(folder)
    config = ModelConfig.from_hf(folder)
    return replace(config, num_attention_heads=heads, head_dim=head_dim, num_kv_heads=1, intermediate_size=ffn)


def calls(config: ModelConfig, compile_config: CompileConfig) -> list[tuple[str, list[str]]]:
    """Return the kernels of the first layer in their order, with the shapes and types of what they make."""
    found: list[tuple[str, list[str]]] = []

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Call) and expr.op == tvm.ir.Op.get("relax.call_dps_packed"):
            outputs = expr.ty_args[0]
            fields = outputs.fields if isinstance(outputs, relax.TupleType) else [outputs]
            texts = [
                f"{field.dtype} {' x '.join(str(size).removeprefix('T.int64') for size in field.shape)}"
                for field in fields
            ]
            found.append((str(expr.args[0].global_symbol).removeprefix("tpserve.cuda."), texts))

    relax.analysis.post_order_visit(build_graph(config, compile_config).module["step"], visit)
    return found


def kernels(config: ModelConfig, tp_size: int = 1) -> set[str]:
    return kernels_of(build_graph(config, replace(FP8, tp_size=tp_size)))


def kernels_of(graph: Graph) -> set[str]:
    """Return what is called, or named as the GEMM of a call that does more."""
    names = {name.removeprefix("tpserve.cuda.") for name in graph.externs}

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, tvm.ir.StringImm):
            names.add(str(expr.value))

    relax.analysis.post_order_visit(graph.module["step"], visit)
    return names


def test_activation_and_attention_have_grouped_scales(tmp_path: Path) -> None:
    found = calls(model(tmp_path), FP8)
    assert [name for name, _ in found[2:8]] == [
        "gemm_fp8", "attention_grouped", "gemm_fp8_grouped", "add_rms_norm_fp8", "gemm_fp8_silu_mul",
        "gemm_fp8_after_silu",
    ]  # fmt: skip
    outputs = dict(found)
    for name, groups in (("attention_grouped", 2), ("gemm_fp8_silu_mul", 8)):
        values, scales = outputs[name][-2:]
        assert values == "float8_e4m3fn num_tokens x (512)"
        assert scales == f"float32 (2) x ({groups}) x (num_tokens + T.int64(7)) // T.int64(8) * T.int64(8)"


@pytest.mark.parametrize(
    ("heads", "head_dim", "ffn", "grouped", "by_row"),
    [
        (4, 128, 512, GROUPED, {"gemm_fp8"}),
        (4, 64, 512, GROUPED, {"gemm_fp8"}),  # two heads are a group
        (5, 64, 512, SILU, {"gemm_fp8", "quantize_fp8"}),  # one of five is left over
        (1, 128, 512, SILU, {"gemm_fp8", "quantize_fp8"}),  # half a stage of the GEMM
        (4, 128, 384, ATTENTION, {"gemm_fp8", "silu_mul_fp8"}),
        (1, 64, 300, set(), BY_ROW),
    ],
)
def test_sizes_that_cannot_be_grouped_have_a_scale_for_each_row(
    tmp_path: Path, heads: int, head_dim: int, ffn: int, grouped: set[str], by_row: set[str]
) -> None:
    called = kernels(model(tmp_path, heads=heads, head_dim=head_dim, ffn=ffn))
    assert called & (GROUPED | BY_ROW) == grouped | by_row


def test_the_size_is_that_of_the_rank(tmp_path: Path) -> None:
    config = model(tmp_path)
    assert kernels(config, 2) >= GROUPED  # 256 of each on a rank
    assert not kernels(config, 4) & GROUPED


def test_biases_are_added(tmp_path: Path) -> None:
    called = kernels(model(tmp_path, bias=True))
    assert called >= {f"{name}_bias" for name in ("gemm_fp8_grouped", *SILU)}
    assert not called & {"gemm_fp8_grouped", *SILU}


@pytest.mark.parametrize("suffix", ["", "_bias"])
@pytest.mark.parametrize(("heads", "head_dim", "kind"), [(4, 128, "gemm_fp8_grouped"), (5, 64, "gemm_fp8")])
def test_norms_on_one_gpu_are_begun_by_one_product_and_ended_by_the_next(
    tmp_path: Path, heads: int, head_dim: int, kind: str, suffix: str
) -> None:
    """All but the last, whose norm is wanted whole; where scales of a product's tiles fit in stages of the next."""
    config = model(tmp_path, heads=heads, head_dim=head_dim, bias=bool(suffix))
    config = replace(config, hidden_size=512, num_layers=3)
    called = Counter(name for name, _ in calls(config, FP8))
    assert called[f"{kind}_add_rms_norm{suffix}"] == called[f"gemm_fp8_normed_silu_mul{suffix}"] == 3
    assert called[f"gemm_fp8_after_silu_add_rms_norm{suffix}"] == called[f"gemm_fp8_normed{suffix}"] == 2
    assert called["add_rms_norm"] == called[f"gemm_fp8_after_silu{suffix}"] == 1
    assert called["add_rms_norm_fp8"] == 0
    assert called["rms_norm_fp8"] == called[f"gemm_fp8{suffix}"] == 1  # of the first layer
    begun = {"gemm_fp8_normed", f"{kind}_add_rms_norm"}
    assert not {name.removesuffix("_bias") for name in kernels(config, 2)} & begun, (
        "several ranks add their parts first"
    )
    narrow = Counter(name for name, _ in calls(replace(config, hidden_size=320), FP8))
    assert narrow["add_rms_norm_fp8"] == 5
    assert not narrow.keys() & begun


def test_an_mlp_of_a_drafts_sizes_is_one_call_on_one_gpu(tmp_path: Path) -> None:
    """Of the last layer too, whose norm is not quantised and a call of its own."""
    config = replace(model(tmp_path, ffn=8192), hidden_size=2048, num_layers=3)
    called = Counter(name for name, _ in calls(config, FP8))
    assert called["mlp_fp8_add_rms_norm"] == 3
    assert called["rms_norm"] == 1
    assert not {"gemm_fp8_normed_silu_mul", "gemm_fp8_after_silu", "add_rms_norm"} & called.keys()
    values, norms = dict(calls(config, FP8))["mlp_fp8_add_rms_norm"][-2:]
    assert values == "float8_e4m3fn num_tokens x (2048)"
    assert norms == "float32 (2) x (32) x (num_tokens + T.int64(7)) // T.int64(8) * T.int64(8)"
    for other in (
        replace(config, mlp_bias=True),
        replace(config, hidden_size=1024),
        replace(config, intermediate_size=8448 + 256),
        replace(config, intermediate_size=6144 - 256),
    ):
        assert "mlp_fp8_add_rms_norm" not in {name for name, _ in calls(other, FP8)}
    assert "mlp_fp8_add_rms_norm" not in {name for name, _ in calls(config, replace(FP8, quantization="q0bf16"))}
    assert "mlp_fp8_add_rms_norm" not in kernels(config, 2)


@pytest.mark.parametrize(("kv_cache_dtype", "name"), [("auto", ""), ("fp8", "fp8_")])
def test_qkv_and_attention_of_a_drafts_sizes_are_one_call_on_one_gpu(
    tmp_path: Path, kv_cache_dtype: Literal["auto", "fp8"], name: str
) -> None:
    """Of all layers but the first, whose norm no product has begun."""
    config = replace(model(tmp_path, heads=8, head_dim=64), num_kv_heads=2, hidden_size=2048, num_layers=3)
    quantized = replace(FP8, kv_cache_dtype=kv_cache_dtype)
    joined = f"qkv_attention_{name}grouped"
    called = Counter(name for name, _ in calls(config, quantized))
    assert called[joined] == 2
    assert called[f"attention_{name}grouped"] == called["gemm_fp8"] == 1
    values, scales = dict(calls(config, quantized))[joined][-2:]
    assert values == "float8_e4m3fn num_tokens x (512)"
    assert scales == "float32 (2) x (2) x (num_tokens + T.int64(7)) // T.int64(8) * T.int64(8)"
    for other in (
        replace(config, qkv_bias=True),
        replace(config, num_kv_heads=1),
        replace(config, hidden_size=2048 + 512),
        replace(config, sliding_window=64),
    ):
        assert joined not in {name for name, _ in calls(other, quantized)}
    assert joined not in kernels(config, 2)


def test_unquantised_weights_have_no_scales(tmp_path: Path) -> None:
    graph = build_graph(model(tmp_path), replace(FP8, quantization="q0bf16"))
    assert not [name for name in graph.externs if "fp8" in name or "grouped" in name]


@pytest.mark.parametrize(
    ("quantization", "ffn", "tp_size", "interleave", "called"),
    [
        ("q0bf16", 512, 1, 8, {"gemm_normed_silu_mul"}),
        ("q0bf16", 480, 1, 8, {"gemm_normed_silu_mul"}),
        ("q0bf16", 512, 2, 8, {"gemm_silu_mul"}),
        ("q0bf16", 480, 2, 0, {"silu_mul"}),  # 240 on a rank: half of a tile would be missing
        ("fp8", 512, 2, 8, SILU),
        ("fp8", 480, 1, 0, {"silu_mul_fp8"}),
    ],
)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_gate_and_up_are_interleaved_where_their_product_ends_in_silu(
    tmp_path: Path,
    quantization: Literal["q0bf16", "fp8"],
    ffn: int,
    tp_size: int,
    interleave: int,
    called: set[str],
    bias: bool,
) -> None:
    config = model(tmp_path, ffn=ffn, bias=bias)
    graph = build_graph(config, replace(FP8, quantization=quantization, tp_size=tp_size))
    assert {name for name in kernels_of(graph) if "silu" in name} == {
        f"{n}_bias" if bias and "gemm" in n else n for n in called
    }
    found = {spec.name.rpartition("gate_up_proj")[2] for spec in graph.params if spec.interleave}
    parts = {"", ".scale"} if quantization == "fp8" else {""}
    assert found == (parts | ({".bias"} if bias else set()) if interleave else set())
    assert {spec.interleave for spec in graph.params} <= {0, interleave}


def test_a_cpu_takes_gate_then_up(tmp_path: Path) -> None:
    graph = build_graph(model(tmp_path), replace(FP8, quantization="q0f32", target="llvm"))
    assert "tpserve.cpu.silu_mul" in graph.externs
    assert not any(spec.interleave for spec in graph.params)


def test_memory_is_planned_for_the_padded_tokens(tmp_path: Path) -> None:
    config = model(tmp_path, ffn=1 << 16)
    planned = {}
    for num_tokens in (8, 9, 16):
        module = build_graph(config, replace(FP8, max_num_batched_tokens=num_tokens)).module
        planned[num_tokens] = lower(module, tvm.target.Target({"kind": "llvm"}))[1]
    by_token = (planned[16] - planned[9]) // 7  # both have sixteen places in a group
    assert planned[9] - planned[8] - by_token >= 8 * (1 << 16) // 128 * 4


@pytest.fixture(scope="module")
def scales(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("scales")
    source = folder / "scales.cpp"
    source.write_text(
        '#include "grouped_scales.cuh"\n'
        "using namespace tpserve::cuda;\n"
        'extern "C" long place(long k, long token, long tokens) { return scale_at(k / kGroupSize, token, tokens); }\n'
        'extern "C" long padded(long tokens) { return padded_tokens(tokens); }\n'
        'extern "C" long group_place(long k, long token, long tokens) {'
        " return scale_at(k / silu_group_size(tokens), token, tokens); }\n"
        'extern "C" int group(long tokens) { return silu_group_size(tokens); }\n'
    )
    command = ["c++", "-std=c++20", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", HEADERS]
    subprocess.run([*command, str(source), "-o", str(folder / "scales.so")], check=True, timeout=60)
    library = ctypes.CDLL(str(folder / "scales.so"))
    for name in ("place", "padded", "group_place"):
        getattr(library, name).restype = ctypes.c_long
    return library


@pytest.mark.parametrize(("tokens", "padded"), [(1, 8), (8, 8), (9, 16), (127, 128), (128, 128)])
def test_a_scale_stands_where_the_contract_says(scales: ctypes.CDLL, tokens: int, padded: int) -> None:
    assert scales.padded(ctypes.c_long(tokens)) == padded
    for k in (0, 127, 128, 255, 256, 1023):
        for token in (0, tokens - 1):
            # scales[k / 256][k / 128 % 2][token] of (K / 256, 2, padded)
            expected = (k // 256 * 2 + k // 128 % 2) * padded + token
            assert scales.place(ctypes.c_long(k), ctypes.c_long(token), ctypes.c_long(tokens)) == expected


def test_silus_groups_are_a_tile_of_few_tokens(scales: ctypes.CDLL) -> None:
    assert [scales.group(ctypes.c_long(tokens)) for tokens in (1, 16, 17, 128)] == [32, 32, 128, 128]
    for tokens, groups in ((5, 8), (16, 8), (17, 2), (128, 2)):
        size, padded = scales.group(ctypes.c_long(tokens)), scales.padded(ctypes.c_long(tokens))
        room = np.arange(2 * 8 * padded)  # (K / 256, 8, padded) of K = 512; larger groups stand at its head
        view = room[: 2 * groups * padded].reshape(2, groups, padded)
        found = [
            scales.group_place(*map(ctypes.c_long, (k, token, tokens))) for k in range(0, 512, 32) for token in (0, 4)
        ]
        assert found == [view[k // 256, k % 256 // size, token] for k in range(0, 512, 32) for token in (0, 4)]
