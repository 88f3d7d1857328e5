"""A rank's parameters: what is read from the checkpoint, how it is packed, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tiny_models import MODELS
from tpserve.proto.manifest import Manifest, ParamSource, ParamSpec
from tpserve.worker.checkpoint import Checkpoint
from tpserve.worker.errors import WeightsError
from tpserve.worker.weights import (
    dummy_parameters,
    load_parameters,
    pack,
    parts_of,
    rope_table,
    scales_of,
    shape_of_parts,
)
from worker_builders import make_manifest

Array = Any
NAME = "llama_8q_1kv_biases"
LAYER = "model.layers.1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    MODELS[NAME].write(tmp_path)
    return tmp_path


def unpack(panels: Array) -> Array:
    """(N / 16, K, 16) -> (N, K)."""
    return panels.transpose(0, 2, 1).reshape(-1, panels.shape[1])


def load(manifest: Manifest, folder: Path) -> list[dict[str, Array]]:
    """Parameters by name, for each rank."""
    names = [spec.name for spec in manifest.params]
    return [dict(zip(names, load_parameters(manifest, folder, rank), strict=True)) for rank in range(manifest.tp_size)]


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_partial_products_of_all_ranks_sum_to_the_whole(folder: Path, tp_size: int) -> None:
    """Attention's and the MLP's linear parts, with exact integers in place of the activations."""
    weights = MODELS[NAME].weights()
    manifest = make_manifest(folder, tp_size)
    ranks = load(manifest, folder)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 128))
    gate = x @ weights[f"{LAYER}.mlp.gate_proj.weight"].T + weights[f"{LAYER}.mlp.gate_proj.bias"]
    up = x @ weights[f"{LAYER}.mlp.up_proj.weight"].T + weights[f"{LAYER}.mlp.up_proj.bias"]
    expected = (gate * up) @ weights[f"{LAYER}.mlp.down_proj.weight"].T + weights[f"{LAYER}.mlp.down_proj.bias"]
    total = np.zeros_like(expected)
    for rank in ranks:
        both = x @ unpack(rank[f"{LAYER}.mlp.gate_up_proj"]).T + rank[f"{LAYER}.mlp.gate_up_proj.bias"]
        g, u = np.split(both, 2, axis=1)
        total += (g * u) @ unpack(rank[f"{LAYER}.mlp.down_proj"]).T + rank[f"{LAYER}.mlp.down_proj.bias"]
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)
    q = x @ weights[f"{LAYER}.self_attn.q_proj.weight"].T + weights[f"{LAYER}.self_attn.q_proj.bias"]
    expected = q @ weights[f"{LAYER}.self_attn.o_proj.weight"].T + weights[f"{LAYER}.self_attn.o_proj.bias"]
    total = np.zeros_like(expected)
    for rank in ranks:
        qkv = x @ unpack(rank[f"{LAYER}.self_attn.qkv_proj"]).T + rank[f"{LAYER}.self_attn.qkv_proj.bias"]
        local_q = qkv[:, : manifest.num_q_heads * 16]
        total += local_q @ unpack(rank[f"{LAYER}.self_attn.o_proj"]).T + rank[f"{LAYER}.self_attn.o_proj.bias"]
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tp_size", [1, 8])
def test_vocabulary_rows_are_in_order_and_padded_with_zeros(folder: Path, tp_size: int) -> None:
    weights = MODELS[NAME].weights()
    head = np.concatenate([unpack(rank["lm_head"]) for rank in load(make_manifest(folder, tp_size), folder)])
    np.testing.assert_array_equal(head[:203], weights["lm_head.weight"])
    assert not head[203:].any()


def test_parameters_are_aligned_and_contiguous(folder: Path) -> None:
    manifest = make_manifest(folder, 2)
    for parameters in (load_parameters(manifest, folder, 1), dummy_parameters(manifest, 1)):
        for spec, array in zip(manifest.params, parameters, strict=True):
            assert array.ctypes.data % 64 == 0, spec.name
            assert array.flags.c_contiguous
            assert array.shape == spec.shape
            assert array.dtype == np.dtype(spec.dtype)


def test_weights_are_narrowed_to_what_the_library_takes(folder: Path) -> None:
    exact = make_manifest(folder, 1)
    narrow = make_manifest(folder, 1, quantization="q0bf16")
    name = f"{LAYER}.mlp.down_proj"
    (whole,), (rounded,) = load(exact, folder), load(narrow, folder)
    assert rounded[name].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(rounded[name], whole[name].astype(ml_dtypes.bfloat16))
    assert rounded["model.norm.weight"].dtype == np.float32


def test_bfloat16_checkpoints_keep_their_bits(folder: Path) -> None:
    weights = {name: array.astype(ml_dtypes.bfloat16) for name, array in MODELS[NAME].weights().items()}
    save_file(weights, folder / "model.safetensors")
    (rank,) = load(make_manifest(folder, 1, quantization="q0bf16"), folder)
    np.testing.assert_array_equal(unpack(rank["lm_head"])[:203], weights["lm_head.weight"])


def test_sharded_checkpoints_are_read_by_their_index(folder: Path) -> None:
    manifest = make_manifest(folder, 2)
    whole = load(manifest, folder)
    weights = MODELS[NAME].weights()
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    for one, two in zip(whole, load(manifest, folder), strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])
    (folder / "b.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"cannot read the weights of .*b\.safetensors"):
        load(manifest, folder)
    # A file that lacks what the index says it has.
    save_file({"other": np.zeros(1, np.float32)}, folder / "b.safetensors")
    with pytest.raises(WeightsError, match=r"the checkpoint has no tensor '.*' in b\.safetensors"):
        load(manifest, folder)
    for broken in ('{"weight_map": ["a"]}', "[]", "{", '{"weight_map": {"x": 3}}'):
        (folder / "model.safetensors.index.json").write_text(broken)
        with pytest.raises(WeightsError, match="cannot read the weights of"):
            load(manifest, folder)


def test_missing_and_corrupt_files_are_named(folder: Path) -> None:
    manifest = make_manifest(folder, 1)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for corrupt in (whole[:-100], whole[:20], b"", b"x" * 200):
        file.write_bytes(corrupt)
        with pytest.raises(WeightsError, match="cannot read the weights of"):
            load(manifest, folder)
    file.unlink()
    with pytest.raises(WeightsError, match=f"cannot read the weights of {folder}"):
        load(manifest, folder)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (f"{LAYER}.self_attn.q_proj.weight", (96, 128)),  # fewer heads
        (f"{LAYER}.self_attn.q_proj.weight", (144, 128)),  # more
        (f"{LAYER}.self_attn.k_proj.weight", (16, 64)),  # other columns than q and v
        (f"{LAYER}.self_attn.o_proj.weight", (128, 96)),
        (f"{LAYER}.self_attn.o_proj.bias", (64,)),
        (f"{LAYER}.mlp.gate_proj.weight", (299, 128)),
        (f"{LAYER}.mlp.down_proj.weight", (128, 301)),
        (f"{LAYER}.mlp.down_proj.weight", (128,)),
        (f"{LAYER}.mlp.up_proj.bias", (300, 1)),
        ("lm_head.weight", (202, 128)),
        ("model.embed_tokens.weight", (204, 128)),
        ("model.norm.weight", (64,)),
    ],
)
@pytest.mark.parametrize("tp_size", [1, 4])
def test_a_wrong_shape_is_refused_by_every_rank(folder: Path, name: str, shape: tuple[int, ...], tp_size: int) -> None:
    weights = MODELS[NAME].weights() | {name: np.zeros(shape, np.float32)}
    save_file(weights, folder / "model.safetensors")
    manifest = make_manifest(folder, tp_size)
    for rank in range(tp_size):
        with pytest.raises(WeightsError, match=re.escape(name)):
            list(load_parameters(manifest, folder, rank))


def test_a_missing_tensor_is_named(folder: Path) -> None:
    weights = MODELS[NAME].weights()
    del weights[f"{LAYER}.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"the checkpoint has no tensor '{LAYER}\.mlp\.up_proj\.weight'"):
        load(make_manifest(folder, 1), folder)


def test_dummy_weights_are_the_same_where_ranks_hold_the_same(folder: Path) -> None:
    manifest = make_manifest(folder, 4)
    ranks = [list(dummy_parameters(manifest, rank)) for rank in range(4)]
    again = list(dummy_parameters(manifest, 2))
    for i, spec in enumerate(manifest.params):
        assert np.isfinite(ranks[0][i].astype(np.float32)).all()
        np.testing.assert_array_equal(ranks[2][i], again[i])
        split = any(source.split for source in spec.sources) and len(spec.shape) > 1
        assert np.array_equal(ranks[0][i], ranks[3][i]) == (not split), spec.name


def test_the_rope_table_holds_cosines_then_sines(folder: Path) -> None:
    manifest = replace(make_manifest(folder, 1), max_model_len=40)
    table = rope_table(manifest)
    angles = np.outer(np.arange(40), np.asarray(manifest.rope_inv_freq))
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, np.concatenate([np.cos(angles), np.sin(angles)], axis=1), atol=3e-6)


def test_panels_hold_sixteen_rows_side_by_side() -> None:
    rows = np.arange(32 * 3, dtype=np.float32).reshape(32, 3)
    spec = ParamSpec("w", (2, 3, 16), "float32", "panel16", (ParamSource("w"),), (32, 3))
    packed = pack(spec, rows)
    for row in range(32):
        np.testing.assert_array_equal(packed[row // 16, :, row % 16], rows[row])
    with pytest.raises(WeightsError, match=r"w: the checkpoint gives \(31, 3\), the library takes \(32, 3\)"):
        pack(spec, rows[:31])


def fp8_folder(folder: Path, *, per_tensor: bool = False) -> dict[str, Array]:
    """Store the layers' weights as e4m3 with scales, as quantised checkpoints do; return what was stored."""
    stored: dict[str, Array] = {}
    for name, weight in MODELS[NAME].weights().items():
        if not name.endswith("_proj.weight"):
            stored[name] = weight
            continue
        largest = np.abs(weight).max() if per_tensor else np.abs(weight).max(axis=1, keepdims=True)
        scale = np.asarray(largest / 448, np.float32)
        stored[name] = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
        stored[f"{name}_scale"] = scale.reshape(()) if per_tensor else scale
    header: dict[str, Any] = {}
    data = b""
    for name, array in stored.items():
        dtype = "F8_E4M3" if array.dtype == ml_dtypes.float8_e4m3fn else "F32"
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return stored


