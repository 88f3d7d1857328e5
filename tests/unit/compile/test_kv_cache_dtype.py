"""e4m3 KV pages in configurations, graphs, hashes and flags; nothing here needs nvcc or a GPU."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tiny_models import MODELS
from tpserve.compile import __main__ as command
from tpserve.compile import native_cuda
from tpserve.compile.artifact import input_hash
from tpserve.compile.cache import CachePolicy
from tpserve.compile.config import CompileConfig, ModelConfig
from tpserve.compile.pipeline import build_graph
from tpserve.coordinator.engine_choice import EngineChoice
from tpserve.coordinator.model_build import ModelBuild
from tpserve.coordinator.serve_arguments import add_arguments

AUTO = CompileConfig(2, "q0bf16", "tuned", "cuda", max_model_len=64, max_num_batched_tokens=64, max_num_seqs=4)
FP8 = replace(AUTO, kv_cache_dtype="fp8")


def read(folder: Path, name: str = "llama_4q_2kv") -> ModelConfig:
    MODELS[name].write(folder)
    return ModelConfig.from_hf(folder)


def test_pages_have_the_type_of_activations_or_e4m3() -> None:
    assert (AUTO.page_dtype, FP8.page_dtype) == ("bfloat16", "float8_e4m3fn")
    assert replace(AUTO, target="llvm").page_dtype == "float32"
    portable = replace(AUTO, target="llvm", kernels="portable")
    assert (portable.activation_dtype, portable.page_dtype) == ("bfloat16", "bfloat16")
    assert replace(portable, kv_cache_dtype="fp8").page_dtype == "float8_e4m3fn"
    assert replace(portable, quantization="fp8").activation_dtype == "bfloat16"
    assert replace(portable, quantization="q0f32").page_dtype == "float32"


@pytest.mark.parametrize(("name", "prefix"), [("llama_4q_2kv", ""), ("qwen3_5q_5kv", "qk_norm_")])
def test_the_graph_calls_the_kernels_of_its_pages(tmp_path: Path, name: str, prefix: str) -> None:
    model = read(tmp_path, name)
    auto, fp8 = build_graph(model, replace(AUTO, tp_size=1)), build_graph(model, replace(FP8, tp_size=1))
    kernel = f"tpserve.cuda.{prefix}attention"
    assert set(auto.externs) - set(fp8.externs) == {kernel}
    assert set(fp8.externs) - set(auto.externs) == {f"{kernel}_fp8"}
    scales = [spec for spec in fp8.params if spec.layout == "kv_scale"]
    assert [(spec.name, spec.shape, spec.dtype) for spec in scales] == [
        (f"model.layers.{i}.self_attn.kv_scale", (2,), "float32") for i in range(2)
    ]
    assert [source.name for source in scales[1].sources] == [f"model.layers.1.self_attn.{part}_proj" for part in "kv"]
    assert tuple(spec for spec in fp8.params if spec.layout != "kv_scale") == auto.params


def test_the_type_is_part_of_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_cuda, "nvcc_version", lambda: "nvcc 1")
    model = read(tmp_path)
    assert input_hash(model, AUTO) == input_hash(model, replace(AUTO))
    assert input_hash(model, AUTO) != input_hash(model, FP8)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "auto"),
        (["--kv-cache-dtype", "bfloat16"], "auto"),  # the same library
        (["--kv-cache-dtype", "fp8"], "fp8"),
        (["--kv-cache-dtype", "fp8_e4m3"], "fp8"),
    ],
)
def test_the_flag_reaches_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], expected: str
) -> None:
    read(tmp_path)
    built: list[CompileConfig] = []

    def build(model: ModelConfig, config: CompileConfig, policy: CachePolicy, check: None) -> Path:
        built.append(config)
        return tmp_path

    monkeypatch.setattr(command, "build_artifact", build)
    assert command.main(["compile", str(tmp_path), "--device", "cuda:sm_90a", *flags]) == 0
    assert [config.kv_cache_dtype for config in built] == [expected]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["fp8"], "KV pages of a CPU's tuned kernels are float32, not fp8: use --device cuda, --kernels portable"),
        (
            ["bfloat16"],
            "KV pages of tuned kernels for q0f32 on a CPU are float32; use auto, --device cuda, or --kernels",
        ),
        (["bfloat16", "--quantization", "q0bf16"], "KV pages of tuned kernels for q0bf16 on a CPU are float32;"),
        (["bfloat16", "--kernels", "portable"], "KV pages of portable kernels for q0f32 on a CPU are float32;"),
    ],
)
def test_a_cpu_refuses_pages_that_its_kernels_lack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    read(tmp_path)
    assert command.main(["compile", str(tmp_path), "--kv-cache-dtype", *flags]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "quantization", "expected"),
    [("auto", "fp8", "bfloat16"), ("bfloat16", "q0bf16", "bfloat16"), ("fp8", "q0f32", "float8_e4m3fn")],
)
def test_portable_kernels_of_a_cpu_take_a_gpus_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, quantization: str, expected: str
) -> None:
    read(tmp_path)
    built: list[CompileConfig] = []

    def build(model: ModelConfig, config: CompileConfig, policy: CachePolicy, check: None) -> Path:
        built.append(config)
        return tmp_path

    monkeypatch.setattr(command, "build_artifact", build)
    flags = ["--kernels", "portable", "--quantization", quantization, "--kv-cache-dtype", dtype]
    assert command.main(["compile", str(tmp_path), *flags]) == 0
    assert [config.page_dtype for config in built] == [expected]


def test_serve_gives_the_flag_to_the_compiler_of_the_model_but_not_of_its_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["m", "--kv-cache-dtype", "fp8", "--no-gateway"])
    building, given = ModelBuild(args, [], lambda: False), []

    def build(model: str, device: str, num_tokens: int, flags: list[str]) -> dict[str, Any]:
        given.append(flags)
        return {"model_dir": str(tmp_path)}

    monkeypatch.setattr(building, "_compile", build)
    building.look(EngineChoice(True, 0, None, 4, 256, None))
    (flags,) = given
    compiler = argparse.ArgumentParser()
    command.add_compile_arguments(compiler)
    assert compiler.parse_args(["m", *flags]).kv_cache_dtype == "fp8"
