"""What a compiled artifact says of itself: compile writes it, worker reads it.

An artifact is one folder: `model.so` (the compiled graph), `kernels.so` (tuned kernels of the target), and
`manifest.json`. The manifest holds everything a worker needs to place weights and size its buffers, so that a
worker never imports the compiler.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

FORMAT_VERSION = 5
MANIFEST_NAME = "manifest.json"
CPU_STEP_TOKENS, GPU_STEP_TOKENS = 256, 1024
"""Of one step, unless told otherwise; on a GPU four prompts or so beside the decodes (benchmarks/README.md)."""


class ManifestError(ValueError):
    """A manifest is missing, corrupt, or does not match what the worker was started with."""


@dataclass(frozen=True, slots=True)
class SplitMap:
    """Which blocks of a dimension each rank holds.

    Block `i` is the index range [i * block, (i + 1) * block) of the source dimension; None is a block of zeros,
    and so is whatever lies past the end of the source (padding of heads, vocabulary or feed-forward columns).
    """

    block: int
    ranks: tuple[tuple[int | None, ...], ...]
    size: int
    """Of the source dimension; a checkpoint with another is refused."""


@dataclass(frozen=True, slots=True)
class ParamSource:
    """One checkpoint tensor, or this rank's part of it."""

    name: str
    """Tensor name in the checkpoint."""
    axis: int | None = None
    """Dimension that is split over ranks; None takes the tensor whole."""
    split: str | None = None
    """Name of the split map for that dimension."""


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter of the compiled graph, in the order the graph takes them."""

    name: str
    shape: tuple[int, ...]
    """Per rank, after packing."""
    dtype: str
    layout: Literal["plain", "panel16", "wgmma64x256g132", "channel_scale", "rope_table", "kv_scale", "shared"]
    """plain: as in the checkpoint. panel16: (rows / 16, columns, 16), sixteen output rows side by side for each
    input column, so a GEMM reads weights once and in order. wgmma64x256g132: stages of 64 rows by 256 bytes, see
    `proto.packing`. channel_scale: of the e4m3 weight before it, for each of its rows; `sources` are the weight's.
    rope_table: (max_model_len, head_dim) float32, cosines then sines, computed from `Manifest.rope_inv_freq`.
    kv_scale: (2,) float32, of a layer's keys and values in e4m3 pages; 1 where the checkpoint stores none. `sources`
    are the layer's k and v projection, beside whose names the worker looks for them.
    shared: the parameter of that name of the model that this one drafts for, in the same memory."""
    sources: tuple[ParamSource, ...] = ()
    """Concatenated along dimension 0 after the split."""
    unpacked_shape: tuple[int, int] | None = None
    """Rows and columns before packing, where `shape` does not tell."""
    interleave: int = 0
    """So many rows of the first half, then as many of the second, and so on; of a vector, elements. 0 keeps the order
    of `sources`."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of the KV pages of one rank.

    Of each layer: (num_pages, num_kv_heads, 2, head_dim * page_size), keys then values. The order within a page is the
    target's: on cuda `compile/kernels/cuda/kv_layout.cuh` describes it; on llvm K is stored
    transposed, (head_dim, page_size), so that one vector holds one dimension of sixteen
    keys; V is (page_size, head_dim).
    """

    page_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    """float32, bfloat16, or float8_e4m3fn, whose values are multiplied by their layer's `kv_scale`."""

    def layer_shape(self, num_pages: int) -> tuple[int, ...]:
        """Return the shape of one layer's pages."""
        return (num_pages, self.num_kv_heads, 2, self.head_dim * self.page_size)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers, K and V."""
        itemsize = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}[self.dtype]
        return self.num_layers * self.num_kv_heads * 2 * self.head_dim * self.page_size * itemsize


@dataclass(frozen=True, slots=True)
class HeadFacts:
    """Of an EAGLE-3 head: the model that it drafts for, and how its tokens are named."""

    target_vocab_size: int
    """Its own logits are of `Manifest.vocab_size` tokens."""
    target_hidden_size: int
    """Its `project` takes rows of three times as many values."""
    has_token_map: bool
    """Whether the checkpoint has `d2t`: for each of its tokens, how far the target's id is from its own."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole description of one artifact."""

    model_type: str
    """Hugging Face `model_type` of the graph."""
    model_config_sha256: str
    """Of the model's config.json as compiled; a worker refuses another."""
    tp_size: int
    quantization: str
    """Storage of the weights: q0f32, q0bf16, or fp8 (e4m3 with a scale for each output channel, inputs of GEMMs with
    one for each token; embeddings and lm_head bfloat16)."""
    target: dict[str, str]
    """`kind` (llvm or cuda) and what the machine code needs (`cpu_features`, `arch`)."""
    kernels: Literal["tuned", "portable"]
    vocab_size: int
    """True vocabulary; logits are cut to it."""
    padded_vocab_size: int
    """Over all ranks."""
    hidden_size: int
    num_layers: int
    num_q_heads: int
    """Per rank, padding included."""
    max_model_len: int
    max_num_batched_tokens: int
    """Upper bound of tokens in one step, to which memory was planned."""
    max_num_seqs: int
    max_num_rows: int
    """Upper bound of sampled rows in one step: more than `max_num_seqs` where draft tokens are verified."""
    attention_window: int
    """Positions that a token attends to; 0 is all."""
    workspace_bytes: int
    """Temporary buffers of one step at the upper bounds."""
    kv: KVLayout
    rope_inv_freq: tuple[float, ...]
    """head_dim / 2 inverse frequencies, scaling applied."""
    splits: dict[str, SplitMap]
    params: tuple[ParamSpec, ...]
    externs: tuple[str, ...]
    """Global names that the graph calls: `tpserve.cpu.*` are in `kernels.so`, the others the worker gives."""
    compiler: dict[str, str]
    """Versions of what built it."""
    input_hash: str
    """The cache key: hash of everything that went in."""
    files: dict[str, str]
    """Name to sha256 of every other file of the artifact."""
    aux_layers: tuple[int, ...] = ()
    """Layers before which `step` takes the residual stream of all its tokens, side by side, as a third output; empty:
    it has no such output. Of a head: those that it was trained on."""
    head: HeadFacts | None = None
    """If this is an EAGLE-3 head, whose functions are `project`, `append` and `step` (see `Eagle3Head`)."""
    format_version: int = FORMAT_VERSION

    def save(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`."""
        text = json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)
        (folder / MANIFEST_NAME).write_text(text + "\n")

    @classmethod
    def load(cls, folder: Path, *, verify_files: bool = True) -> Self:
        """Read and check the manifest of an artifact folder.

        Raises
        ------
        ManifestError
            If the file is missing or malformed, is of another format version, or (with `verify_files`) a file of the
            artifact is missing or differs from its recorded hash.
        """
        path = folder / MANIFEST_NAME
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            raise ManifestError(f"{path} is missing: compile the model again") from None
        except ValueError as error:
            raise ManifestError(f"{path} is not valid JSON ({error}): compile again") from None
        if not isinstance(raw, dict) or raw.get("format_version") != FORMAT_VERSION:
            found = raw.get("format_version") if isinstance(raw, dict) else None
            raise ManifestError(f"{path} has format version {found}, this worker reads {FORMAT_VERSION}: compile again")
        try:
            manifest = cls(**_decode(raw))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ManifestError(f"{path} is malformed ({error}): compile again") from None
        if verify_files:
            for name, expected in manifest.files.items():
                file = folder / name
                if not file.is_file():
                    raise ManifestError(f"{file} is missing: compile again")
                actual = sha256_file(file)
                if actual != expected:
                    raise ManifestError(f"{file} has sha256 {actual}, the manifest says {expected}: compile again")
        return manifest

    def require(self, **expected: object) -> None:
        """Check fields against what the worker was started with.

        Raises
        ------
        ManifestError
            Naming each field that differs, with both values.
        """
        wrong = [
            f"{name} is {getattr(self, name)!r} in the library and {value!r} in the configuration"
            for name, value in expected.items()
            if getattr(self, name) != value
        ]
        if wrong:
            raise ManifestError("; ".join(wrong) + ": compile again for this configuration")

    def require_kv_dtype(self, dtype: str) -> None:
        """Check the type of the KV pages against what was asked for.

        Raises
        ------
        ManifestError
            With both.
        """
        if self.kv.dtype != dtype:
            raise ManifestError(
                f"--kv-cache-dtype asks for KV pages of {dtype}, the library has {self.kv.dtype}: compile it again "
                "with that flag, or serve it without"
            )


def sha256_file(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _decode(raw: dict[str, Any]) -> dict[str, Any]:
    """Turn JSON's lists and dicts back into the dataclasses' tuples."""
    out = dict(raw)
    out["kv"] = KVLayout(**raw["kv"])
    out["rope_inv_freq"] = tuple(raw["rope_inv_freq"])
    out["externs"] = tuple(raw["externs"])
    out["files"] = dict(raw["files"].items())
    # Libraries that were compiled before there were heads say nothing of them, and are as good as ever.
    out["aux_layers"] = tuple(raw.get("aux_layers", ()))
    out["head"] = None if raw.get("head") is None else HeadFacts(**raw["head"])
    out["splits"] = {
        name: SplitMap(split["block"], tuple(tuple(blocks) for blocks in split["ranks"]), split["size"])
        for name, split in raw["splits"].items()
    }
    out["params"] = tuple(
        ParamSpec(
            name=param["name"],
            shape=tuple(param["shape"]),
            dtype=param["dtype"],
            layout=param["layout"],
            sources=tuple(ParamSource(**source) for source in param["sources"]),
            unpacked_shape=None if param["unpacked_shape"] is None else tuple(param["unpacked_shape"]),
            interleave=param["interleave"],
        )
        for param in raw["params"]
    )
    return out
