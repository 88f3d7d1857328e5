"""Parameters of one rank: which parts of the checkpoint fill them, and their layouts on a CPU.

The manifest says which blocks of which tensors make a parameter; `worker.device_weights` brings the same to a GPU.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tpserve.proto.manifest import Manifest, ParamSource, ParamSpec
from tpserve.worker.arrays import Array, aligned_empty
from tpserve.worker.checkpoint import Checkpoint
from tpserve.worker.errors import WeightsError
from tpserve.worker.kv_scales import kv_scales_of
from tpserve.worker.quantize import E4M3_MAX, quantize_rows, require_scaled, scale_spec

_DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
}
_DUMMY_FP8_RANGE = 64.0
"""Of random e4m3 weights: standard normal values times it are stored, so that hardly any is clipped."""


@dataclass(frozen=True, slots=True)
class Part:
    """A block of a parameter that the checkpoint gives; what no part covers is zero."""

    row: int
    column: int
    values: Array
    """(rows, columns), or (rows,) of a vector: a view of the checkpoint. Its place is one in `shape_of_parts`."""


def shared_parameter(spec: ParamSpec, target: tuple[Manifest, Sequence[Any]] | None) -> Any:
    """Return the parameter of a head's target that the head takes.

    Parameters
    ----------
    target
        Manifest and parameters of the target.

    Raises
    ------
    WeightsError
        If it has none like that.
    """
    if target is None:
        raise WeightsError(f"{spec.name} is its target's: a head cannot be loaded alone")
    manifest, params = target
    for own, tensor in zip(manifest.params, params, strict=True):
        if replace(own, sources=(), layout="shared") == spec:
            return tensor
    raise WeightsError(
        f"the head takes the model's {spec.name} as {spec.shape} {spec.dtype}, which the model does not have: compile "
        "the head again, with the model as --target-model and by its --quantization"
    )


def shape_of_parts(spec: ParamSpec) -> tuple[int, ...]:
    """Return the shape in which `parts_of` places its parts: the parameter's before packing, reshaped.

    Interleaved rows stand side by side, `interleave` of both halves in one, so that a part is a block there too:

        row i:  | rows i * n to (i + 1) * n of the first half | the same rows of the second half |
    """
    shape = spec.unpacked_shape or spec.shape
    if spec.interleave == 0:
        return shape
    width = 2 * spec.interleave
    if shape[0] % width:
        raise WeightsError(f"{spec.name}: {shape[0]} rows are not interleaved by {spec.interleave}: compile again")
    return (shape[0] // width, width * math.prod(shape[1:]))


def parts_of(checkpoint: Checkpoint, manifest: Manifest, spec: ParamSpec, rank: int) -> list[Part]:
    """Return what fills a parameter of this rank, with places in an array of `shape_of_parts`.

    Raises
    ------
    WeightsError
        If a tensor is missing or its shape does not give the parameter's.
    """
    expected = spec.unpacked_shape or spec.shape
    parts: list[Part] = []
    row = 0
    for source in spec.sources:
        given = _blocks_of(checkpoint.tensor(source.name), manifest, source, rank, row)
        if given.row_shape != expected[1:]:
            raise WeightsError(
                f"{source.name}: the checkpoint gives rows of {given.row_shape}, the library takes {expected[1:]}"
            )
        parts += given.parts
        row += given.rows
    if row != expected[0]:
        names = ", ".join(source.name for source in spec.sources)
        raise WeightsError(f"{spec.name}: {names} give {row} rows, the library takes {expected}")
    return _interleaved(spec, parts)


def scales_of(checkpoint: Checkpoint, manifest: Manifest, spec: ParamSpec, rank: int) -> Array | None:
    """Return the stored scales of the e4m3 weight that a `channel_scale` belongs to; None if it stores none.

    Returns
    -------
    (rows,) float32, one for each output channel: a scale of a whole tensor is repeated. Zero channels have 1.

    Raises
    ------
    WeightsError
        If only some of the weight's tensors have scales, or a scale's shape fits neither.
    """
    names = [f"{source.name}_scale" for source in spec.sources]
    missing = [name for name in names if name not in checkpoint]
    if len(missing) == len(names):
        return None
    if missing:
        raise WeightsError(f"{spec.name}: the checkpoint has no {missing[0]!r}, but has other scales of this weight")
    out = np.ones(shape_of_parts(spec), np.float32)
    row = 0
    for source, name in zip(spec.sources, names, strict=True):
        stored = checkpoint.tensor(name).astype(np.float32).reshape(-1)
        channels = checkpoint.tensor(source.name).shape[0]
        if len(stored) not in (1, channels):
            raise WeightsError(f"{name} has {len(stored)} values, expected 1 or one for each of {channels} channels")
        whole = np.broadcast_to(stored, (channels,))
        # Of a weight that is split along its columns, every rank has all channels.
        blocks = _blocks_of(whole, manifest, source if source.axis == 0 else ParamSource(source.name), rank, row)
        for part in _interleaved(spec, blocks.parts):
            out[_place(part)] = part.values
        row += blocks.rows
    return out.reshape(spec.shape)


def load_parameters(manifest: Manifest, model_dir: Path, rank: int) -> Iterator[Array]:
    """Yield this rank's own parameters in the manifest's order, as a CPU's kernels read them.

    Raises
    ------
    WeightsError
        If a tensor is missing or its shape does not give the parameter's.
    """
    checkpoint = Checkpoint(model_dir)
    scale: Array | None = None  # of the e4m3 weight just loaded
    for spec in own_parameters(manifest):
        if spec.layout == "rope_table":
            yield rope_table(manifest)
        elif spec.layout == "kv_scale":
            yield _aligned_copy(kv_scales_of(checkpoint, spec))
        elif spec.layout == "channel_scale":
            assert scale is not None, f"{spec.name} follows no e4m3 weight"
            yield _aligned_copy(scale)
            scale = None
        elif spec.dtype == "float8_e4m3fn":
            rows, scale = _load_fp8(checkpoint, manifest, spec, rank)
            yield pack(spec, rows)
        else:
            yield pack(spec, _load_rows(checkpoint, manifest, spec, rank, spec.dtype))


def _load_rows(checkpoint: Checkpoint, manifest: Manifest, spec: ParamSpec, rank: int, dtype: str) -> Array:
    rows = np.zeros(shape_of_parts(spec), _DTYPES[dtype])
    for part in parts_of(checkpoint, manifest, spec, rank):
        copy_values(rows[_place(part)], part.values)
    return rows.reshape(spec.unpacked_shape or spec.shape)


def _load_fp8(checkpoint: Checkpoint, manifest: Manifest, spec: ParamSpec, rank: int) -> tuple[Array, Array]:
    """Return a weight's e4m3 rows and their scales: as they are stored, or quantised by each channel's largest."""
    stored = scales_of(checkpoint, manifest, scale_spec(spec), rank)
    if stored is not None:
        return _load_rows(checkpoint, manifest, spec, rank, spec.dtype), stored
    require_scaled(checkpoint, spec)
    # By way of bfloat16, as on a GPU: both hold the same codes.
    return quantize_rows(_load_rows(checkpoint, manifest, spec, rank, "bfloat16"))


def _aligned_copy(values: Array) -> Array:
    out = aligned_empty(values.shape, values.dtype)
    out[...] = values
    return out


def own_parameters(manifest: Manifest) -> list[ParamSpec]:
    """Return the parameters that are not shared with another model's."""
    return [spec for spec in manifest.params if spec.layout != "shared"]


