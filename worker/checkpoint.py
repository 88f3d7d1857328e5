"""Safetensors files of a Hugging Face folder, memory-mapped: a rank touches only the bytes of its own shard.

Read here rather than by the safetensors package, which has no e4m3 in numpy and copies each slice it gives.
"""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tpserve.worker.arrays import Array
from tpserve.worker.errors import WeightsError

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "I8": np.int8,
    "BOOL": np.bool_,
}
_MAX_HEADER_BYTES = 100_000_000
"""As the format's own reader has it."""


class Checkpoint:
    """Tensors by name, as read-only views of the files."""

    def __init__(self, model_dir: Path) -> None:
        """Map the files.

        Raises
        ------
        WeightsError
            If a file is missing or corrupt.
        """
        self._model_dir = model_dir
        self._tensors: dict[str, Array] = {}
        self._file_of: dict[str, str] = {}
        index = model_dir / "model.safetensors.index.json"
        try:
            if index.is_file():
                self._file_of = json.loads(index.read_text())["weight_map"]
            for name in sorted(set(self._file_of.values())) or ["model.safetensors"]:
                self._tensors |= _map_file(model_dir / name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"cannot read the weights of {model_dir}: {error}") from None

    def __contains__(self, name: str) -> bool:
        """Return whether there is a tensor of that name."""
        return name in self._tensors

    def tensor(self, name: str) -> Array:
        """Return a tensor; it must not be written to.

        Raises
        ------
        WeightsError
            If the checkpoint has no such tensor.
        """
        if name in self._tensors:
            return self._tensors[name]
        if name in self._file_of:
            raise WeightsError(
                f"the checkpoint has no tensor {name!r} in {self._file_of[name]}, where its index says it is"
            )
        raise WeightsError(f"the checkpoint has no tensor {name!r}, which the library needs")


def _map_file(path: Path) -> dict[str, Array]:
    """Return the tensors of one file: 8 bytes of length, a JSON header of that length, then the data."""
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{path.name} has no safetensors header: it is cut off or of another format")
        header = json.loads(file.read(length))
        # Stays mapped for as long as an array of it lives.
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)[8 + length :]
    if not isinstance(header, dict):
        raise ValueError(f"the header of {path.name} is no object")
    header.pop("__metadata__", None)
    return {name: _view(path.name, name, data, entry) for name, entry in header.items()}


def _view(file: str, name: str, data: Array, entry: dict[str, Any]) -> Array:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name} in {file} has dtype {entry['dtype']}, expected one of {', '.join(_DTYPES)}")
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    if not 0 <= start <= stop <= len(data) or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} in {file} of shape {shape} has bytes {start} to {stop} of {len(data)}: it is cut off")
    raw = data[start:stop]
    if raw.ctypes.data % dtype.itemsize:
        raw = raw.copy()  # a header of odd length; the writers in use pad it
    tensor: Array = raw.view(dtype).reshape(shape)
    return tensor
