"""Parameters of one rank on its GPU: read from the checkpoint, quantised where the library wants it, and packed.

The host copies each part once, into pinned memory, while the device takes the part before.
"""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import cupy
import ml_dtypes
import numpy as np
import tvm_ffi

from tpserve.proto.manifest import Manifest, ParamSpec
from tpserve.proto.rank import RankConfig
from tpserve.worker.arrays import Array
from tpserve.worker.checkpoint import Checkpoint
from tpserve.worker.kv_scales import kv_scales_of
from tpserve.worker.quantize import require_scaled, scale_spec
from tpserve.worker.weights import (
    copy_values,
    parts_of,
    rope_table,
    scales_of,
    shape_of_parts,
    shared_parameter,
)

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (parameters loaded, parameters in all)."""

PACKED_LAYOUT = "wgmma64x256g132"
_STAGING_BYTES = 32 << 20
_DUMMY_SCALE = 0.02
"""Of random weights: that of Hugging Face's initialisation, at which activations stay finite."""
_DUMMY_FP8_SCALE = 2.5e-4
"""Of random e4m3 codes, whose magnitudes go up to 240: the weights are then about as large as `_DUMMY_SCALE`."""
_DUMMY_PIECE = 1 << 26
BITS: dict[str, Any] = {"float32": np.float32, "bfloat16": np.uint16, "float8_e4m3fn": np.uint8, "int32": np.int32}
"""What CuPy, which has neither bfloat16 nor e4m3, stores a type in."""
_HOST: dict[str, Any] = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
}


def load_device_parameters(
    manifest: Manifest,
    config: RankConfig,
    kernels: Any,
    stream: Any,
    progress: Progress,
    target: tuple[Manifest, Sequence[Any]] | None = None,
) -> list[Any]:
    """Return the parameters in the manifest's order, as TVM tensors on the current device.

    Parameters
    ----------
    kernels
        The artifact's kernel library.
    stream
        The current CuPy stream, which the kernels use too.
    target
        Of a head: manifest and parameters of the model that it drafts for, some of which it takes.

    Raises
    ------
    WeightsError
        If a tensor is missing or its shape does not give the parameter's.
    """
    started = time.perf_counter()
    params: list[Any] = []
    loader = None if config.load_format == "dummy" else _Loader(manifest, config, kernels, stream)
    for spec in manifest.params:
        if spec.layout == "shared":
            params.append(shared_parameter(spec, target))
        elif loader is None:
            params.append(as_device_tensor(random_parameter(manifest, spec, config.rank), spec.dtype))
        else:
            params.append(loader.load(spec))
        progress(len(params), len(manifest.params))
    stream.synchronize()
    if loader is None:
        return params
    elapsed = time.perf_counter() - started
    logger.info("read %.2f GB in %.1f s, %.1f GB/s", loader.num_bytes / 1e9, elapsed, loader.num_bytes / 1e9 / elapsed)
    cupy.get_default_memory_pool().free_all_blocks()
    return params


class _Loader:
    def __init__(self, manifest: Manifest, config: RankConfig, kernels: Any, stream: Any) -> None:
        self._manifest = manifest
        self._rank = config.rank
        self._kernels = kernels
        self._checkpoint = Checkpoint(config.model_dir)
        self._uploader = _Uploader(stream)
        self._scale: Any = None
        """Of the e4m3 weight just loaded, for the parameter that comes next."""

    @property
    def num_bytes(self) -> int:
        """Read from the checkpoint."""
        return self._uploader.num_bytes

    def load(self, spec: ParamSpec) -> Any:
        if spec.layout == "rope_table":
            return as_device_tensor(cupy.asarray(rope_table(self._manifest)), spec.dtype)
        if spec.layout == "channel_scale":
            scale, self._scale = self._scale, None
            return scale
        if spec.layout == "kv_scale":
            return as_device_tensor(cupy.asarray(kv_scales_of(self._checkpoint, spec)), spec.dtype)
        if spec.dtype == "float8_e4m3fn":
            rows, self._scale = self._load_fp8(spec)
        else:
            rows = self._rows(spec, spec.dtype)
        if spec.layout != PACKED_LAYOUT:
            return rows
        packed = as_device_tensor(cupy.empty(spec.shape, BITS[spec.dtype]), spec.dtype)
        self._kernels["pack_weight"](rows, packed)
        return packed

    def _load_fp8(self, spec: ParamSpec) -> tuple[Any, Any]:
        """Return a weight's e4m3 rows and their scales: as they are stored, or quantised by each channel's largest."""
        shape = spec.unpacked_shape
        assert shape is not None
        stored = scales_of(self._checkpoint, self._manifest, scale_spec(spec), self._rank)
        if stored is not None:
            return self._rows(spec, spec.dtype), as_device_tensor(cupy.asarray(stored), "float32")
        require_scaled(self._checkpoint, spec)
        rows = self._rows(spec, "bfloat16")
        values = as_device_tensor(cupy.empty(shape, np.uint8), spec.dtype)
        scale = as_device_tensor(cupy.empty(shape[:1], np.float32), "float32")
        self._kernels["quantize_fp8"](rows, values, scale)
        return values, scale

    def _rows(self, spec: ParamSpec, dtype: str) -> Any:
        """Return this rank's rows in the parameter's order, converted to `dtype`."""
        shape = shape_of_parts(spec)
        parts = parts_of(self._checkpoint, self._manifest, spec, self._rank)
        covered = sum(part.values.size for part in parts) == math.prod(shape)
        target = (cupy.empty if covered else cupy.zeros)(shape, BITS[dtype])
        for part in parts:
            self._uploader.upload(part.values, target, part.row, part.column, dtype)
        return as_device_tensor(target.reshape(spec.unpacked_shape or spec.shape), dtype)


