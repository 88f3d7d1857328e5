"""A plain Llama in numpy: log-probabilities of a known text, in float32 or higher, to compare engines with.

Alone it is exact. With `EngineNumbers` it rounds wherever the engine's kernels for GPUs (and their portable twins) do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def rounded(weights: dict[str, Array]) -> dict[str, Array]:
    """Return weights as bfloat16 holds them."""
    return {name: value.astype(ml_dtypes.bfloat16).astype(np.float32) for name, value in weights.items()}


def to_bfloat16(x: Array) -> Array:
    """Return float32 values as bfloat16 holds them."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def to_e4m3(x: Array, group: int) -> Array:
    """Return what groups of a row's elements are as e4m3 with a scale each, which brings the largest to 448."""
    groups = x.reshape(len(x), -1, group)
    largest = np.maximum(np.abs(groups).max(-1, keepdims=True), np.float32(1e-12))
    codes = _e4m3(groups * (np.float32(448) / largest))  # as the kernels do: a division may round otherwise
    out: Array = codes * (largest / np.float32(448))
    return out.reshape(x.shape)


def _e4m3(x: Array) -> Array:
    return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


@dataclass(frozen=True, slots=True)
class EngineNumbers:
    """What the engine's numbers are where all tokens of a text are one step of it."""

    fp8_weights: bool
    fp8_kv: bool
    """With scales of 1."""

    def weight(self, x: Array, *, in_layer: bool) -> Array:
        """Return a weight as it is loaded."""
        x = to_bfloat16(x)
        return to_e4m3(x, x.shape[1]) if self.fp8_weights and in_layer else x

    def stored(self, x: Array) -> Array:
        """Return activations as they are stored between kernels."""
        return to_bfloat16(x)

    def gemm_input(self, x: Array, source: Literal["norm", "attention", "silu"], *, whole_heads: bool) -> Array:
        """Return what a layer's GEMM takes of a norm, of attention, or of SiLU; see kernels/cuda/grouped_scales.cuh.

        `whole_heads`: 128 values are heads with the same keys.
        """
        if not self.fp8_weights:
            return to_bfloat16(x)
        tokens, columns = x.shape
        is_grouped = columns % 256 == 0 and (source == "silu" or (source == "attention" and whole_heads))
        if source == "attention" and not (is_grouped and tokens <= 128):
            x = to_bfloat16(x)
        if not is_grouped or tokens > 128:
            return to_e4m3(x, columns)
        return to_e4m3(x, 32 if source == "silu" and tokens <= 32 else 128)

    def page(self, x: Array) -> Array:
        """Return keys or values as pages hold them."""
        return _e4m3(x) if self.fp8_kv else to_bfloat16(x)


def log_probs(
    config: dict[str, Any], weights: dict[str, Array], token_ids: list[int], numbers: EngineNumbers | None = None
) -> npt.NDArray[np.float64]:
    """Return (T, vocabulary): after each token, the log-probabilities of the next; llama without biases or scaling.

    With `numbers`, values are rounded by them; sums and everything else are as exact as without.
    """
    if numbers is not None:
        weights = {
            name: numbers.weight(value, in_layer="_proj" in name) if value.ndim == 2 else value
            for name, value in weights.items()
        }

    def keep(x: Array) -> Array:
        return x

    stored = page = keep
    if numbers is not None:
        stored, page = numbers.stored, numbers.page
    eps, head_dim = config["rms_norm_eps"], config["head_dim"]
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    num_tokens = len(token_ids)
    whole_heads = 128 % head_dim == 0 and num_heads // num_kv_heads * head_dim % 128 == 0

    def gemm_input(x: Array, source: Literal["norm", "attention", "silu"]) -> Array:
        return x if numbers is None else numbers.gemm_input(x, source, whole_heads=whole_heads)

    inverse = config["rope_theta"] ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = np.outer(np.arange(num_tokens), inverse)
    cos, sin = (np.tile(f(turns), 2).astype(np.float32)[:, None] for f in (np.cos, np.sin))

    def norm(x: Array, name: str) -> Array:
        scale = np.sqrt(np.mean(np.square(x, dtype=np.float64), -1, keepdims=True) + eps).astype(np.float32)
        out: Array = (x / scale * weights[f"{name}.weight"]).astype(np.float32)
        return out

    def linear(x: Array, name: str) -> Array:
        out: Array = (x @ weights[f"{name}.weight"].T).astype(np.float32)
        return out if name == "lm_head" else stored(out)

    def rotate(x: Array) -> Array:
        first, second = np.split(x, 2, -1)
        out: Array = (x * cos + np.concatenate([-second, first], -1) * sin).astype(np.float32)
        return out

    hidden: Array = weights["model.embed_tokens.weight"][token_ids]
    future = np.triu(np.full((num_tokens, num_tokens), -np.inf, np.float32), 1)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        x = gemm_input(norm(hidden, f"{name}.input_layernorm"), "norm")
        q, k, v = (linear(x, f"{name}.self_attn.{part}_proj").reshape(num_tokens, -1, head_dim) for part in "qkv")
        q, k, v = stored(rotate(q)), page(rotate(k)), page(v)
        heads = []
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            scores = q[:, head] @ k[:, kv_head].T * np.float32(head_dim**-0.5) + future
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append((scores @ v[:, kv_head] / scores.sum(-1, keepdims=True)).astype(np.float32))
        x = gemm_input(np.concatenate(heads, -1), "attention")
        hidden = stored(hidden + linear(x, f"{name}.self_attn.o_proj"))
        x = gemm_input(norm(hidden, f"{name}.post_attention_layernorm"), "norm")
        gate, up = linear(x, f"{name}.mlp.gate_proj"), linear(x, f"{name}.mlp.up_proj")
        x = gemm_input(gate / (1 + np.exp(-gate)) * up, "silu")
        hidden = stored(hidden + linear(x, f"{name}.mlp.down_proj"))
    logits: npt.NDArray[np.float64] = linear(stored(norm(hidden, "model.norm")), "lm_head").astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    out: npt.NDArray[np.float64] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return out
