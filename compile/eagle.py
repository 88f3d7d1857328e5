"""EAGLE-3 heads as their checkpoints describe them: shape, which of the target's layers they read, which tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from tpserve.compile.config import CompileConfig, ModelConfig, read_config
from tpserve.compile.errors import CheckpointError, ModelConfigError
from tpserve.compile.sharding import PANEL_ROWS

NUM_AUX_LAYERS = 3
_FEWEST_LAYERS = 7
"""Of a target whose layers 2, n / 2 and n - 3 are in order."""
_LAYER_NAMES = ("midlayer", "layers.0")

# Keys beside those of a Llama that change nothing in the graph: how the head was trained, or what this file reads.
_OTHER_KEYS = frozenset(
    """draft_vocab_size target_hidden_size eagle_aux_hidden_state_layer_ids eagle_config norm_before_residual bias
    speculators_config speculators_model_type speculators_version transformer_layer_config target_model_type
    embed_requires_grad auto_map has_no_defaults_at_init num_nextn_predict_layers""".split()
)


def is_eagle_head(model_dir: Path) -> bool:
    """Return whether a Hugging Face folder holds an EAGLE-3 head, by its config.json's architectures.

    Raises
    ------
    ModelConfigError
        If it holds an older kind of EAGLE head.
    """
    path = model_dir / "config.json"
    names = [str(name).lower() for name in read_config(path).get("architectures") or ()]
    if any("eagle3" in name for name in names):
        return True
    if any("eagle" in name for name in names):
        raise ModelConfigError(
            f"{path}: architectures {', '.join(names)} are an EAGLE head of version 1 or 2: give one of EAGLE-3, or a "
            "draft that is a model of its own"
        )
    return False


@dataclass(frozen=True, slots=True)
class EagleHeadConfig:
    """Shape of an EAGLE-3 head beside its target."""

    layer: ModelConfig
    """Of its one decoder layer; `vocab_size` is that of its own logits."""
    target_vocab_size: int
    target_hidden_size: int
    aux_layers: tuple[int, ...]
    """The target's layers before which it reads the residual stream."""
    norm_before_residual: bool
    """Whether its layer adds to the normed row, as some of the `speculators` library do, not to the row itself."""
    layer_name: str
    """Of its layer's tensors: `midlayer`, or `layers.0`."""
    has_embedding: bool
    """Whether it has an embedding of its own; else it takes the target's."""
    has_token_map: bool
    """Whether it has `d2t`."""

    @property
    def num_row_values(self) -> int:
        """Of a row of the target's layers, side by side."""
        return NUM_AUX_LAYERS * self.target_hidden_size

    @classmethod
    def from_hf(cls, model_dir: Path, target: ModelConfig, *, has_weights: bool = True) -> Self:
        """Read the head in a Hugging Face folder, and compare it with its target.

        Parameters
        ----------
        has_weights
            False for random weights: then it takes the target's embedding, and token ids as they are.

        Raises
        ------
        ModelConfigError
            If config.json asks for something that this compiler would get wrong, or does not fit the target.
        CheckpointError
            If a tensor is missing or has another shape.
        """
        path = model_dir / "config.json"
        raw = read_config(path)
        raw = raw | dict(raw.get("transformer_layer_config") or {})
        vocab_size = raw.get("vocab_size")
        draft_vocab_size = raw.get("draft_vocab_size") or vocab_size
        keys = {key: value for key, value in raw.items() if key not in _OTHER_KEYS}
        layer = ModelConfig.from_keys(keys | {"vocab_size": draft_vocab_size, "tie_word_embeddings": False}, path)
        target_hidden = raw.get("target_hidden_size") or layer.hidden_size
        for name, found, expected in (
            ("vocab_size", vocab_size, target.vocab_size),
            ("target_hidden_size" if "target_hidden_size" in raw else "hidden_size", target_hidden, target.hidden_size),
        ):
            if found != expected:
                raise ModelConfigError(
                    f"{path}: the head is for a model with {name} {found}, this one has {expected}: give the EAGLE-3 "
                    "head of this very model"
                )
        _check(layer, raw, target, path)
        head = cls(
            layer=layer,
            target_vocab_size=target.vocab_size,
            target_hidden_size=target.hidden_size,
            aux_layers=_aux_layers(raw, target, path),
            norm_before_residual=bool(raw.get("norm_before_residual", False)),
            layer_name=_LAYER_NAMES[0],
            has_embedding=False,
            has_token_map=False,
        )
        if has_weights:
            head = head._with_tensors(_shapes(model_dir), model_dir)
        if not head.has_embedding and layer.hidden_size != target.hidden_size:
            raise ModelConfigError(
                f"{path}: the head's rows have {layer.hidden_size} values, the model's embedding {target.hidden_size}, "
                "and the head has no embed_tokens.weight of its own: give the EAGLE-3 head of this very model"
            )
        return head

    def check_compile(self, compile_config: CompileConfig) -> None:
        """Check how this is to be compiled.

        Raises
        ------
        ModelConfigError
            If it cannot be so; names the remedy.
        """
        if compile_config.quantization == "fp8":
            raise ModelConfigError(
                "an EAGLE-3 head is not quantised: use --quantization q0bf16, also beside an fp8 model"
            )
        if compile_config.target == "llvm":
            return
        if compile_config.kv_cache_dtype != "auto":
            raise ModelConfigError(
                f"on a GPU, KV pages of an EAGLE-3 head are bfloat16, not {compile_config.kv_cache_dtype}: leave "
                "--kv-cache-dtype away, also beside a model with it"
            )
        tp_size, hidden = compile_config.tp_size, self.layer.hidden_size
        if hidden % (tp_size * PANEL_ROWS):
            raise ModelConfigError(
                f"the head's rows have {hidden} values, which {tp_size} GPUs do not split in multiples of "
                f"{PANEL_ROWS}: give a smaller --tp"
            )

    def _with_tensors(self, shapes: dict[str, tuple[int, ...]], model_dir: Path) -> Self:
        """Return this with what the checkpoint has, after comparing every tensor's shape."""
        layer_name = next((name for name in _LAYER_NAMES if f"{name}.hidden_norm.weight" in shapes), _LAYER_NAMES[0])
        head = replace(
            self,
            layer_name=layer_name,
            has_embedding="embed_tokens.weight" in shapes,
            has_token_map="d2t" in shapes,
        )
        layer = self.layer
        if not head.has_token_map and layer.vocab_size != self.target_vocab_size:
            raise CheckpointError(
                f"{model_dir} has no tensor 'd2t', which says what the head's {layer.vocab_size} tokens are among the "
                f"model's {self.target_vocab_size}: fetch the head again"
            )
        for name, expected in head._expected_shapes().items():
            if name not in shapes:
                raise CheckpointError(f"{model_dir} has no tensor {name!r}, which an EAGLE-3 head needs")
            if shapes[name] != expected:
                raise CheckpointError(
                    f"{model_dir}: tensor {name!r} is {shapes[name]}, by config.json and the model it is {expected}: "
                    "give the EAGLE-3 head of this very model"
                )
        return head

    def _expected_shapes(self) -> dict[str, tuple[int, ...]]:
        layer, name = self.layer, self.layer_name
        hidden, ffn = layer.hidden_size, layer.intermediate_size
        q_dim, kv_dim = (count * layer.head_dim for count in (layer.num_attention_heads, layer.num_kv_heads))
        shapes: dict[str, tuple[int, ...]] = {
            "fc.weight": (hidden, self.num_row_values),
            f"{name}.self_attn.q_proj.weight": (q_dim, 2 * hidden),
            f"{name}.self_attn.k_proj.weight": (kv_dim, 2 * hidden),
            f"{name}.self_attn.v_proj.weight": (kv_dim, 2 * hidden),
            f"{name}.self_attn.o_proj.weight": (hidden, q_dim),
            f"{name}.mlp.gate_proj.weight": (ffn, hidden),
            f"{name}.mlp.up_proj.weight": (ffn, hidden),
            f"{name}.mlp.down_proj.weight": (hidden, ffn),
            "lm_head.weight": (layer.vocab_size, hidden),
            "norm.weight": (hidden,),
        }
        norms = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
        shapes |= {f"{name}.{norm}.weight": (hidden,) for norm in norms}
        if self.has_token_map:
            shapes["d2t"] = (layer.vocab_size,)
        if self.has_embedding:
            shapes["embed_tokens.weight"] = (self.target_vocab_size, hidden)
        return shapes


