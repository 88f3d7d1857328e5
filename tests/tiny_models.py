"""Seeded random models of every supported family, small enough to run in a moment; made with numpy alone.

Their logits by transformers are in `tests/goldens`. Head counts are chosen to meet every case of `compile.sharding`.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

NUM_PROMPT_TOKENS = 160
"""Ten pages, and more than any sliding window here."""
GOLDEN_POSITIONS = (0, 1, 15, 16, 23, 24, 40, 63, 64, 100, 128, 159)
"""Positions whose logits are kept: both sides of page and window borders."""

Weights = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class TinyModel:
    """One model, by its config.json."""

    name: str
    config: dict[str, Any]

    @property
    def seed(self) -> int:
        """Of weights and prompt."""
        return zlib.crc32(self.name.encode())

    def prompt(self) -> list[int]:
        """The golden prompt."""
        rng = np.random.default_rng([self.seed, 1])
        ids: list[int] = rng.integers(0, self.config["vocab_size"], NUM_PROMPT_TOKENS).tolist()
        return ids

    def weights(self) -> Weights:
        """All tensors of the checkpoint; attention is peaked, so that a wrong mask or angle shows."""
        config = self.config
        rng = np.random.default_rng([self.seed, 0])
        hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        head_dim = config["head_dim"]
        q_dim, kv_dim = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
        qkv_bias = config.get("attention_bias", config["model_type"] == "qwen2")
        out: Weights = {}

        def linear(name: str, rows: int, columns: int, gain: float, bias: bool = False) -> None:
            scale = np.float32(gain * columns**-0.5)
            out[f"{name}.weight"] = rng.standard_normal((rows, columns), dtype=np.float32) * scale
            if bias:
                out[f"{name}.bias"] = rng.standard_normal(rows, dtype=np.float32) * np.float32(0.3)

        def norm(name: str, size: int) -> None:
            out[f"{name}.weight"] = 1 + np.float32(0.2) * rng.standard_normal(size, dtype=np.float32)

        out["model.embed_tokens.weight"] = rng.standard_normal((vocab, hidden), dtype=np.float32)
        for i in range(config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            norm(f"{layer}.input_layernorm", hidden)
            linear(f"{layer}.self_attn.q_proj", q_dim, hidden, 1.7, qkv_bias)
            linear(f"{layer}.self_attn.k_proj", kv_dim, hidden, 1.7, qkv_bias)
            linear(f"{layer}.self_attn.v_proj", kv_dim, hidden, 1.0, qkv_bias)
            linear(f"{layer}.self_attn.o_proj", hidden, q_dim, 1.0, config.get("attention_bias", False))
            if config["model_type"] == "qwen3":
                norm(f"{layer}.self_attn.q_norm", head_dim)
                norm(f"{layer}.self_attn.k_norm", head_dim)
            norm(f"{layer}.post_attention_layernorm", hidden)
            linear(f"{layer}.mlp.gate_proj", ffn, hidden, 1.0, config.get("mlp_bias", False))
            linear(f"{layer}.mlp.up_proj", ffn, hidden, 1.0, config.get("mlp_bias", False))
            linear(f"{layer}.mlp.down_proj", hidden, ffn, 1.0, config.get("mlp_bias", False))
        norm("model.norm", hidden)
        if not config["tie_word_embeddings"]:
            linear("lm_head", vocab, hidden, 1.0)
        return out

    def write(self, folder: Path) -> str:
        """Write config.json and model.safetensors; return the latter's sha256."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        save_file(self.weights(), folder / "model.safetensors", metadata={"format": "pt"})
        return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class KnobTarget(TinyModel):
    """A target whose first layers are a draft, and whose later ones say little: how little, is the knob.

    With `later` 0 both are the same function, so that every draft token is accepted; acceptance falls as it grows. It
    is synthetic, but has the true cost of both models.
    """

    num_draft_layers: int
    later: float
    """Factor of what layers behind the draft's add to the residual stream."""

    def weights(self) -> Weights:
        out = TinyModel.weights(self)
        for i in range(self.num_draft_layers, self.config["num_hidden_layers"]):
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                out[f"model.layers.{i}.{name}.weight"] *= np.float32(self.later)
        return out


@dataclass(frozen=True, slots=True)
class KnobDraft(TinyModel):
    """The first layers of a target, under the same embedding, norm and head."""

    target: KnobTarget

    def weights(self) -> Weights:
        mine = {f"model.layers.{i}." for i in range(self.config["num_hidden_layers"])}
        whole = self.target.weights().items()
        return {
            name: values
            for name, values in whole
            if not name.startswith("model.layers.") or any(name.startswith(layer) for layer in mine)
        }


def knob_pair(
    later: float, *, num_layers: int = 8, num_draft_layers: int = 2, **config: Any
) -> tuple[KnobTarget, KnobDraft]:
    """Return a target and its draft, see `KnobTarget`; `config` changes fields of both."""
    base = _model("knob", "llama", 64, 4, 2, **config).config
    target = KnobTarget("knob", base | {"num_hidden_layers": num_layers}, num_draft_layers, later)
    return target, KnobDraft("knob", base | {"num_hidden_layers": num_draft_layers}, target)


_ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def _model(name: str, model_type: str, hidden: int, num_q: int, num_kv: int, **more: object) -> TinyModel:
    config: dict[str, Any] = {
        "architectures": [f"{_ARCHITECTURES[model_type]}ForCausalLM"],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": num_q,
        "num_key_value_heads": num_kv,
        "head_dim": 16,
        "vocab_size": 200,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    return TinyModel(name, config | more)


# Wavelengths of head_dim 16 are 6, 20, 63, 199 and more: with 64 original positions all three branches are met.
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# No multiples of 16 * TP.
_ODD_SIZES = {"intermediate_size": 300, "vocab_size": 203}

MODELS: dict[str, TinyModel] = {
    model.name: model
    for model in (
        _model("llama_4q_2kv", "llama", 64, 4, 2),
        _model("llama_6q_3kv_llama3_rope", "llama", 96, 6, 3, rope_scaling=_LLAMA3_ROPE),
        _model("llama_9q_3kv_tied", "llama", 144, 9, 3, tie_word_embeddings=True),
        _model("llama_8q_1kv_biases", "llama", 128, 8, 1, attention_bias=True, mlp_bias=True, **_ODD_SIZES),
        _model("mistral_4q_1kv_window", "mistral", 64, 4, 1, sliding_window=24),
        _model("qwen2_6q_2kv_tied", "qwen2", 96, 6, 2, tie_word_embeddings=True, use_sliding_window=False),
        _model("qwen3_5q_5kv", "qwen3", 64, 5, 5, head_dim=32, use_sliding_window=False, rms_norm_eps=1e-6),
    )
}

WIDE = _model(
    "llama_8q_4kv_wide", "llama", 1024, 8, 4, head_dim=128, vocab_size=2048, num_hidden_layers=3,
    max_position_embeddings=2048,
)  # fmt: skip
"""Sizes for which GPUs have their fastest kernels, at TP=1, 2 and 4: heads of 128, groups of scales that are whole."""
JOINED = _model(
    "llama_32q_8kv_joined", "llama", 2048, 32, 8, head_dim=64, intermediate_size=6144, vocab_size=2048,
    max_position_embeddings=2048,
)  # fmt: skip
"""Sizes of a draft, in e4m3 on one GPU with a kernel for qkv and attention and one for the MLP: two heads of 64 share a
scale."""
