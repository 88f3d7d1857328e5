"""GGUF file to Hugging Face folder: config, weights, tokenizer and chat template.

Weights are dequantised and stored in bfloat16 (norms in float32), which is what the engine serves and what a reference
must load to agree with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from tpserve.compile.errors import CheckpointError
from tpserve.compile.progress import Progress

_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED = 3, 4
"""Token types of GGUF that become added tokens."""


class _Reader(GGUFReader):  # type: ignore[misc]  # gguf is untyped
    """Reads through plain arrays: as memmaps, a vocabulary's hundred thousand small views take three times as long."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep the mapped file as a plain array."""
        super().__setattr__(name, np.asarray(value) if name == "data" else value)


def convert_gguf(source: Path, folder: Path, progress: Progress) -> None:
    """Write the Hugging Face form of a GGUF file into `folder`.

    Raises
    ------
    CheckpointError
        If the file is missing or corrupt, or its architecture, tokenizer or tensors are of an unknown kind.
    """
    try:
        reader = _Reader(source)
    except FileNotFoundError:
        raise CheckpointError(f"{source} does not exist") from None
    except (ValueError, IndexError, OverflowError) as error:
        raise CheckpointError(f"{source} is not a readable GGUF file: {error}") from None
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise CheckpointError(f"{source}: architecture {architecture!r} is not one of {', '.join(_ARCHITECTURES)}")
    try:
        config = _config(architecture, fields, {tensor.name for tensor in reader.tensors})
        _write_tokenizer(fields, folder)
    except KeyError as error:
        raise CheckpointError(f"{source} has no field {error}") from None
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights: dict[str, np.ndarray[Any, Any]] = {}
    for i, tensor in enumerate(reader.tensors):
        if tensor.name == "rope_freqs.weight":
            # Factors of the rotary frequencies, from which the rule that made them cannot be told for sure.
            if (tensor.data != 1).any():
                raise CheckpointError(
                    f"{source} scales rotary frequencies: give the Hugging Face folder, which says how"
                )
        else:
            name = _hf_name(tensor.name, source)
            weights[name] = _weight(tensor, name, architecture, config)
        progress(i + 1, len(reader.tensors))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _config(architecture: str, fields: dict[str, Any], tensors: set[str]) -> dict[str, Any]:
    def field(name: str) -> Any:
        return fields[f"{architecture}.{name}"]

    num_heads = field("attention.head_count")
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[architecture]],
        "model_type": architecture,
        "hidden_act": "silu",
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.get(f"{architecture}.attention.head_count_kv", num_heads),
        "head_dim": fields.get(f"{architecture}.attention.key_length", field("embedding_length") // num_heads),
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "max_position_embeddings": field("context_length"),
        # float32 in the file; the shortest decimal that gives the same float32 is the number that was meant.
        "rms_norm_eps": float(str(np.float32(field("attention.layer_norm_rms_epsilon")))),
        "rope_theta": fields.get(f"{architecture}.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": "bfloat16",
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }
    if architecture != "qwen2" and "blk.0.attn_q.bias" in tensors:
        config["attention_bias"] = True
    if "blk.0.ffn_gate.bias" in tensors:
        config["mlp_bias"] = True
    scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
    if scaling == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": field("rope.scaling.factor")}
    elif scaling != "none":
        raise CheckpointError(f"rope scaling {scaling!r} of a GGUF file is not supported, only linear")
    return config


def _hf_name(name: str, source: Path) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    parts = name.split(".", 2)
    if len(parts) == 3 and parts[0] == "blk":
        layer, rest = parts[1], parts[2]
        if rest in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[rest]}"
        stem, _, suffix = rest.rpartition(".")
        if stem in _LAYER_NAMES and suffix in ("weight", "bias"):
            return f"model.layers.{layer}.{_LAYER_NAMES[stem]}.{suffix}"
    raise CheckpointError(f"{source}: tensor {name!r} is not known")


def _weight(tensor: ReaderTensor, name: str, architecture: str, config: dict[str, Any]) -> np.ndarray[Any, Any]:
    # GGUF lists dimensions fastest first.
    shape = tuple(int(size) for size in reversed(tensor.shape))
    try:
        values: np.ndarray[Any, Any] = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
    except NotImplementedError:
        raise CheckpointError(
            f"tensor {tensor.name!r} has type {tensor.tensor_type.name}, which is not readable"
        ) from None
    if architecture == "llama" and ".self_attn." in name and ("q_proj" in name or "k_proj" in name):
        heads = config["num_attention_heads"] if "q_proj" in name else config["num_key_value_heads"]
        # llama.cpp interleaves the halves that rotary embedding pairs, for this architecture only.
        pairs = values.reshape(heads, shape[0] // heads // 2, 2, -1)
        values = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(shape)
    if len(shape) == 1:
        return values
    narrowed: np.ndarray[Any, Any] = values.astype(ml_dtypes.bfloat16)
    return narrowed


def _pre_tokenizer(kind: str) -> pre_tokenizers.PreTokenizer:
    """Return the splitter that llama.cpp's name stands for."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if kind == "smollm":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if kind == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = {"llama-bpe": 3, "qwen2": 1}.get(kind)
    if digits is None:
        raise CheckpointError(f"tokenizer pre-processing {kind!r} is not one of smollm, gpt-2, llama-bpe, qwen2")
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_GPT4_SPLIT % digits), "isolated"), byte_level])


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    model = fields["tokenizer.ggml.model"]
    if model != "gpt2":
        raise CheckpointError(f"tokenizer model {model!r} is not supported, only gpt2 (byte-level BPE)")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    types: list[int] = fields["tokenizer.ggml.token_type"]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(fields["tokenizer.ggml.pre"])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=False, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _USER_DEFINED
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = fields["tokenizer.ggml.eos_token_id"]
    bos = fields.get("tokenizer.ggml.bos_token_id")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", False)),
        "bos_token": tokens[bos] if bos is not None else None,
        "eos_token": tokens[eos],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields.get("tokenizer.chat_template"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    generation = {"bos_token_id": bos, "eos_token_id": eos}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