def _check(layer: ModelConfig, raw: dict[str, Any], target: ModelConfig, path: Path) -> None:
    """Refuse what the graph would get wrong."""
    if layer.num_layers != 1:
        raise ModelConfigError(f"{path}: the head has {layer.num_layers} layers, only heads of one are supported")
    if layer.vocab_size > target.vocab_size:
        raise ModelConfigError(
            f"{path}: draft_vocab_size is {layer.vocab_size}, more than the model's {target.vocab_size} tokens: give "
            "the EAGLE-3 head of this very model"
        )
    if raw.get("bias") or layer.qkv_bias or layer.mlp_bias or layer.qk_norm or layer.stored_fp8:
        raise ModelConfigError(
            f"{path}: heads with biases, norms of q and k, or quantised weights are not supported: give one without"
        )
    nested = raw.get("eagle_config") or {}
    if nested.get("use_aux_hidden_state", True) is not True:
        raise ModelConfigError(f"{path}: the head reads the model's last layer alone: only three layers are supported")


def _aux_layers(raw: dict[str, Any], target: ModelConfig, path: Path) -> tuple[int, ...]:
    """Return the layers before which the head reads the residual stream.

    By the checkpoint's ids: at the top of config.json they are those layers themselves, as vLLM reads them; within
    `eagle_config`, those behind which it reads, as SGLang does. Without ids, layers 2, n / 2 and n - 3.
    """
    given, offset = raw.get("eagle_aux_hidden_state_layer_ids"), 0
    if not given:
        given, offset = (raw.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids"), 1
    count = target.num_layers
    if not given:
        if count < _FEWEST_LAYERS:
            raise ModelConfigError(
                f"{path}: an EAGLE-3 head reads before layers 2, n/2 and n-3 of its model, which takes "
                f"{_FEWEST_LAYERS}; this one has {count}: give a larger model, or "
                "eagle_aux_hidden_state_layer_ids in config.json"
            )
        return (2, count // 2, count - 3)
    whole = isinstance(given, list) and all(isinstance(each, int) for each in given)
    layers = tuple(each + offset for each in given) if whole else ()
    if len(layers) != NUM_AUX_LAYERS or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < count:
        raise ModelConfigError(
            f"{path}: eagle_aux_hidden_state_layer_ids is {given}, expected {NUM_AUX_LAYERS} layers in ascending order "
            f"of the model's {count}: give the EAGLE-3 head of this very model"
        )
    return layers


def _shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's tensors.

    Raises
    ------
    CheckpointError
        If there are no safetensors, or they are corrupt.
    """
    from safetensors import SafetensorError, safe_open

    paths = sorted(model_dir.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(
            f"{model_dir} has no model.safetensors, from which weights are read: if the head is published as "
            "pytorch_model.bin, load that with torch and write it with safetensors.torch.save_file"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="numpy") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except SafetensorError as error:
            raise CheckpointError(f"{path} is corrupt ({error}): fetch it again") from None
    return shapes