def dummy_parameters(manifest: Manifest, rank: int) -> Iterator[Array]:
    """Yield seeded random parameters, scaled so that activations stay finite; norms are ones, biases zeros."""
    columns = 0
    for spec in own_parameters(manifest):
        if spec.layout == "rope_table":
            yield rope_table(manifest)
        elif len(spec.shape) == 1:
            vector = aligned_empty(spec.shape, _DTYPES[spec.dtype])
            vector.fill(0.0 if spec.name.endswith(".bias") else 1.0)
            if spec.layout == "channel_scale":  # of the weight just before
                vector.fill(columns**-0.5 / _DUMMY_FP8_RANGE)
            yield vector
        else:
            # Replicated parameters must be the same on every rank.
            split = any(source.split for source in spec.sources)
            rng = np.random.default_rng([zlib.crc32(spec.name.encode()), rank if split else 0])
            columns = spec.shape[1]
            is_fp8 = spec.dtype == "float8_e4m3fn"
            values = rng.standard_normal(spec.shape, dtype=np.float32)
            values *= np.float32(_DUMMY_FP8_RANGE if is_fp8 else columns**-0.5)
            if is_fp8:
                values.clip(-E4M3_MAX, E4M3_MAX, out=values)
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
    """Bring a parameter's rows into its shape and layout on a CPU.

    Raises
    ------
    WeightsError
        If there are other rows than the parameter's.
    """
    expected = spec.unpacked_shape or spec.shape
    if rows.shape != expected:
        raise WeightsError(f"{spec.name}: the checkpoint gives {rows.shape}, the library takes {expected}")
    out = aligned_empty(spec.shape, _DTYPES[spec.dtype])
    if spec.layout == "panel16":
        panels, columns, lanes = spec.shape
        rows = rows.reshape(panels, lanes, columns).transpose(0, 2, 1)
    copy_values(out, rows)
    return out


