"""A Llama and its EAGLE-3 head in float64, written from the papers' formulas: no cache, no engine code.

Both are functions of a whole sequence, so that nothing can be left over from earlier rounds, chunks or other sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Matrix = npt.NDArray[np.float64]


def rms_norm(x: Matrix, weight: Array, eps: float) -> Matrix:
    """(T, H) -> (T, H)."""
    out: Matrix = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight
    return out


def attend(
    config: Mapping[str, Any], x: Matrix, q_weight: Array, k_weight: Array, v_weight: Array, o_weight: Array
) -> Matrix:
    """Causal grouped-query attention with rotary positions from 0 on; (T, columns of the weights) -> (T, H)."""
    count, dim = len(x), config["head_dim"]
    num_q, num_kv = config["num_attention_heads"], config["num_key_value_heads"]
    turn = _turns(count, dim, config["rope_theta"])

    def heads(weight: Array, num: int) -> Matrix:  # (T, H) -> (num, T, D)
        return (x @ weight.T).reshape(count, num, dim).swapaxes(0, 1)

    def rotated(values: Matrix) -> Matrix:  # dimension d is turned with dimension d + dim / 2
        turned = (values[..., : dim // 2] + 1j * values[..., dim // 2 :]) * turn
        return np.concatenate([turned.real, turned.imag], -1)

    q = rotated(heads(q_weight, num_q)).reshape(num_kv, num_q // num_kv, count, dim)
    k, v = rotated(heads(k_weight, num_kv))[:, None], heads(v_weight, num_kv)[:, None]
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(dim) + _mask(count)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = (weights / weights.sum(-1, keepdims=True)) @ v  # (Hkv, Hq / Hkv, T, D)
    result: Matrix = out.reshape(num_q, count, dim).swapaxes(0, 1).reshape(count, num_q * dim) @ o_weight.T
    return result


@cache
def _turns(count: int, dim: int, theta: float) -> Array:
    """(T, D / 2): of each position, as complex numbers."""
    turns: Array = np.exp(1j * np.outer(np.arange(count), theta ** (-np.arange(0, dim, 2) / dim)))
    return turns


@cache
def _mask(count: int) -> Matrix:
    """(T, T): -inf for what comes later."""
    mask: Matrix = np.triu(np.full((count, count), -np.inf), 1)
    return mask


def gated(x: Matrix, gate: Array, up: Array, down: Array) -> Matrix:
    """SwiGLU; (T, H) -> (T, H)."""
    opened = x @ gate.T
    out: Matrix = (opened / (1 + np.exp(-opened)) * (x @ up.T)) @ down.T
    return out


class ReferenceTarget:
    """A Llama without biases or frequency scaling."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Array]) -> None:
        self.config = config
        self.weights = {name: value.astype(np.float64) for name, value in weights.items()}

    def run(self, tokens: Sequence[int]) -> tuple[Matrix, list[Matrix]]:
        """Return the logits behind each token, (T, vocabulary), and the residual stream before each layer, (T, H)."""
        w, eps = self.weights, self.config["rms_norm_eps"]
        x = w["model.embed_tokens.weight"][list(tokens)]
        streams = []
        for index in range(self.config["num_hidden_layers"]):
            streams.append(x)
            name = f"model.layers.{index}"
            parts = [w[f"{name}.self_attn.{part}_proj.weight"] for part in "qkvo"]
            x = x + attend(self.config, rms_norm(x, w[f"{name}.input_layernorm.weight"], eps), *parts)
            mlp = [w[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down")]
            x = x + gated(rms_norm(x, w[f"{name}.post_attention_layernorm.weight"], eps), *mlp)
        return rms_norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T, streams


class ReferenceHead:
    """An EAGLE-3 head beside its target.

    Parameters
    ----------
    layers
        The target's, before which it reads the residual stream.
    """

    def __init__(
        self, config: Mapping[str, Any], weights: Mapping[str, Array], target: ReferenceTarget, layers: Sequence[int]
    ) -> None:
        self.config, self.target, self.layers = config, target, tuple(layers)
        self.weights = {name: value.astype(np.float64) for name, value in weights.items() if name != "t2d"}
        self.name = "midlayer" if "midlayer.hidden_norm.weight" in weights else "layers.0"

    def draft(self, tokens: Sequence[int], drafted: Sequence[int]) -> list[Matrix]:
        """Return from which logits each of some tokens behind a sequence is drafted.

        Parameters
        ----------
        tokens
            Two or more.

        Returns
        -------
        For each of `drafted`, given those before it: (vocabulary of the target,), -inf where the head has no token.
        """
        w = self.weights
        _, streams = self.target.run(tokens[:-1])
        rows = np.concatenate([streams[layer] for layer in self.layers], -1) @ w["fc.weight"].T
        behind = list(tokens[1:])
        logits: list[Matrix] = []
        for token in drafted:
            last = self._layer(rows, behind)[-1:]
            own = (rms_norm(last, w["norm.weight"], self.config["rms_norm_eps"]) @ w["lm_head.weight"].T)[0]
            ids = np.arange(len(own)) + w.get("d2t", np.zeros(len(own)))
            spread = np.full(self.config["vocab_size"], -np.inf)
            spread[ids.astype(int)] = own
            logits.append(spread)
            rows, behind = np.concatenate([rows, last]), [*behind, token]
        return logits

    def _layer(self, rows: Matrix, behind: list[int]) -> Matrix:
        """The decoder layer over all pairs; (T, H) -> (T, H), before the last norm."""
        w, eps, name = self.weights, self.config["rms_norm_eps"], self.name
        table = w.get("embed_tokens.weight", self.target.weights["model.embed_tokens.weight"])
        e = rms_norm(table[behind], w[f"{name}.input_layernorm.weight"], eps)
        u = rms_norm(rows, w[f"{name}.hidden_norm.weight"], eps)
        parts = [w[f"{name}.self_attn.{part}_proj.weight"] for part in "qkvo"]
        x = u if self.config.get("norm_before_residual") else rows
        x = x + attend(self.config, np.concatenate([e, u], -1), *parts)
        mlp = [w[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down")]
        return x + gated(rms_norm(x, w[f"{name}.post_attention_layernorm.weight"], eps), *mlp)
