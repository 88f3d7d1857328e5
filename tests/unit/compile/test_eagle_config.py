"""Which EAGLE-3 heads are read, and what is said of the others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from eagle_models import TinyHead, deep
from tiny_models import MODELS
from tpserve.compile import __main__ as command
from tpserve.compile.config import CompileConfig, ModelConfig
from tpserve.compile.eagle import EagleHeadConfig, is_eagle_head
from tpserve.compile.errors import CompileError, ModelConfigError
from tpserve.proto.manifest import Manifest
from worker_builders import make_manifest

HEAD = TinyHead(deep(MODELS["llama_4q_2kv"]))


@pytest.fixture
def target(tmp_path: Path) -> ModelConfig:
    HEAD.target.write(tmp_path / "target")
    return ModelConfig.from_hf(tmp_path / "target")


@pytest.mark.parametrize(
    ("architecture", "is_head"),
    [
        ("LlamaForCausalLMEagle3", True),
        ("Eagle3LlamaForCausalLM", True),
        ("Eagle3Speculator", True),
        ("LlamaForCausalLM", False),
    ],
)
def test_a_head_is_known_by_its_architecture(tmp_path: Path, architecture: str, is_head: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    assert is_eagle_head(tmp_path) is is_head


def test_an_older_head_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["EagleLlamaForCausalLM"]}))
    with pytest.raises(ModelConfigError, match="version 1 or 2: give one of EAGLE-3"):
        is_eagle_head(tmp_path)


def test_a_head_is_read(tmp_path: Path, target: ModelConfig) -> None:
    HEAD.write(tmp_path / "head")
    head = EagleHeadConfig.from_hf(tmp_path / "head", target)
    assert (head.layer.vocab_size, head.target_vocab_size, head.aux_layers) == (150, 200, (2, 4, 5))
    assert (head.has_embedding, head.has_token_map, head.layer_name) == (False, True, "midlayer")
    assert head.num_row_values == 192


def test_a_nested_config_is_read(tmp_path: Path, target: ModelConfig) -> None:
    """As the speculators library writes it."""
    HEAD.write(tmp_path / "head")
    nested = dict(HEAD.config)
    draft_vocab_size = nested.pop("draft_vocab_size")
    outer = {
        "architectures": ["Eagle3Speculator"],
        "draft_vocab_size": draft_vocab_size,
        "norm_before_residual": True,
        "speculators_config": {"algorithm": "eagle3"},
        "eagle_aux_hidden_state_layer_ids": [1, 4, 7],
        "transformer_layer_config": nested | {"architectures": ["LlamaForCausalLM"]},
    }
    (tmp_path / "head" / "config.json").write_text(json.dumps(outer))
    assert is_eagle_head(tmp_path / "head")
    head = EagleHeadConfig.from_hf(tmp_path / "head", target)
    assert (head.norm_before_residual, head.aux_layers, head.layer.vocab_size) == (True, (1, 4, 7), 150)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 128}, "the head is for a model with hidden_size 128, this one has 64"),
        ({"vocab_size": 300}, "the head is for a model with vocab_size 300, this one has 200"),
        ({"target_hidden_size": 96}, "the head is for a model with target_hidden_size 96, this one has 64"),
        ({"hidden_size": 128, "target_hidden_size": 64}, r"'fc.weight' is \(64, 192\), .* it is \(128, 192\)"),
        ({"draft_vocab_size": 201}, "draft_vocab_size is 201, more than the model's 200 tokens"),
        ({"draft_vocab_size": 100}, r"tensor 'lm_head.weight' is \(150, 64\), .* it is \(100, 64\)"),
        ({"num_hidden_layers": 2}, "the head has 2 layers, only heads of one are supported"),
        ({"attention_bias": True}, "heads with biases"),
        ({"bias": True}, "heads with biases"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "only three layers are supported"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, r"is \[1, 2\], expected 3 layers in ascending order .* 8"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 8]}, r"is \[1, 2, 8\], expected 3 layers"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 1, 4]}, r"is \[2, 1, 4\], expected 3 layers"),
        ({"eagle_aux_hidden_state_layer_ids": "all"}, "is all, expected 3 layers"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 4, 7]}}, r"is \[1, 4, 7\], expected 3 layers"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope scaling 'yarn' is not supported"),
        ({"something_new": 1}, "keys that this compiler does not know: something_new"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    tmp_path: Path, target: ModelConfig, changes: dict[str, Any], words: str
) -> None:
    HEAD.write(tmp_path / "head")
    (tmp_path / "head" / "config.json").write_text(json.dumps(HEAD.config | changes))
    with pytest.raises(CompileError, match=words):
        EagleHeadConfig.from_hf(tmp_path / "head", target)


@pytest.mark.parametrize(
    ("without", "other", "words"),
    [
        (("fc.weight",), {}, "has no tensor 'fc.weight', which an EAGLE-3 head needs"),
        (("midlayer.hidden_norm.weight",), {}, "has no tensor 'midlayer.hidden_norm.weight'"),
        (("d2t",), {}, "has no tensor 'd2t', which says what the head's 150 tokens are among the model's 200"),
        ((), {"d2t": np.zeros(3, np.int64)}, r"tensor 'd2t' is \(3,\), .* it is \(150,\)"),
        ((), {"fc.weight": np.zeros((64, 64), np.float32)}, r"tensor 'fc.weight' is \(64, 64\), .* it is \(64, 192\)"),
        ((), {"embed_tokens.weight": np.zeros((150, 64), np.float32)}, r"'embed_tokens.weight' is \(150, 64\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, target: ModelConfig, without: tuple[str, ...], other: dict[str, Any], words: str
) -> None:
    HEAD.write(tmp_path / "head", without=without, **other)
    with pytest.raises(CompileError, match=words):
        EagleHeadConfig.from_hf(tmp_path / "head", target)


def test_a_target_with_too_few_layers_is_refused(tmp_path: Path) -> None:
    few = TinyHead(deep(MODELS["llama_4q_2kv"], 6))
    few.target.write(tmp_path / "target")
    few.write(tmp_path / "head")
    with pytest.raises(ModelConfigError, match="2, n/2 and n-3 of its model, which takes 7; this one has 6"):
        EagleHeadConfig.from_hf(tmp_path / "head", ModelConfig.from_hf(tmp_path / "target"))


def test_weights_in_another_format_are_refused_with_the_way_out(tmp_path: Path, target: ModelConfig) -> None:
    HEAD.write(tmp_path / "head")
    (tmp_path / "head" / "model.safetensors").unlink()
    with pytest.raises(CompileError, match=r"pytorch_model\.bin, load that with torch and write it with safetensors"):
        EagleHeadConfig.from_hf(tmp_path / "head", target)
    head = EagleHeadConfig.from_hf(tmp_path / "head", target, has_weights=False)  # random ones need no file
    assert (head.has_embedding, head.has_token_map) == (False, False)


def test_the_compiler_wants_the_target_of_a_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    HEAD.write(tmp_path)
    assert command.main(["compile", str(tmp_path)]) == 1
    assert "is an EAGLE-3 head, which goes with one model: give it as --target-model" in capsys.readouterr().err


def test_inspect_says_what_a_draft_is(tmp_path: Path, target: ModelConfig, capsys: pytest.CaptureFixture[str]) -> None:
    HEAD.write(tmp_path / "head")
    for name, method in (("head", "eagle3"), ("target", "draft")):
        assert command.main(["inspect", str(tmp_path / name)]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found == {"model_dir": str(tmp_path / name), "method": method}


def test_targets_whose_rows_no_head_reads_are_refused(target: ModelConfig) -> None:
    base = CompileConfig(1, "q0f32", "tuned", "llvm", 64, 16, 4, aux_layers=(2, 4, 5))
    base.check_model(target)
    replace(base, target="cuda", quantization="fp8", kv_cache_dtype="fp8").check_model(target)
    with pytest.raises(ModelConfigError, match="portable kernels for fp8 give bfloat16: use --kernels tuned"):
        replace(base, kernels="portable", quantization="fp8")
    with pytest.raises(ModelConfigError, match="before layers 2, 4, 8 of a model with 8"):
        replace(base, aux_layers=(2, 4, 8)).check_model(target)


def test_on_gpus_a_head_is_bfloat16_and_split_evenly(tmp_path: Path, target: ModelConfig) -> None:
    HEAD.write(tmp_path / "head")
    head = EagleHeadConfig.from_hf(tmp_path / "head", target)
    base = CompileConfig(4, "q0bf16", "tuned", "cuda", 64, 16, 4, aux_layers=(2, 4, 5))
    head.check_compile(base)
    with pytest.raises(ModelConfigError, match="not quantised: use --quantization q0bf16, also beside an fp8 model"):
        head.check_compile(replace(base, quantization="fp8"))
    with pytest.raises(ModelConfigError, match="bfloat16, not fp8: leave --kv-cache-dtype away, also beside a model"):
        head.check_compile(replace(base, kv_cache_dtype="fp8"))
    with pytest.raises(ModelConfigError, match=r"have 64 values, which 8 GPUs do not split in .* 16: give a smaller"):
        head.check_compile(replace(base, tp_size=8))


@pytest.mark.parametrize("tp_size", [1, 2])
def test_on_gpus_the_graphs_call_kernels_alone(tmp_path: Path, target: ModelConfig, tp_size: int) -> None:
    """What TVM would generate has no threads there."""
    from tpserve.compile.pipeline import build_graph, build_head_graph

    HEAD.write(tmp_path / "head")
    head = EagleHeadConfig.from_hf(tmp_path / "head", target)
    config = CompileConfig(tp_size, "q0bf16", "tuned", "cuda", 64, 16, 4, aux_layers=head.aux_layers)
    for graph in (build_graph(target, config), build_head_graph(head, config)):
        functions = {str(variable.name_hint) for variable in graph.module.get_global_vars()}
        assert functions <= {"step", "project", "append"}
        operators: set[str] = set()

        def visit(expr: relax.Expr, found: set[str] = operators) -> None:
            if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op):
                found.add(expr.op.name)

        for name in functions:
            relax.analysis.post_order_visit(graph.module[name], visit)
        assert operators == {"relax.call_dps_packed"}
        assert ("tpserve.whole_rows" in graph.externs) == (tp_size > 1)


def test_a_manifest_that_knows_no_heads_is_as_good_as_ever(tmp_path: Path, target: ModelConfig) -> None:
    make_manifest(tmp_path / "target", 1).save(tmp_path)
    path = tmp_path / "manifest.json"
    raw = json.loads(path.read_text())
    del raw["aux_layers"], raw["head"]
    path.write_text(json.dumps(raw))
    found = Manifest.load(tmp_path)
    assert (found.aux_layers, found.head) == ((), None)
