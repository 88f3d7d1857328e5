"""Scales of e4m3 KV pages: where checkpoints have them, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tpserve.proto.manifest import ParamSource, ParamSpec
from tpserve.worker.checkpoint import Checkpoint
from tpserve.worker.errors import WeightsError
from tpserve.worker.kv_scales import kv_scales_of

LAYER = "model.layers.3.self_attn"
SPEC = ParamSpec(
    f"{LAYER}.kv_scale", (2,), "float32", "kv_scale", (ParamSource(f"{LAYER}.k_proj"), ParamSource(f"{LAYER}.v_proj"))
)


def scales(folder: Path, **stored: object) -> list[float]:
    """Scales of the layer, from tensors by the rest of their names, `__` for a dot."""
    tensors = {f"{LAYER}.{name.replace('__', '.')}": np.array(value, np.float32) for name, value in stored.items()}
    tensors["model.layers.30.self_attn.k_scale"] = np.array(9, np.float32)  # of another layer
    save_file(tensors, folder / "model.safetensors")
    found = kv_scales_of(Checkpoint(folder), SPEC)
    assert found.dtype == np.float32
    assert found.shape == (2,)
    return [float(value) for value in found]


def test_a_checkpoint_without_scales_has_ones(tmp_path: Path) -> None:
    assert scales(tmp_path) == [1.0, 1.0]


def test_scales_are_found_under_every_name(tmp_path: Path) -> None:
    assert scales(tmp_path, k_scale=0.5, v_scale=0.25) == [0.5, 0.25]
    assert scales(tmp_path, k_proj__k_scale=[0.5], v_proj__v_scale=[0.25]) == [0.5, 0.25]
    assert scales(tmp_path, k_proj__output_scale=0.5, v_proj__output_scale=0.25) == [0.5, 0.25]
    assert scales(tmp_path, kv_scale=[[0.125]]) == [0.125, 0.125]


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan"), 1e-39])
def test_a_scale_that_is_no_positive_number_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(WeightsError, match=rf"{LAYER}\.v_scale is \S+, expected a positive number: give a checkpoint"):
        scales(tmp_path, k_scale=1.0, v_scale=value)


def test_scales_by_head_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=rf"{LAYER}\.k_scale has 8 values, expected 1: .* or compile with"):
        scales(tmp_path, k_scale=np.ones(8), v_scale=np.ones(8))


def test_one_scale_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=rf"but none for {LAYER}\.k_proj: give one with both or none"):
        scales(tmp_path, v_scale=0.5)
