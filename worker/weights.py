"""Parameters of one rank: its shard of the checkpoint, in the layout that the library's kernels read.

The manifest says which blocks of which tensors make a parameter; safetensors are memory-mapped, so a rank reads only
its own blocks.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from tpserve.proto.manifest import Manifest, ParamSource, ParamSpec
from tpserve.worker.arrays import Array, aligned_empty
from tpserve.worker.errors import WeightsError

_DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


class Checkpoint:
    """Safetensors files of a Hugging Face folder, memory-mapped; close it after loading."""

    def __init__(self, model_dir: Path) -> None:
        """Open the files.

        Raises
        ------
        WeightsError
            If a file is missing or corrupt.
        """
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        index = model_dir / "model.safetensors.index.json"
        try:
            if index.is_file():
                self._file_of = json.loads(index.read_text())["weight_map"]
            names = sorted(set(self._file_of.values())) or ["model.safetensors"]
            for name in names:
                self._files[name] = self._stack.enter_context(safe_open(model_dir / name, framework="numpy"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            self.close()
            raise WeightsError(f"cannot read the weights of {model_dir}: {error}") from None
        if not self._file_of:
            self._file_of = dict.fromkeys(self._files["model.safetensors"].keys(), "model.safetensors")

    def close(self) -> None:
        """Unmap the files."""
        self._stack.close()

    def slice_of(self, name: str) -> Any:
        """Return the lazy slice of a tensor.

        Raises
        ------
        WeightsError
            If the checkpoint has no such tensor.
        """
        if name not in self._file_of:
            raise WeightsError(f"the checkpoint has no tensor {name!r}, which the library needs")
        file = self._file_of[name]
        try:
            return self._files[file].get_slice(name)
        except SafetensorError:
            raise WeightsError(f"the checkpoint has no tensor {name!r} in {file}, where its index says it is") from None


def load_parameters(manifest: Manifest, model_dir: Path, rank: int) -> Iterator[Array]:
    """Yield this rank's parameters in the manifest's order.

    Raises
    ------
    WeightsError
        If a tensor is missing or its shape does not give the parameter's.
    """
    checkpoint = Checkpoint(model_dir)
    try:
        for spec in manifest.params:
            if spec.layout == "rope_table":
                yield rope_table(manifest)
                continue
            parts = [_read(checkpoint, manifest, source, rank) for source in spec.sources]
            expected = spec.unpacked_shape or spec.shape
            for source, part in zip(spec.sources, parts, strict=True):
                if part.shape[1:] != expected[1:]:
                    raise WeightsError(
                        f"{source.name}: the checkpoint gives {part.shape}, the library takes rows of {expected[1:]}"
                    )
            yield pack(spec, np.concatenate(parts))
    finally:
        checkpoint.close()


def dummy_parameters(manifest: Manifest, rank: int) -> Iterator[Array]:
    """Yield seeded random parameters, scaled so that activations stay finite; norms are ones, biases zeros."""
    for spec in manifest.params:
        if spec.layout == "rope_table":
            yield rope_table(manifest)
        elif len(spec.shape) == 1:
            vector = aligned_empty(spec.shape, _DTYPES[spec.dtype])
            vector.fill(0.0 if spec.name.endswith(".bias") else 1.0)
            yield vector
        else:
            # Replicated parameters must be the same on every rank.
            split = any(source.split for source in spec.sources)
            rng = np.random.default_rng([zlib.crc32(spec.name.encode()), rank if split else 0])
            columns = spec.shape[1]
            values = rng.standard_normal(spec.shape, dtype=np.float32) * np.float32(columns**-0.5)
            out = aligned_empty(spec.shape, _DTYPES[spec.dtype])
            out[...] = values
            yield out


def rope_table(manifest: Manifest) -> Array:
    """Return (max_model_len, head_dim) float32: cosines of each position and frequency, then sines."""
    inv_freq = np.asarray(manifest.rope_inv_freq, np.float32)
    angles = np.arange(manifest.max_model_len, dtype=np.float32)[:, None] * inv_freq  # (max_model_len, head_dim / 2)
    out = aligned_empty((manifest.max_model_len, 2 * len(inv_freq)), np.float32)
    np.concatenate([np.cos(angles), np.sin(angles)], axis=1, out=out)
    return out


def pack(spec: ParamSpec, rows: Array) -> Array:
    """Bring concatenated checkpoint rows into the parameter's shape, dtype and layout.

    Raises
    ------
    WeightsError
        If the shapes do not agree.
    """
    expected = spec.unpacked_shape or spec.shape
    if rows.shape != expected:
        raise WeightsError(f"{spec.name}: the checkpoint gives {rows.shape}, the library takes {expected}")
    if spec.layout == "wgmma64x256g132":
        return np.ascontiguousarray(rows.astype(_DTYPES[spec.dtype], copy=False))  # the device packs
    out = aligned_empty(spec.shape, _DTYPES[spec.dtype])
    if spec.layout == "panel16":
        panels, columns, lanes = spec.shape
        rows = rows.reshape(panels, lanes, columns).transpose(0, 2, 1)
        if rows.dtype == out.dtype and out.dtype.itemsize == 2:
            out.view(np.uint16)[...] = rows.view(np.uint16)  # numpy copies integers faster than its extension types
            return out
    out[...] = rows
    return out


def _read(checkpoint: Checkpoint, manifest: Manifest, source: ParamSource, rank: int) -> Array:
    """Return this rank's part of one tensor, zero blocks included."""
    tensor = checkpoint.slice_of(source.name)
    if source.axis is None or source.split is None:
        whole: Array = tensor[:]
        return whole
    split = manifest.splits[source.split]
    shape = tensor.get_shape()
    if len(shape) <= source.axis or shape[source.axis] != split.size:
        raise WeightsError(
            f"{source.name}: the checkpoint gives {tuple(shape)}, "
            f"the library takes {split.size} in dimension {source.axis}"
        )
    parts: list[Array] = []
    for block in split.ranks[rank]:
        start = split.size if block is None else min(block * split.block, split.size)
        stop = min(start + split.block, split.size)
        if stop > start:
            parts.append(tensor[start:stop] if source.axis == 0 else tensor[:, start:stop])
        if stop - start < split.block:
            missing = list(shape)
            missing[source.axis] = split.block - (stop - start)
            parts.append(np.zeros(missing, tensor[0:1].dtype))
    return np.concatenate(parts, axis=source.axis)
