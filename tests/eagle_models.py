"""Seeded random EAGLE-3 heads for tiny models, and one that agrees with its target by construction; numpy alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from tiny_models import TinyModel, Weights


@dataclass(frozen=True, slots=True)
class TinyHead:
    """One head, by its target."""

    target: TinyModel
    draft_vocab_size: int = 150
    changes: dict[str, Any] = field(default_factory=dict)
    """Of config.json."""
    layer_name: str = "midlayer"
    has_embedding: bool = False
    seed: int = 1

    @property
    def config(self) -> dict[str, Any]:
        given = self.target.config
        keys = (
            "hidden_act",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "vocab_size",
            "rms_norm_eps",
            "rope_theta",
            "max_position_embeddings",
            "torch_dtype",
        )
        return {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "num_hidden_layers": 1,
            "tie_word_embeddings": False,
            "draft_vocab_size": self.draft_vocab_size,
            **{key: given[key] for key in keys},
            **self.changes,
        }

    def token_ids(self) -> npt.NDArray[np.int64]:
        """The target's id of each of its tokens, in ascending order."""
        rng = np.random.default_rng([self.seed, 1])
        vocab_size: int = self.target.config["vocab_size"]
        drawn: npt.NDArray[np.int64] = rng.choice(vocab_size, self.draft_vocab_size, replace=False)
        return np.sort(drawn)

    def weights(self) -> dict[str, npt.NDArray[Any]]:
        """All tensors of the checkpoint, those that say the same twice included."""
        config, rng = self.config, np.random.default_rng([self.seed, 0])
        hidden, ffn, name = config["hidden_size"], config["intermediate_size"], self.layer_name
        q_dim, kv_dim = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))

        def linear(rows: int, columns: int, gain: float = 1.0) -> npt.NDArray[np.float32]:
            drawn: npt.NDArray[np.float32] = rng.standard_normal((rows, columns), dtype=np.float32)
            drawn *= np.float32(gain * columns**-0.5)
            return drawn

        def norm() -> npt.NDArray[np.float32]:
            drawn: npt.NDArray[np.float32] = 1 + np.float32(0.2) * rng.standard_normal(hidden, dtype=np.float32)
            return drawn

        out: dict[str, npt.NDArray[Any]] = {
            "fc.weight": linear(hidden, 3 * self.target.config["hidden_size"]),
            f"{name}.hidden_norm.weight": norm(),
            f"{name}.input_layernorm.weight": norm(),
            f"{name}.post_attention_layernorm.weight": norm(),
            f"{name}.self_attn.q_proj.weight": linear(q_dim, 2 * hidden, 1.7),
            f"{name}.self_attn.k_proj.weight": linear(kv_dim, 2 * hidden, 1.7),
            f"{name}.self_attn.v_proj.weight": linear(kv_dim, 2 * hidden),
            f"{name}.self_attn.o_proj.weight": linear(hidden, q_dim),
            f"{name}.mlp.gate_proj.weight": linear(ffn, hidden),
            f"{name}.mlp.up_proj.weight": linear(ffn, hidden),
            f"{name}.mlp.down_proj.weight": linear(hidden, ffn),
            "norm.weight": norm(),
            "lm_head.weight": linear(self.draft_vocab_size, hidden, 2.0),
        }
        if self.has_embedding:
            out["embed_tokens.weight"] = rng.standard_normal((config["vocab_size"], hidden), dtype=np.float32)
        if self.draft_vocab_size < config["vocab_size"]:
            ids = self.token_ids()
            out["d2t"] = ids - np.arange(self.draft_vocab_size)
            out["t2d"] = np.isin(np.arange(config["vocab_size"]), ids)
        return out

    def write(self, folder: Path, *, without: tuple[str, ...] = (), **other: npt.NDArray[Any]) -> None:
        """Write config.json and model.safetensors, without some tensors and with others in place."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        tensors = {name: value for name, value in (self.weights() | other).items() if name not in without}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@dataclass(frozen=True, slots=True)
class MarkovTarget(TinyModel):
    """A model whose next token hangs on its last token alone: layers add next to nothing, and the head turns a token's
    embedding into that of its successor, all drawn at random."""

    def weights(self) -> Weights:
        out = TinyModel.weights(self)
        for name, values in out.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                values *= np.float32(1e-3)
        vocab, hidden = out["model.embed_tokens.weight"].shape
        # Special tokens of the byte tokenizer follow none but themselves, so that no text ends soon.
        others = np.random.default_rng([self.seed, 2]).permutation(np.arange(3, vocab))
        successor = np.concatenate([np.arange(3), others])
        out["lm_head.weight"] = np.empty((vocab, hidden), np.float32)
        out["lm_head.weight"][successor] = out["model.embed_tokens.weight"]
        return out


@dataclass(frozen=True, slots=True)
class MarkovHead(TinyHead):
    """A head for that: it forgets its row, keeps the embedding of the token behind, and has the model's logits of that.

    Each of its attention's heads carries its own dimensions, and attends to its own position alone, as near as can be:
    what it brings there is the embedding, less the row that the residual stream begins with.
    """

    @property
    def config(self) -> dict[str, Any]:
        return TinyHead(self.target, self.draft_vocab_size).config | {"norm_before_residual": True}

    def weights(self) -> dict[str, npt.NDArray[Any]]:
        out = TinyHead.weights(self)
        given = self.target.weights()
        hidden, head_dim, name = self.config["hidden_size"], self.config["head_dim"], self.layer_name
        assert self.config["num_attention_heads"] == self.config["num_key_value_heads"] == hidden // head_dim
        out[f"{name}.mlp.down_proj.weight"] *= np.float32(1e-3)
        for norm in ("input_layernorm", "hidden_norm"):
            out[f"{name}.{norm}.weight"] = np.ones(hidden, np.float32)
        one, zero = np.eye(hidden, dtype=np.float32), np.zeros((hidden, hidden), np.float32)
        out[f"{name}.self_attn.v_proj.weight"] = np.concatenate([4 * one, -one], 1)
        out[f"{name}.self_attn.o_proj.weight"] = one
        # Queries and keys are the same function of the embedding, and large, so that a pair's best match is itself.
        out[f"{name}.self_attn.q_proj.weight"] = np.concatenate([6 * one, zero], 1)
        out[f"{name}.self_attn.k_proj.weight"] = np.concatenate([6 * one, zero], 1)
        out["norm.weight"] = given["model.norm.weight"]
        out["lm_head.weight"] = given["lm_head.weight"][self.token_ids()]
        return out


def deep(model: TinyModel, num_layers: int = 8) -> TinyModel:
    """The same with so many layers: a head reads three of them."""
    return replace(model, config=model.config | {"num_hidden_layers": num_layers})


def wide(model: TinyModel) -> TinyModel:
    """The same with heads of 64, as GPUs want them, and sizes to go with those."""
    return replace(model, config=model.config | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64})
