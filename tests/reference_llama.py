"""A plain Llama in numpy: log-probabilities of a known text, in float32 or higher, to compare engines with."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def rounded(weights: dict[str, Array]) -> dict[str, Array]:
    """Return weights as bfloat16 holds them."""
    return {name: value.astype(ml_dtypes.bfloat16).astype(np.float32) for name, value in weights.items()}


def log_probs(config: dict[str, Any], weights: dict[str, Array], token_ids: list[int]) -> npt.NDArray[np.float64]:
    """Return (T, vocabulary): after each token, the log-probabilities of the next; llama without biases or scaling."""
    eps, head_dim = config["rms_norm_eps"], config["head_dim"]
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    num_tokens = len(token_ids)
    inverse = config["rope_theta"] ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = np.outer(np.arange(num_tokens), inverse)
    cos, sin = (np.tile(f(turns), 2).astype(np.float32)[:, None] for f in (np.cos, np.sin))

    def norm(x: Array, name: str) -> Array:
        scale = np.sqrt(np.mean(np.square(x, dtype=np.float64), -1, keepdims=True) + eps).astype(np.float32)
        out: Array = (x / scale * weights[f"{name}.weight"]).astype(np.float32)
        return out

    def linear(x: Array, name: str) -> Array:
        out: Array = (x @ weights[f"{name}.weight"].T).astype(np.float32)
        return out

    def rotate(x: Array) -> Array:
        first, second = np.split(x, 2, -1)
        out: Array = (x * cos + np.concatenate([-second, first], -1) * sin).astype(np.float32)
        return out

    hidden: Array = weights["model.embed_tokens.weight"][token_ids]
    future = np.triu(np.full((num_tokens, num_tokens), -np.inf, np.float32), 1)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        x = norm(hidden, f"{name}.input_layernorm")
        q, k, v = (linear(x, f"{name}.self_attn.{part}_proj").reshape(num_tokens, -1, head_dim) for part in "qkv")
        q, k = rotate(q), rotate(k)
        heads = []
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            scores = q[:, head] @ k[:, kv_head].T * np.float32(head_dim**-0.5) + future
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append((scores @ v[:, kv_head] / scores.sum(-1, keepdims=True)).astype(np.float32))
        hidden = hidden + linear(np.concatenate(heads, -1), f"{name}.self_attn.o_proj")
        x = norm(hidden, f"{name}.post_attention_layernorm")
        gate, up = linear(x, f"{name}.mlp.gate_proj"), linear(x, f"{name}.mlp.up_proj")
        hidden = hidden + linear(gate / (1 + np.exp(-gate)) * up, f"{name}.mlp.down_proj")
    logits: npt.NDArray[np.float64] = linear(norm(hidden, "model.norm"), "lm_head").astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    out: npt.NDArray[np.float64] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return out
