"""Scales of e4m3 KV pages, as checkpoints store them: one of keys and one of values for each layer."""

from __future__ import annotations

import math

import numpy as np

from tpserve.proto.manifest import ParamSpec
from tpserve.worker.arrays import Array
from tpserve.worker.checkpoint import Checkpoint
from tpserve.worker.errors import WeightsError

_SMALLEST = float(np.finfo(np.float32).tiny)
"""Of a smaller one the inverse, by which values are multiplied when they are stored, overflows."""


def kv_scales_of(checkpoint: Checkpoint, spec: ParamSpec) -> Array:
    """Return a layer's scales: a key or value is what is stored times its scale.

    Parameters
    ----------
    spec
        Of layout `kv_scale`. Beside its two sources, `<attention>.k_proj` and `<attention>.v_proj`, scales are looked
        for as `<attention>.k_scale` (compressed-tensors), `<attention>.k_proj.k_scale` (ModelOpt),
        `<attention>.k_proj.output_scale` (older compressed-tensors) and `<attention>.kv_scale` (of both).

    Returns
    -------
    (2,) float32, of keys and of values; ones where the checkpoint stores neither.

    Raises
    ------
    WeightsError
        If only one of them is stored, or one is not a single positive number.
    """
    found = [_stored(checkpoint, source.name) for source in spec.sources]
    if found == [None, None]:
        return np.ones(2, np.float32)
    for source, scale in zip(spec.sources, found, strict=True):
        if scale is None:
            raise WeightsError(
                f"the checkpoint has a scale of keys or of values, but none for {source.name}: give one with both or "
                "none, or compile with --kv-cache-dtype bfloat16"
            )
    return np.array(found, np.float32)


def _stored(checkpoint: Checkpoint, projection: str) -> float | None:
    attention, _, name = projection.rpartition(".")
    own = f"{name[0]}_scale"
    for candidate in (
        f"{attention}.{own}",
        f"{projection}.{own}",
        f"{projection}.output_scale",
        f"{attention}.kv_scale",
    ):
        if candidate not in checkpoint:
            continue
        values = checkpoint.tensor(candidate).astype(np.float32).reshape(-1)
        remedy = "give a checkpoint with one scale for each layer, or compile with --kv-cache-dtype bfloat16"
        if values.size != 1:
            raise WeightsError(f"{candidate} has {values.size} values, expected 1: {remedy}")
        scale = float(values[0])
        if not _SMALLEST <= scale < math.inf:
            raise WeightsError(f"{candidate} is {scale}, expected a positive number: {remedy}")
        return scale
    return None
