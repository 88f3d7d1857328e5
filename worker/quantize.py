"""Weights as e4m3 with a scale for each output channel: what a checkpoint must have, and rows quantised on a CPU."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from tpserve.proto.manifest import ParamSpec
from tpserve.worker.arrays import Array
from tpserve.worker.checkpoint import Checkpoint
from tpserve.worker.errors import WeightsError

E4M3_MAX = 448.0
_SMALLEST_LARGEST = np.float32(1e-12)
"""What a row has for its largest magnitude at least, so that a row of zeros has a finite scale."""
_PIECE = 1 << 22
"""Elements widened at once."""


def quantize_rows(rows: Array) -> tuple[Array, Array]:
    """Quantise each row by its largest magnitude, which becomes 448: rounded to nearest even, as a GPU does it.

    Parameters
    ----------
    rows : (N, K) bfloat16

    Returns
    -------
    codes : (N, K) e4m3
    scales : (N,) float32
        A value is its code times the scale of its row.
    """
    codes = np.empty(rows.shape, ml_dtypes.float8_e4m3fn)
    scales = np.empty(len(rows), np.float32)
    at_once = max(1, _PIECE // max(1, rows.shape[1]))
    for first in range(0, len(rows), at_once):
        piece = rows[first : first + at_once].astype(np.float32)
        largest = np.maximum(np.abs(piece).max(axis=1, initial=0.0), _SMALLEST_LARGEST)
        scales[first : first + at_once] = largest / np.float32(E4M3_MAX)
        piece *= (np.float32(E4M3_MAX) / largest)[:, None]
        # 448 / largest is rounded: times largest it may be a little more.
        codes[first : first + at_once] = piece.clip(-E4M3_MAX, E4M3_MAX)
    return codes, scales


def scale_spec(spec: ParamSpec) -> ParamSpec:
    """Return the `channel_scale` that belongs to an e4m3 weight."""
    assert spec.unpacked_shape is not None
    return ParamSpec(
        f"{spec.name}.scale",
        spec.unpacked_shape[:1],
        "float32",
        "channel_scale",
        spec.sources,
        interleave=spec.interleave,
    )


def require_scaled(checkpoint: Checkpoint, spec: ParamSpec) -> None:
    """Refuse an e4m3 weight that the checkpoint stores as e4m3 without scales.

    Raises
    ------
    WeightsError
        Naming the tensor.
    """
    if any(checkpoint.tensor(source.name).dtype == ml_dtypes.float8_e4m3fn for source in spec.sources):
        raise WeightsError(f"{spec.sources[0].name} is stored as e4m3, but the checkpoint has no scale of it")