def copy_values(target: Array, values: Array) -> None:
    """Copy and convert; numpy copies integers faster than its extension types."""
    if values.dtype == target.dtype and target.dtype.itemsize == 2:
        target.view(np.uint16)[...] = values.view(np.uint16)
    else:
        target[...] = values


def _place(part: Part) -> tuple[slice, ...]:
    return tuple(
        slice(start, start + size) for start, size in zip((part.row, part.column), part.values.shape, strict=False)
    )


def _interleaved(spec: ParamSpec, parts: list[Part]) -> list[Part]:
    """Bring parts of whole rows to their places in `shape_of_parts`."""
    if spec.interleave == 0:
        return parts
    size = spec.interleave
    half = (spec.unpacked_shape or spec.shape)[0] // 2
    out: list[Part] = []
    for part in parts:
        index, row = divmod(part.row, half)
        count, columns = len(part.values), math.prod(part.values.shape[1:])
        if row % size or row + count > half or part.column:
            raise WeightsError(
                f"{spec.name}: {count} rows from {part.row} on are not interleaved by {size} in halves of {half}: "
                "compile again"
            )
        column = index * size * columns
        whole = count // size * size
        if whole:
            out.append(Part(row // size, column, part.values[:whole].reshape(-1, size * columns)))
        if whole < count:
            out.append(Part((row + whole) // size, column, part.values[whole:].reshape(1, -1)))
    return out


@dataclass(frozen=True, slots=True)
class _Blocks:
    """One rank's part of a tensor."""

    parts: list[Part]
    rows: int
    """That it takes, zeros included."""
    row_shape: tuple[int, ...]


def _blocks_of(tensor: Array, manifest: Manifest, source: ParamSource, rank: int, row: int) -> _Blocks:
    """Return this rank's part of a tensor, to stand at `row` of a parameter."""
    if source.axis is None or source.split is None:
        return _Blocks([Part(row, 0, tensor)], tensor.shape[0], tensor.shape[1:])
    split = manifest.splits[source.split]
    if tensor.ndim <= source.axis or tensor.shape[source.axis] != split.size:
        raise WeightsError(
            f"{source.name}: the checkpoint gives {tensor.shape}, "
            f"the library takes {split.size} in dimension {source.axis}"
        )
    parts: list[Part] = []
    for index, block in enumerate(split.ranks[rank]):
        start = split.size if block is None else min(block * split.block, split.size)
        stop = min(start + split.block, split.size)
        at = index * split.block
        if stop == start:
            continue
        parts.append(
            Part(row + at, 0, tensor[start:stop]) if source.axis == 0 else Part(row, at, tensor[:, start:stop])
        )
    extent = split.block * len(split.ranks[rank])
    return _Blocks(parts, *((extent, tensor.shape[1:]) if source.axis == 0 else (tensor.shape[0], (extent,))))
