"""What is compiled: the model's shape, read from Hugging Face's config.json, and how to compile it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from tpserve.compile.errors import ModelConfigError
from tpserve.proto.manifest import sha256_file

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_TP_SIZES = (1, 2, 4, 8)

# Keys of config.json that describe the checkpoint or training and change nothing in the graph.
_IGNORED_KEYS = frozenset(
    """architectures torch_dtype dtype transformers_version bos_token_id eos_token_id pad_token_id use_cache
    initializer_range attention_dropout pretraining_tp _name_or_path is_llama_config rope_interleaved
    transformers.js_config max_window_layers unk_token_id layer_types model_max_length
    output_attentions output_hidden_states return_dict is_encoder_decoder chunk_size_feed_forward id2label label2id
    problem_type _attn_implementation attn_implementation""".split()
)


def read_config(path: Path) -> dict[str, Any]:
    """Return the object that a Hugging Face folder's config.json holds.

    Raises
    ------
    ModelConfigError
        If the file is missing or holds something else.
    """
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelConfigError(f"{path} is missing: give a Hugging Face model folder or a GGUF file") from None
    except ValueError as error:
        raise ModelConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ModelConfigError(f"{path} holds {type(raw).__name__}, expected an object")
    return raw


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Frequency scaling of rotary embeddings; `llama3` as in Llama 3.1, `linear` divides positions."""

    kind: Literal["llama3", "linear"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a decoder-only transformer of the Llama family."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    """Biases on the q, k and v projections (qwen2, llama with attention_bias)."""
    o_bias: bool
    """Bias on the output projection (llama with attention_bias)."""
    mlp_bias: bool
    qk_norm: bool
    """RMSNorm on each head of q and k before rotation (qwen3)."""
    sliding_window: int | None
    """Attend to this many latest positions only."""
    stored_fp8: bool
    """Whether the checkpoint's layers are e4m3 with stored scales (compressed-tensors, ModelOpt)."""
    sha256: str
    """Of config.json."""

    @classmethod
    def from_hf(cls, model_dir: Path) -> Self:
        """Read `config.json` of a Hugging Face folder.

        Raises
        ------
        ModelConfigError
            If the file is missing or malformed, or asks for something that this compiler would get wrong.
        """
        path = model_dir / "config.json"
        raw = read_config(path)
        return cls.from_keys(raw, path)

    @classmethod
    def from_keys(cls, raw: dict[str, Any], path: Path) -> Self:
        """Read the keys of a config.json, which is at `path`; see `from_hf`."""
        keys = dict(raw)
        for key in _IGNORED_KEYS:
            keys.pop(key, None)

        def need(key: str) -> Any:
            if key not in keys:
                raise ModelConfigError(f"{path} has no {key!r}")
            return keys.pop(key)

        model_type = need("model_type")
        if model_type not in MODEL_TYPES:
            raise ModelConfigError(f"{path}: model_type {model_type!r} is not one of {', '.join(MODEL_TYPES)}")
        activation = keys.pop("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ModelConfigError(f"{path}: hidden_act {activation!r} is not supported, only silu")
        stored_fp8 = _reads_as_fp8(keys.pop("quantization_config", None), path)
        num_heads = _integer("num_attention_heads", need("num_attention_heads"), path)
        hidden_size = _integer("hidden_size", need("hidden_size"), path)
        theta, scaling = _read_rope(keys, path)
        # What transformers takes when a key is absent, which differs from null.
        sliding_window = keys.pop("sliding_window", 4096 if model_type == "mistral" else None)
        head_dim = keys.pop("head_dim", 128 if model_type == "qwen3" else None)
        num_kv_heads = keys.pop("num_key_value_heads", None) if model_type == "llama" else need("num_key_value_heads")
        if not keys.pop("use_sliding_window", model_type == "mistral"):
            sliding_window = None
        if sliding_window is not None and model_type not in ("mistral",):
            raise ModelConfigError(f"{path}: sliding_window per layer of {model_type} is not supported")
        attention_bias = bool(keys.pop("attention_bias", False))
        mlp_bias = bool(keys.pop("mlp_bias", False))
        if (attention_bias or mlp_bias) and model_type in ("qwen2", "mistral"):
            raise ModelConfigError(f"{path}: attention_bias and mlp_bias are not keys of {model_type}")
        config = cls(
            model_type=model_type,
            hidden_size=hidden_size,
            intermediate_size=_integer("intermediate_size", need("intermediate_size"), path),
            num_layers=_integer("num_hidden_layers", need("num_hidden_layers"), path),
            num_attention_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else _integer("num_key_value_heads", num_kv_heads, path),
            head_dim=hidden_size // num_heads if head_dim is None else _integer("head_dim", head_dim, path),
            vocab_size=_integer("vocab_size", need("vocab_size"), path),
            rms_norm_eps=_number("rms_norm_eps", need("rms_norm_eps"), path),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=_integer("max_position_embeddings", need("max_position_embeddings"), path),
            tie_word_embeddings=bool(keys.pop("tie_word_embeddings", False)),
            qkv_bias=attention_bias or model_type == "qwen2",
            o_bias=attention_bias,
            mlp_bias=mlp_bias,
            qk_norm=model_type == "qwen3",
            sliding_window=None if sliding_window is None else _integer("sliding_window", sliding_window, path),
            stored_fp8=stored_fp8,
            sha256=sha256_file(path),
        )
        if keys:
            raise ModelConfigError(
                f"{path} has keys that this compiler does not know: {', '.join(sorted(keys))}; "
                "remove them if they change nothing"
            )
        config._check(path)
        return config

    def _check(self, path: Path) -> None:
        if self.num_attention_heads % self.num_kv_heads:
            raise ModelConfigError(
                f"{path}: {self.num_attention_heads} attention heads are no multiple of {self.num_kv_heads} KV heads"
            )
        for name in ("head_dim", "hidden_size"):
            if getattr(self, name) % 16:
                raise ModelConfigError(f"{path}: {name} {getattr(self, name)} is no multiple of 16")

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, embeddings counted once when tied."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_attention_heads + self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    def rope_inv_freq(self) -> tuple[float, ...]:
        """Return the head_dim / 2 inverse frequencies in float32, as transformers computes them.

        The `llama3` rule is that of the Llama 3.1 release: long wavelengths are divided by `factor`, short ones kept,
        and those between are interpolated.
        """
        import numpy as np  # whose import is a third of what it takes to find a library in the cache

        exponent = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        inv_freq = (np.float32(1.0) / np.power(np.float32(self.rope_theta), exponent)).astype(np.float32)
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "linear":
            inv_freq = inv_freq / np.float32(scaling.factor)
        elif scaling is not None:
            original = scaling.original_max_position_embeddings
            wavelength = 2 * math.pi / inv_freq
            smooth = (original / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            blended = (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
            inv_freq = np.where(
                wavelength > original / scaling.low_freq_factor,
                inv_freq / scaling.factor,
                np.where(wavelength < original / scaling.high_freq_factor, inv_freq, blended),
            ).astype(np.float32)
        return tuple(float(value) for value in inv_freq)


def _integer(name: str, value: object, path: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelConfigError(f"{path}: {name} is {value!r}, expected a positive integer")
    return value


def _number(name: str, value: object, path: Path) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ModelConfigError(f"{path}: {name} is {value!r}, expected a positive number")
    return float(value)


def _reads_as_fp8(given: object, path: Path) -> bool:
    """Return whether a checkpoint's quantization_config is one of e4m3 weights, False for none.

    compressed-tensors stores `weight_scale` by output channel or tensor, ModelOpt by tensor. Both quantise activations
    too; a stored `input_scale` is left aside, since rows are quantised by their own largest magnitude.
    """
    if given is None:
        return False
    if not isinstance(given, dict):
        raise ModelConfigError(f"{path}: quantization_config is {given!r}, expected an object or null")
    method = given.get("quant_method")
    remedy = "give an unquantised checkpoint, or one of FP8 weights by compressed-tensors or ModelOpt"
    if method == "modelopt":
        nested = given.get("quantization")
        algorithm = (nested if isinstance(nested, dict) else given).get("quant_algo")
        if algorithm != "FP8":
            raise ModelConfigError(f"{path}: ModelOpt's quant_algo {algorithm!r} is not supported: {remedy}")
    elif method == "compressed-tensors":
        groups = given.get("config_groups")
        schemes = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, dict) else []
        for weights in schemes:
            facts = (weights.get("num_bits"), weights.get("type"), weights.get("strategy"))
            if facts[:2] != (8, "float") or facts[2] not in ("channel", "tensor"):
                raise ModelConfigError(
                    f"{path}: weights of {facts[0]} bits, type {facts[1]!r} by {facts[2]!r} are not supported: {remedy}"
                )
        if not schemes:
            raise ModelConfigError(f"{path}: quantization_config has no config_groups: {remedy}")
    else:
        raise ModelConfigError(f"{path}: quantization_config of {method!r} is not supported: {remedy}")
    return True


def _read_rope(keys: dict[str, Any], path: Path) -> tuple[float, RopeScaling | None]:
    """Take rope_theta and scaling out of `keys`, in the form before or after transformers 5."""
    theta = keys.pop("rope_theta", 10000.0)
    old, new = keys.pop("rope_scaling", None), keys.pop("rope_parameters", None)
    given = old if new is None else new
    if given is None:
        return _number("rope_theta", theta, path), None
    if not isinstance(given, dict):
        raise ModelConfigError(f"{path}: rope_scaling is {given!r}, expected an object or null")
    scaling = dict(given)
    theta = _number("rope_theta", scaling.pop("rope_theta", theta), path)
    # Older files call it `type`, some have both.
    alias = scaling.pop("type", "default")
    kind = scaling.pop("rope_type", alias)

    def need(name: str) -> Any:
        if name not in scaling:
            raise ModelConfigError(f"{path}: {kind} rope scaling has no {name!r}")
        return scaling.pop(name)

    result: RopeScaling | None = None
    if kind == "linear":
        result = RopeScaling("linear", _number("rope factor", need("factor"), path))
    elif kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        factor, low, high = (_number(f"rope {name}", need(name), path) for name in names)
        name = "original_max_position_embeddings"
        result = RopeScaling("llama3", factor, low, high, _integer(name, need(name), path))
    elif kind != "default":
        raise ModelConfigError(f"{path}: rope scaling {kind!r} is not supported, only linear and llama3")
    if scaling:
        raise ModelConfigError(
            f"{path}: {kind} rope scaling has keys that this compiler does not know: {', '.join(sorted(scaling))}; "
            "remove them if they change nothing"
        )
    return theta, result


@dataclass(frozen=True, slots=True)
class CompileConfig:
    """How a model is compiled."""

    tp_size: int
    """Ranks of one tensor-parallel group: 1, 2, 4 or 8."""
    quantization: Literal["q0f32", "q0bf16", "fp8"]
    """Storage of the weights; fp8: e4m3 in the layers, bfloat16 in embeddings and head."""
    kernels: Literal["tuned", "portable"]
    """tuned: the target's own kernels; portable: TVM's for every operator."""
    target: Literal["llvm", "cuda"]
    """llvm: this machine's CPU; cuda: sm_90a. See `activation_dtype`."""
    max_model_len: int
    """Longest sequence, prompt and output, in tokens."""
    max_num_batched_tokens: int
    """Most tokens in one step; memory is planned to it."""
    max_num_seqs: int
    page_size: int = 16
    """Tokens of one KV page."""
    max_num_draft_tokens: int = 0
    """Most draft tokens that one step verifies for a sequence."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Of the KV pages; auto: that of activations; fp8: e4m3 with two scales a layer, half the memory of bfloat16."""
    aux_layers: tuple[int, ...] = ()
    """Layers before which an EAGLE-3 head reads the residual stream; empty: no head, and no such output."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.tp_size not in _TP_SIZES:
            raise ModelConfigError(f"--tp {self.tp_size} is not one of 1, 2, 4, 8")
        for name in ("max_model_len", "max_num_batched_tokens", "max_num_seqs", "page_size"):
            if getattr(self, name) < 1:
                raise ModelConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.max_num_draft_tokens < 0:
            raise ModelConfigError(f"max_num_draft_tokens is {self.max_num_draft_tokens}, expected 0 or more")
        if self.page_size != 16:
            raise ModelConfigError(f"page_size {self.page_size} is not supported by the kernels, only 16")
        if self.target == "cuda" and (self.kernels != "tuned" or self.quantization == "q0f32"):
            raise ModelConfigError(
                f"target cuda has tuned kernels for q0bf16 and fp8 only, not {self.kernels} for {self.quantization}: "
                "use --kernels tuned --quantization q0bf16 or fp8"
            )
        if self.target == "llvm" and self.kernels == "tuned" and self.quantization == "fp8":
            raise ModelConfigError(
                "a CPU's tuned kernels have no fp8 weights: use --device cuda, --kernels portable (slow, the same "
                "numbers as on a GPU), or --quantization q0bf16"
            )
        if self.target == "llvm" and self.kernels == "tuned" and self.kv_cache_dtype == "fp8":
            raise ModelConfigError(
                "KV pages of a CPU's tuned kernels are float32, not fp8: use --device cuda, --kernels portable (slow, "
                "the same numbers as on a GPU), or --kv-cache-dtype auto"
            )
        if self.aux_layers and self.target == "llvm" and self.activation_dtype != "float32":
            raise ModelConfigError(
                f"on a CPU, EAGLE-3 heads read rows of float32, {self.kernels} kernels for {self.quantization} give "
                f"{self.activation_dtype}: use --kernels tuned, or --quantization q0f32"
            )

    @property
    def activation_dtype(self) -> str:
        """Of activations: portable kernels compute as a GPU does, a CPU's tuned ones in float32 whatever is stored."""
        in_bf16 = self.target == "cuda" or (self.kernels == "portable" and self.quantization != "q0f32")
        return "bfloat16" if in_bf16 else "float32"

    @property
    def page_dtype(self) -> str:
        """Of the KV pages."""
        return "float8_e4m3fn" if self.kv_cache_dtype == "fp8" else self.activation_dtype

    @property
    def max_num_rows(self) -> int:
        """Rows of one step whose logits are wanted: one for each sequence and each of its draft tokens."""
        return min(self.max_num_batched_tokens, self.max_num_seqs * (1 + self.max_num_draft_tokens))

    def check_model(self, model: ModelConfig) -> None:
        """Check this against a model.

        Raises
        ------
        ModelConfigError
            If the checkpoint's storage cannot be compiled so.
        """
        if model.stored_fp8 and self.quantization != "fp8":
            raise ModelConfigError(
                f"the checkpoint's weights are fp8, --quantization {self.quantization} cannot read them: "
                "use --quantization fp8 on --device cuda, or on a CPU with --kernels portable"
            )
        if any(not 0 <= layer < model.num_layers for layer in self.aux_layers):
            raise ModelConfigError(
                f"hidden rows are wanted before layers {_listed(self.aux_layers)} of a model with {model.num_layers}: "
                "give the EAGLE-3 head of this very model"
            )


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))