class _Uploader:
    """Two pinned buffers in turn: the host fills one while the device reads the other."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._staging = [pinned(_STAGING_BYTES, np.uint8) for _ in range(2)]
        self._events = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        self._next = 0
        self.num_bytes = 0

    def upload(self, values: Array, target: Any, row: int, column: int, dtype: str) -> None:
        """Copy (rows, columns) or (rows,) to a place in a device array of that many dimensions."""
        self.num_bytes += values.nbytes
        host = np.dtype(_HOST[dtype])
        rows = values if values.ndim == 2 else values.reshape(-1, 1)
        pitch = target.shape[1] * host.itemsize if target.ndim == 2 else host.itemsize
        width = rows.shape[1] * host.itemsize
        at_once = max(1, _STAGING_BYTES // width)
        for first in range(0, len(rows), at_once):
            piece = rows[first : first + at_once]
            staging, event = self._staging[self._next], self._events[self._next]
            self._next = 1 - self._next
            event.synchronize()
            copy_values(staging[: piece.size * host.itemsize].view(host).reshape(piece.shape), piece)
            cupy.cuda.runtime.memcpy2DAsync(
                target.data.ptr + (row + first) * pitch + column * host.itemsize,
                pitch,
                staging.ctypes.data,
                width,
                width,
                len(piece),
                cupy.cuda.runtime.memcpyHostToDevice,
                self._stream.ptr,
            )
            event.record(self._stream)


def random_parameter(manifest: Manifest, spec: ParamSpec, rank: int) -> Any:
    """Return a seeded random parameter made on the device, as it is stored; norms are ones, biases zeros."""
    if spec.layout == "rope_table":
        return cupy.asarray(rope_table(manifest))
    if spec.layout == "channel_scale":
        return cupy.full(spec.shape, _DUMMY_FP8_SCALE, cupy.float32)
    if len(spec.shape) == 1:
        return cupy.full(spec.shape, 0.0 if spec.name.endswith(".bias") else 1.0, cupy.float32)
    # Replicated parameters must be the same on every rank.
    split = any(part.split for part in spec.sources)
    rng = cupy.random.default_rng([zlib.crc32(spec.name.encode()), rank if split else 0])
    out = cupy.empty(spec.shape, BITS[spec.dtype])
    flat = out.reshape(-1)
    for start in range(0, flat.size, _DUMMY_PIECE):  # at once would need three times the memory
        piece = flat[start : start + _DUMMY_PIECE]
        if spec.dtype == "float8_e4m3fn":
            codes = rng.integers(0, 256, piece.shape, dtype=cupy.uint8)
            piece[...] = cupy.where((codes & 0x7F) > 0x77, codes & 0xBF, codes)  # no NaN, nothing over 240
        else:
            values = rng.standard_normal(piece.shape, dtype=cupy.float32) * cupy.float32(_DUMMY_SCALE)
            piece[...] = (values.view(cupy.uint32) >> 16).astype(cupy.uint16)  # towards zero: any bfloat16 will do
    return out


def as_device_tensor(array: Any, dtype: str) -> Any:
    """Return a TVM tensor over a CuPy array; types that CuPy lacks are stored there as integers of their size."""
    assert array.dtype == BITS[dtype], f"{array.dtype} does not store {dtype}"
    tensor = tvm_ffi.from_dlpack(array)
    return tensor if dtype == str(array.dtype) else tensor._create_view(array.shape, dtype=dtype)


def pinned(size: int, dtype: Any) -> Array:
    """Return page-locked host memory."""
    memory = cupy.cuda.alloc_pinned_memory(size * np.dtype(dtype).itemsize)
    return np.frombuffer(memory, dtype, size)
