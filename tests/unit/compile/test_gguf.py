"""The GGUF converter on small files made here: names, layouts, tokenizers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from tpserve.compile.config import ModelConfig, RopeScaling
from tpserve.compile.errors import CheckpointError
from tpserve.compile.gguf import convert_gguf

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 4, 2, 16
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
BYTES = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)]]
BYTES += [chr(256 + i) for i in range(256 - len(BYTES))]
TOKENS = ["<|end|>", "<|start|>", *BYTES, "he", "hel", "\u01201", "12", "<tool>"]
TYPES = [CONTROL, CONTROL, *[NORMAL] * (len(TOKENS) - 3), USER_DEFINED]
MERGES = ["h e", "he l", "\u0120 1", "1 2"]


def tensors(*, biases: bool = False, all_biases: bool = False, untied: bool = False) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(TOKENS), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate.weight": (FFN, HIDDEN),
        "blk.0.ffn_up.weight": (FFN, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, FFN),
    }
    if biases or all_biases:
        parts = ["attn_q", "attn_k", "attn_v"]
        if all_biases:
            parts += ["attn_output", "ffn_gate", "ffn_up", "ffn_down"]
        shapes |= {f"blk.0.{part}.bias": (shapes[f"blk.0.{part}.weight"][0],) for part in parts}
    if untied:
        shapes["output.weight"] = shapes["token_embd.weight"]
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write(
    path: Path,
    weights: dict[str, Any],
    *,
    arch: str = "llama",
    pre: str = "smollm",
    model: str = "gpt2",
    quantization: GGMLQuantizationType | None = None,
    omit: str = "",
    more: dict[str, Any] | None = None,
) -> Path:
    writer = GGUFWriter(path, arch)
    fields = {
        "add_embedding_length": HIDDEN,
        "add_feed_forward_length": FFN,
        "add_block_count": 1,
        "add_head_count": HEADS,
        "add_head_count_kv": KV_HEADS,
        "add_context_length": 512,
        "add_layer_norm_rms_eps": 1e-5,
        "add_rope_freq_base": 100000.0,
        "add_tokenizer_model": model,
        "add_tokenizer_pre": pre,
        "add_token_list": TOKENS,
        "add_token_types": TYPES,
        "add_token_merges": MERGES,
        "add_eos_token_id": 0,
        "add_bos_token_id": 1,
        "add_chat_template": "{{ messages }}",
    }
    for method, value in (fields | (more or {})).items():
        if method != omit:
            getattr(writer, method)(value)
    for name, values in weights.items():
        if quantization is not None and values.ndim == 2:
            writer.add_tensor(name, quantize(values, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert(source: Path, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    convert_gguf(source, folder, lambda done, total: None)
    weights: dict[str, Any] = load_file(folder / "model.safetensors")
    return weights


def interleaved(values: Any, heads: int) -> Any:
    """The order of rows in which llama.cpp keeps q and k of the llama architecture."""
    return values.reshape(heads, 2, HEAD_DIM // 2, -1).swapaxes(1, 2).reshape(values.shape)


def test_a_llama_file_becomes_a_folder_that_compiles(tmp_path: Path) -> None:
    weights = tensors()
    stored = dict(weights)
    for part, heads in (("q", HEADS), ("k", KV_HEADS)):
        stored[f"blk.0.attn_{part}.weight"] = interleaved(weights[f"blk.0.attn_{part}.weight"], heads)
    done: list[tuple[int, int]] = []
    source = write(tmp_path / "m.gguf", stored | {"rope_freqs.weight": np.ones(8, np.float32)})
    folder = tmp_path / "hf"
    folder.mkdir()
    convert_gguf(source, folder, lambda *progress: done.append(progress))
    assert done == [(i + 1, len(stored) + 1) for i in range(len(stored) + 1)]
    converted = load_file(folder / "model.safetensors")
    layer = "model.layers.0"
    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        f"{layer}.input_layernorm.weight": "blk.0.attn_norm.weight",
        f"{layer}.self_attn.q_proj.weight": "blk.0.attn_q.weight",
        f"{layer}.self_attn.k_proj.weight": "blk.0.attn_k.weight",
        f"{layer}.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        f"{layer}.self_attn.o_proj.weight": "blk.0.attn_output.weight",
        f"{layer}.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
        f"{layer}.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
        f"{layer}.mlp.up_proj.weight": "blk.0.ffn_up.weight",
        f"{layer}.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    }.items():
        expected = weights[theirs]
        if expected.ndim == 2:
            expected = expected.astype(ml_dtypes.bfloat16)
        assert converted[ours].dtype == expected.dtype
        np.testing.assert_array_equal(converted.pop(ours), expected, err_msg=ours)
    assert not converted
    config = ModelConfig.from_hf(folder)
    assert (config.model_type, config.head_dim, config.num_kv_heads) == ("llama", HEAD_DIM, KV_HEADS)
    assert (config.rms_norm_eps, config.rope_theta, config.vocab_size) == (1e-5, 100000.0, len(TOKENS))
    assert config.tie_word_embeddings
    assert json.loads((folder / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 0}
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer_config["eos_token"] == "<|end|>"
    assert tokenizer_config["chat_template"] == "{{ messages }}"


def test_qwen2_keeps_the_order_of_rows_and_has_biases(tmp_path: Path) -> None:
    weights = tensors(biases=True, untied=True)
    converted = convert(write(tmp_path / "m.gguf", weights, arch="qwen2", pre="qwen2"), tmp_path / "hf")
    for part in "qkv":
        for kind in ("weight", "bias"):
            theirs = weights[f"blk.0.attn_{part}.{kind}"]
            ours = converted[f"model.layers.0.self_attn.{part}_proj.{kind}"]
            np.testing.assert_array_equal(ours, theirs.astype(ours.dtype))
    np.testing.assert_array_equal(converted["lm_head.weight"], weights["output.weight"].astype(ml_dtypes.bfloat16))
    config = ModelConfig.from_hf(tmp_path / "hf")
    assert config.qkv_bias
    assert not config.tie_word_embeddings


def test_llama_biases_are_interleaved_like_their_rows(tmp_path: Path) -> None:
    weights = tensors(all_biases=True)
    stored = weights | {
        f"blk.0.attn_{part}.bias": interleaved(weights[f"blk.0.attn_{part}.bias"], heads)
        for part, heads in (("q", HEADS), ("k", KV_HEADS))
    }
    converted = convert(write(tmp_path / "m.gguf", stored), tmp_path / "hf")
    for part in "qkv":
        np.testing.assert_array_equal(
            converted[f"model.layers.0.self_attn.{part}_proj.bias"], weights[f"blk.0.attn_{part}.bias"]
        )
    config = ModelConfig.from_hf(tmp_path / "hf")
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, True)
    np.testing.assert_array_equal(converted["model.layers.0.self_attn.o_proj.bias"], weights["blk.0.attn_output.bias"])


def test_rope_scaling_is_kept_or_refused(tmp_path: Path) -> None:
    def add(kind: str, factor: float) -> dict[str, Any]:
        return {"add_rope_scaling_type": RopeScalingType(kind), "add_rope_scaling_factor": factor}

    convert(write(tmp_path / "l.gguf", tensors(), more=add("linear", 4.0)), tmp_path / "linear")
    assert ModelConfig.from_hf(tmp_path / "linear").rope_scaling == RopeScaling("linear", 4.0)
    with pytest.raises(CheckpointError, match="rope scaling 'yarn' of a GGUF file is not supported, only linear"):
        convert(write(tmp_path / "y.gguf", tensors(), more=add("yarn", 4.0)), tmp_path / "yarn")
    factors = {"rope_freqs.weight": np.array([1, 1, 1, 2, 4, 8, 8, 8], np.float32)}
    with pytest.raises(CheckpointError, match="scales rotary frequencies: give the Hugging Face folder"):
        convert(write(tmp_path / "f.gguf", tensors() | factors), tmp_path / "factors")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "F16", "BF16"])
def test_quantised_weights_are_dequantised(tmp_path: Path, kind: str) -> None:
    quantization = GGMLQuantizationType[kind]
    weights = tensors()
    converted = convert(write(tmp_path / "m.gguf", weights, quantization=quantization), tmp_path / "hf")
    for theirs, ours in (("ffn_up", "mlp.up_proj"), ("attn_v", "self_attn.v_proj")):
        stored = dequantize(quantize(weights[f"blk.0.{theirs}.weight"], quantization), quantization)
        np.testing.assert_array_equal(converted[f"model.layers.0.{ours}.weight"], stored.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["hel", "l", "o", "\u0120", "1", "2", "<tool>", "<|end|>"]),
        ("gpt-2", ["hel", "l", "o", "\u01201", "2", "<tool>", "<|end|>"]),
        ("llama-bpe", ["hel", "l", "o", "\u0120", "12", "<tool>", "<|end|>"]),
        ("qwen2", ["hel", "l", "o", "\u0120", "1", "2", "<tool>", "<|end|>"]),
    ],
)
def test_each_tokenizer_splits_as_its_name_says(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    convert(write(tmp_path / "m.gguf", tensors(), pre=pre), tmp_path / "hf")
    tokenizer = Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
    text = "hello 12<tool><|end|>"
    encoding = tokenizer.encode(text)
    assert encoding.tokens == pieces
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text
    assert tokenizer.decode(encoding.ids) == "hello 12<tool>"
    for other in ("caf\u00e9 \u65e5\u672c \u0661\u0662 \u00bd", "a\u0301\r\n\t  x", "\U0001f433\u200d"):
        assert tokenizer.decode(tokenizer.encode(other).ids) == other


def test_smollm_parts_digits_of_every_script(tmp_path: Path) -> None:
    convert(write(tmp_path / "m.gguf", tensors()), tmp_path / "hf")
    tokenizer = Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
    splits = tokenizer.pre_tokenizer.pre_tokenize_str("a12 \u0661\u0662")
    assert [span for _, span in splits] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "gpt2"}, "architecture 'gpt2' is not one of llama, qwen2, qwen3"),
        ({"pre": "chameleon"}, "tokenizer pre-processing 'chameleon' is not one of smollm"),
        ({"model": "llama"}, "tokenizer model 'llama' is not supported, only gpt2"),
        ({"omit": "add_block_count"}, r"has no field 'llama\.block_count'"),
        ({"omit": "add_token_merges"}, r"has no field 'tokenizer\.ggml\.merges'"),
        ({"omit": "add_eos_token_id"}, r"has no field 'tokenizer\.ggml\.eos_token_id'"),
    ],
)
def test_unknown_kinds_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(write(tmp_path / "m.gguf", tensors(), **changes), tmp_path / "hf")


def test_unknown_tensors_are_refused(tmp_path: Path) -> None:
    for name in ("blk.0.ffn_gate_inp.weight", "position_embd.weight", "blk.0.attn_norm.bias.x"):
        source = write(tmp_path / f"{name}.gguf", tensors() | {name: np.zeros(4, np.float32)})
        with pytest.raises(CheckpointError, match=f"tensor '{name}' is not known"):
            convert(source, tmp_path / name)


def test_missing_and_corrupt_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    with pytest.raises(CheckpointError, match=r"none\.gguf does not exist"):
        convert_gguf(tmp_path / "none.gguf", folder, lambda done, total: None)
    whole = write(tmp_path / "m.gguf", tensors()).read_bytes()
    for size in (0, 3, 100, 2000, len(whole) // 2, len(whole) - 64):
        broken = tmp_path / f"{size}.gguf"
        broken.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=rf"{size}\.gguf is not a readable GGUF file"):
            convert_gguf(broken, folder, lambda done, total: None)
    broken.write_bytes(b"PK" + whole[2:])
    with pytest.raises(CheckpointError, match="is not a readable GGUF file"):
        convert_gguf(broken, folder, lambda done, total: None)