@pytest.mark.parametrize("per_tensor", [False, True], ids=["channel", "tensor"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_stored_scales_go_with_their_channels(folder: Path, tp_size: int, per_tensor: bool) -> None:
    stored = fp8_folder(folder, per_tensor=per_tensor)
    manifest = make_manifest(folder, tp_size)
    checkpoint = Checkpoint(folder)
    whole = {
        name: stored[name].astype(np.float32) * stored[f"{name}_scale"]
        for name in stored
        if f"{name}_scale" in stored and LAYER in name
    }
    for spec in manifest.params:
        if spec.layout != "panel16" or LAYER not in spec.name:
            continue
        rows, columns = spec.unpacked_shape or (0, 0)
        scale_spec = ParamSpec(f"{spec.name}.scale", (rows,), "float32", "channel_scale", spec.sources)
        for rank in range(tp_size):
            scales = scales_of(checkpoint, manifest, scale_spec, rank)
            assert scales is not None
            values = np.zeros((rows, columns), np.float32)
            expected = np.zeros((rows, columns), np.float32)
            for part in parts_of(checkpoint, manifest, spec, rank):
                place = np.s_[
                    part.row : part.row + part.values.shape[0], part.column : part.column + part.values.shape[1]
                ]
                values[place] = part.values.astype(np.float32)
            first = 0
            for source in spec.sources:
                blocks = _dense_part(whole[source.name], manifest, source, rank)
                expected[first : first + len(blocks), : blocks.shape[1]] = blocks
                first += len(blocks)
            np.testing.assert_allclose(values * scales[:, None], expected, rtol=1e-6)


def _dense_part(weight: Array, manifest: Manifest, source: ParamSource, rank: int) -> Array:
    """A rank's part of a weight, by plain indexing."""
    assert source.axis is not None
    assert source.split is not None
    split = manifest.splits[source.split]
    blocks = []
    for block in split.ranks[rank]:
        index = np.arange(split.block) + (0 if block is None else block * split.block)
        good = (index < split.size) & (block is not None)
        taken = np.take(weight, np.where(good, index, 0), axis=source.axis)
        mask = good[:, None] if source.axis == 0 else good[None, :]
        blocks.append(taken * mask)
    part: Array = np.concatenate(blocks, axis=source.axis)
    return part


def test_scales_of_some_tensors_only_are_refused(folder: Path) -> None:
    fp8_folder(folder)
    manifest = make_manifest(folder, 1)
    (spec,) = [spec for spec in manifest.params if spec.name == f"{LAYER}.self_attn.qkv_proj"]
    sources = (*spec.sources[:2], ParamSource("model.norm.weight"))
    mixed = ParamSpec("mixed.scale", (1,), "float32", "channel_scale", sources)
    with pytest.raises(WeightsError, match=r"has no 'model\.norm\.weight_scale', but has other scales"):
        scales_of(Checkpoint(folder), manifest, mixed, 0)
    none = ParamSpec("none.scale", (1,), "float32", "channel_scale", (ParamSource("lm_head.weight"),))
    assert scales_of(Checkpoint(folder), manifest, none, 0) is None


def interleaved(manifest: Manifest, size: int = 8) -> Manifest:
    """The same with gate_up as CUDA's GEMM takes it."""
    params = tuple(replace(spec, interleave=size) if ".gate_up_proj" in spec.name else spec for spec in manifest.params)
    return replace(manifest, params=params)


def in_turns(rows: Array, size: int = 8) -> Array:
    """Plain indexing: `size` rows of the first half, as many of the second, and so on."""
    half = len(rows) // 2
    order = [part * half + i + j for i in range(0, half, size) for part in (0, 1) for j in range(size)]
    taken: Array = rows[order]
    return taken


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_rows_of_gate_and_up_are_interleaved(folder: Path, tp_size: int) -> None:
    """Weights, and biases with them; 300 columns over the ranks leave a last one that has not whole runs of eight."""
    manifest = make_manifest(folder, tp_size)
    name = f"{LAYER}.mlp.gate_up_proj"
    for plain, found in zip(load(manifest, folder), load(interleaved(manifest), folder), strict=True):
        np.testing.assert_array_equal(unpack(found[name]), in_turns(unpack(plain[name])))
        np.testing.assert_array_equal(found[f"{name}.bias"], in_turns(plain[f"{name}.bias"]))
        assert not np.array_equal(found[name], plain[name])
        for other in plain:
            if "gate_up_proj" not in other:
                np.testing.assert_array_equal(found[other], plain[other])


@pytest.mark.parametrize("per_tensor", [False, True], ids=["channel", "tensor"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_stored_weights_and_scales_are_interleaved(folder: Path, tp_size: int, per_tensor: bool) -> None:
    fp8_folder(folder, per_tensor=per_tensor)
    manifest = make_manifest(folder, tp_size)
    checkpoint = Checkpoint(folder)
    (spec,) = [spec for spec in manifest.params if spec.name == f"{LAYER}.mlp.gate_up_proj"]
    assert spec.unpacked_shape is not None
    scale = ParamSpec(f"{spec.name}.scale", spec.unpacked_shape[:1], "float32", "channel_scale", spec.sources)
    for rank in range(tp_size):
        plain, turned = (scales_of(checkpoint, manifest, replace(scale, interleave=n), rank) for n in (0, 8))
        assert plain is not None
        assert turned is not None
        assert turned.shape == scale.shape
        np.testing.assert_array_equal(turned, in_turns(plain))
        assert len(np.unique(plain)) >= 2, "gate and up differ"
        rows = []
        for given in (spec, replace(spec, interleave=8)):
            codes = np.zeros(shape_of_parts(given), np.uint8)
            for part in parts_of(checkpoint, manifest, given, rank):
                height, width = part.values.shape
                codes[part.row : part.row + height, part.column : part.column + width] = part.values.view(np.uint8)
                sources = [checkpoint.tensor(source.name) for source in given.sources]
                assert any(np.shares_memory(part.values, source) for source in sources), "a slice, not a copy"
            rows.append(codes.reshape(spec.unpacked_shape))
        np.testing.assert_array_equal(rows[1], in_turns(rows[0]))


def test_rows_that_cannot_be_interleaved_are_refused(folder: Path) -> None:
    manifest = make_manifest(folder, 1)  # 304 rows of gate, 304 of up
    with pytest.raises(WeightsError, match=r"gate_up_proj: 608 rows are not interleaved by 24: compile again"):
        load(interleaved(manifest, 24), folder)
    spec = next(spec for spec in manifest.params if spec.name == f"{LAYER}.self_attn.qkv_proj")
    with pytest.raises(WeightsError, match=r"qkv_proj: 16 rows from 16 on .* by 5 in halves of 80: compile again"):
        parts_of(Checkpoint(folder), manifest, replace(spec, interleave=5), 0)
