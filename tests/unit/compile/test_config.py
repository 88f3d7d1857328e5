"""Reading config.json: what is understood, what is refused and how, and the rotary frequencies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny_models import MODELS
from tpserve.compile.config import CompileConfig, ModelConfig, RopeScaling
from tpserve.compile.errors import ModelConfigError

GOLDENS = Path(__file__).parents[2] / "goldens"
BASE = MODELS["llama_4q_2kv"].config
REMOVED = object()


def read(folder: Path, **changes: object) -> ModelConfig:
    config = {key: value for key, value in {**BASE, **changes}.items() if value is not REMOVED}
    (folder / "config.json").write_text(json.dumps(config))
    return ModelConfig.from_hf(folder)


def test_a_config_is_read(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert (config.num_attention_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    assert (config.hidden_size, config.intermediate_size, config.num_layers) == (64, 128, 2)
    off = (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm, config.tie_word_embeddings)
    assert not any(off)
    assert config.rope_scaling is None
    assert config.sliding_window is None


@pytest.mark.parametrize("name", MODELS)
def test_every_tiny_model_is_read_and_counted(tmp_path: Path, name: str) -> None:
    MODELS[name].write(tmp_path)
    config = ModelConfig.from_hf(tmp_path)
    weights = MODELS[name].weights()
    small = (".bias", "q_norm.weight", "k_norm.weight")  # not counted
    assert config.num_parameters == sum(tensor.size for key, tensor in weights.items() if not key.endswith(small))
    assert config.qkv_bias == ("model.layers.0.self_attn.q_proj.bias" in weights)
    assert config.o_bias == ("model.layers.0.self_attn.o_proj.bias" in weights)
    assert config.mlp_bias == ("model.layers.0.mlp.down_proj.bias" in weights)
    assert config.qk_norm == ("model.layers.0.self_attn.q_norm.weight" in weights)


def test_absent_keys_mean_what_they_mean_to_transformers(tmp_path: Path) -> None:
    plain = read(tmp_path, num_key_value_heads=REMOVED, head_dim=REMOVED, hidden_act=REMOVED, rope_theta=REMOVED)
    assert (plain.num_kv_heads, plain.head_dim, plain.rope_theta) == (4, 16, 10000.0)
    assert read(tmp_path, head_dim=None, num_key_value_heads=None).num_kv_heads == 4
    assert read(tmp_path, model_type="mistral").sliding_window == 4096
    assert read(tmp_path, model_type="mistral", sliding_window=None).sliding_window is None
    assert read(tmp_path, model_type="qwen3", head_dim=REMOVED).head_dim == 128
    # Others than llama have a default of their own, which nobody relies on.
    with pytest.raises(ModelConfigError, match="has no 'num_key_value_heads'"):
        read(tmp_path, model_type="qwen2", num_key_value_heads=REMOVED)


def test_windows_that_are_off_are_ignored(tmp_path: Path) -> None:
    assert read(tmp_path, model_type="qwen2", sliding_window=24, use_sliding_window=False).sliding_window is None
    assert read(tmp_path, model_type="mistral", sliding_window=24).sliding_window == 24


def test_rope_is_read_in_either_form(tmp_path: Path) -> None:
    old = read(tmp_path, rope_scaling={"type": "linear", "factor": 2})
    new = read(
        tmp_path, rope_theta=REMOVED, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    )
    assert old.rope_scaling == new.rope_scaling == RopeScaling("linear", 2.0)
    assert old.rope_theta == new.rope_theta == 10000.0
    assert read(tmp_path, rope_scaling={"rope_type": "default"}).rope_scaling is None


def test_what_describes_the_checkpoint_is_ignored(tmp_path: Path) -> None:
    config = read(tmp_path, architectures=["X"], transformers_version="9", use_cache=True, initializer_range=0.02)
    assert config.hidden_size == 64


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not one of llama, mistral, qwen2, qwen3"),
        ({"model_type": REMOVED}, "has no 'model_type'"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not one of"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only silu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config of None is not supported: give an unquantised"),
        ({"quantization_config": [8]}, r"quantization_config is \[8\], expected an object or null"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config of 'awq' is not supported"),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
            "ModelOpt's quant_algo 'NVFP4' is not supported",
        ),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quantization_config has no config_groups"),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "strategy": "group"}}},
                }
            },
            "weights of 4 bits, type 'int' by 'group' are not supported",
        ),
        ({"moe_top": 2, "aux": 1}, "keys that this compiler does not know: aux, moe_top; remove them"),
        ({"vocab_size": REMOVED}, "has no 'vocab_size'"),
        ({"vocab_size": 0}, "vocab_size is 0, expected a positive integer"),
        ({"vocab_size": True}, "vocab_size is True, expected a positive integer"),
        ({"intermediate_size": -3}, "intermediate_size is -3, expected a positive integer"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5, expected a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a positive integer"),
        ({"num_attention_heads": "four"}, "num_attention_heads is 'four', expected a positive integer"),
        ({"num_key_value_heads": -1}, "num_key_value_heads is -1, expected a positive integer"),
        ({"num_key_value_heads": 3}, "4 attention heads are no multiple of 3 KV heads"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected a positive integer"),
        ({"hidden_size": 72}, "hidden_size 72 is no multiple of 16"),
        ({"head_dim": 24}, "head_dim 24 is no multiple of 16"),
        ({"head_dim": REMOVED, "num_attention_heads": 8}, "head_dim 8 is no multiple of 16"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None, expected a positive integer"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', expected a positive number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a positive number"),
        ({"rope_theta": "big"}, "rope_theta is 'big', expected a positive number"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope scaling 'yarn' is not supported, only"),
        ({"rope_scaling": {"rope_type": "linear"}}, "linear rope scaling has no 'factor'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "x"}}, "rope factor is 'x', expected a positive number"),
        ({"rope_scaling": LLAMA3}, "llama3 rope scaling has no 'original_max_position_embeddings'"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
            "rope scaling has keys that this compiler does not know: partial_rotary_factor",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        (
            {"model_type": "qwen2", "sliding_window": 24, "use_sliding_window": True},
            "sliding_window per layer of qwen2 is not supported",
        ),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0, expected a positive integer"),
        ({"model_type": "qwen2", "attention_bias": True}, "attention_bias and mlp_bias are not keys of qwen2"),
    ],
)
def test_what_would_come_out_wrong_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message) as caught:
        read(tmp_path, **changes)
    assert "config.json" in str(caught.value)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ModelConfigError, match=r"config\.json is missing: give a Hugging Face model folder"):
        ModelConfig.from_hf(tmp_path)
    path.write_text("{not json")
    with pytest.raises(ModelConfigError, match=r"config\.json is not valid JSON"):
        ModelConfig.from_hf(tmp_path)
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(ModelConfigError, match=r"config\.json is not valid JSON"):
        ModelConfig.from_hf(tmp_path)
    path.write_text("[1]")
    with pytest.raises(ModelConfigError, match="holds list, expected an object"):
        ModelConfig.from_hf(tmp_path)


def test_rope_frequencies_are_those_of_transformers(tmp_path: Path) -> None:
    cases = json.loads((GOLDENS / "rope.json").read_text())
    assert {case["rope_parameters"]["rope_type"] for case in cases} == {"default", "linear", "llama3"}
    for case in cases:
        config = read(tmp_path, rope_theta=REMOVED, head_dim=case["head_dim"], rope_parameters=case["rope_parameters"])
        # One unit in the last place: transformers' powers are torch's.
        np.testing.assert_allclose(config.rope_inv_freq(), case["inv_freq"], rtol=2e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tp_size": 3}, "--tp 3 is not one of 1, 2, 4, 8"),
        ({"max_model_len": 0}, "max_model_len is 0, expected at least 1"),
        ({"max_num_seqs": -1}, "max_num_seqs is -1, expected at least 1"),
        ({"page_size": 32}, "page_size 32 is not supported by the kernels, only 16"),
        ({"target": "cuda", "quantization": "q0f32"}, "target cuda has tuned kernels for q0bf16 and fp8 only"),
        ({"target": "cuda", "kernels": "portable", "quantization": "fp8"}, "not portable for fp8: use --kernels tuned"),
        ({"quantization": "fp8"}, "a CPU's tuned kernels have no fp8 weights: use --device cuda, --kernels portable"),
        ({"kv_cache_dtype": "fp8"}, "tuned kernels are float32, not fp8: use --device cuda, --kernels portable"),
    ],
)
def test_compile_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "tp_size": 2,
        "quantization": "q0f32",
        "kernels": "tuned",
        "target": "llvm",
        "max_model_len": 64,
        "max_num_batched_tokens": 32,
        "max_num_seqs": 4,
    }
    assert CompileConfig(**good).page_size == 16
    with pytest.raises(ModelConfigError, match=message):
        CompileConfig(**good | changes)


FP8_CHECKPOINTS: list[dict[str, Any]] = [
    {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": None},
    {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}},
    {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False},
                "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
            }
        },
    },
]


@pytest.mark.parametrize("given", FP8_CHECKPOINTS)
def test_checkpoints_of_stored_fp8_are_compiled_as_such_and_as_nothing_else(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    model = read(tmp_path, quantization_config=given)
    assert model.stored_fp8
    fp8 = CompileConfig(2, "fp8", "tuned", "cuda", max_model_len=64, max_num_batched_tokens=64, max_num_seqs=4)
    fp8.check_model(model)
    replace(fp8, target="llvm", kernels="portable").check_model(model)
    with pytest.raises(ModelConfigError, match="weights are fp8, --quantization q0bf16 cannot read them"):
        replace(fp8, quantization="q0bf16").check_model(model)
