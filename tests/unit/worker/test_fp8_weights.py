"""e4m3 parameters on a CPU: quantised while they are loaded, read as they are stored, or random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tiny_models import MODELS
from tpserve.proto.manifest import Manifest
from tpserve.worker.arrays import as_array, as_tensor
from tpserve.worker.errors import WeightsError
from tpserve.worker.kv_cache import KVCache
from tpserve.worker.quantize import quantize_rows
from tpserve.worker.weights import dummy_parameters, load_parameters
from worker_builders import make_manifest

Array = Any
NAME = "llama_8q_1kv_biases"
LAYER = "model.layers.1"
BF16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    MODELS[NAME].write(tmp_path)
    return tmp_path


def load(manifest: Manifest, folder: Path, rank: int = 0) -> dict[str, Array]:
    names = [spec.name for spec in manifest.params]
    return dict(zip(names, load_parameters(manifest, folder, rank), strict=True))


def unpack(panels: Array) -> Array:
    """(N / 16, K, 16) -> (N, K) float64."""
    return panels.astype(np.float64).transpose(0, 2, 1).reshape(-1, panels.shape[1])


def test_rows_are_quantised_by_their_largest() -> None:
    rng = np.random.default_rng()
    rows = (rng.standard_normal((50, 96)) * np.exp(rng.uniform(-20, 20, (50, 1)))).astype(BF16)
    rows[7] = 0
    codes, scales = quantize_rows(rows)
    exact = rows.astype(np.float64)
    largest = np.maximum(np.abs(exact).max(1), 1e-12)
    np.testing.assert_allclose(scales, largest / 448, rtol=1e-6)
    assert (np.abs(codes.astype(np.float64)).max(1)[np.arange(50) != 7] == 448).all()
    assert not codes[7].astype(np.float64).any()
    # Half a unit of three bits of mantissa, or of the smallest magnitude.
    error = np.abs(codes.astype(np.float64) * scales[:, None] - exact)
    assert (error <= np.maximum(np.abs(exact) / 16, scales[:, None] * 2.0**-10) * (1 + 1e-5)).all()


def test_many_rows_are_quantised_in_pieces_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng().standard_normal((33, 64)).astype(BF16)
    codes, scales = quantize_rows(rows)
    monkeypatch.setattr("tpserve.worker.quantize._PIECE", 64 * 5)
    again, other = quantize_rows(rows)
    np.testing.assert_array_equal(again.view(np.uint8), codes.view(np.uint8))
    np.testing.assert_array_equal(other, scales)


@pytest.mark.parametrize("tp_size", [1, 2, 8])
def test_every_rank_has_its_part_of_the_weights(folder: Path, tp_size: int) -> None:
    quantised = make_manifest(folder, tp_size, quantization="fp8")
    plain = make_manifest(folder, tp_size, quantization="q0bf16")
    for rank in range(tp_size):
        found, expected = load(quantised, folder, rank), load(plain, folder, rank)
        assert {name for name in found if name.endswith(".scale")} == {
            f"model.layers.{i}.{name}.scale"
            for i in range(2)
            for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
        }
        for name, values in expected.items():
            assert found[name].ctypes.data % 64 == 0
            if f"{name}.scale" not in found:
                np.testing.assert_array_equal(found[name], values)
                continue
            assert found[name].dtype == E4M3
            rows = unpack(values)
            codes, scales = quantize_rows(rows.astype(BF16))
            np.testing.assert_array_equal(unpack(found[name]), codes.astype(np.float64))
            np.testing.assert_array_equal(found[f"{name}.scale"], scales)


def test_stored_codes_and_scales_are_taken_as_they_are(folder: Path) -> None:
    weights: dict[str, Array] = dict(MODELS[NAME].weights())
    rng = np.random.default_rng()
    stored: dict[str, tuple[Array, Array]] = {}
    tensors: dict[str, Array] = {}
    for name, values in weights.items():
        if "_proj.weight" not in name:
            tensors[name] = values
            continue
        codes = rng.integers(0, 0x7F, values.shape, dtype=np.uint8).view(E4M3)
        scales = rng.uniform(0.1, 2, (len(values), 1) if "q_proj" in name else (1,)).astype(np.float32)
        stored[name] = codes, np.broadcast_to(scales.ravel(), (len(values),))
        tensors[name], tensors[f"{name}_scale"] = codes, scales
    write(tensors, folder)
    found = load(make_manifest(folder, 1, quantization="fp8"), folder)
    for weight, parts in (("self_attn.qkv_proj", "qkv"), ("self_attn.o_proj", "o")):
        names = [f"{LAYER}.self_attn.{part}_proj.weight" for part in parts]
        codes, scales = (np.concatenate([stored[name][i] for name in names]) for i in range(2))
        np.testing.assert_array_equal(unpack(found[f"{LAYER}.{weight}"]), codes.astype(np.float64))
        np.testing.assert_array_equal(found[f"{LAYER}.{weight}.scale"], scales)
    for name in stored:
        del tensors[f"{name}_scale"]
    write(tensors, folder)
    with pytest.raises(WeightsError, match=r"q_proj\.weight is stored as e4m3, but the checkpoint has no scale of it"):
        load(make_manifest(folder, 1, quantization="fp8"), folder)


def write(tensors: dict[str, Array], folder: Path) -> None:
    """Write e4m3 too, which the package knows by name alone."""
    header, offset = {}, 0
    for name, values in tensors.items():
        kind = "F8_E4M3" if values.dtype == E4M3 else "F32"
        header[name] = {"dtype": kind, "shape": values.shape, "data_offsets": [offset, offset + values.nbytes]}
        offset += values.nbytes
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(values).tobytes() for values in tensors.values())
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_scales_of_pages_come_from_the_checkpoint(folder: Path) -> None:
    weights: dict[str, Array] = dict(MODELS[NAME].weights())
    weights[f"{LAYER}.self_attn.k_scale"] = np.array(0.5, np.float32)
    weights[f"{LAYER}.self_attn.v_scale"] = np.array(0.25, np.float32)
    save_file(weights, folder / "model.safetensors")
    found = load(make_manifest(folder, 1, kv_cache_dtype="fp8"), folder)
    assert found[f"{LAYER}.self_attn.kv_scale"].tolist() == [0.5, 0.25]
    assert found["model.layers.0.self_attn.kv_scale"].tolist() == [1.0, 1.0]


def test_random_weights_have_a_size_that_keeps_activations_finite(folder: Path) -> None:
    manifest = make_manifest(folder, 2, quantization="fp8", kv_cache_dtype="fp8")
    names = [spec.name for spec in manifest.params]
    first, again = (dict(zip(names, dummy_parameters(manifest, 1), strict=True)) for _ in range(2))
    for spec in manifest.params:
        assert first[spec.name].dtype == np.dtype(spec.dtype)
        assert first[spec.name].tobytes() == again[spec.name].tobytes()
        if spec.dtype == "float8_e4m3fn":
            values = unpack(first[spec.name]) * first[f"{spec.name}.scale"][:, None]
            assert values.std() == pytest.approx(spec.shape[1] ** -0.5, rel=0.05)
    assert first[f"{LAYER}.self_attn.kv_scale"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("quantization", ["q0bf16", "fp8"])
def test_pages_of_every_type_are_the_librarys_memory(folder: Path, quantization: Any) -> None:
    manifest = make_manifest(folder, 1, quantization=quantization, kv_cache_dtype="fp8")
    cache = KVCache(manifest.kv, 3)
    view = as_array(cache.layers[1])
    assert (view.dtype, view.shape) == (E4M3, manifest.kv.layer_shape(3))
    view[2] = 1.5
    assert (as_array(cache.layers[1])[2].astype(np.float32) == 1.5).all()
    assert not as_array(cache.layers[0]).astype(np.float32).any()
    assert as_array(as_tensor(np.ones((2, 3), np.float32))).dtype == np.float32
