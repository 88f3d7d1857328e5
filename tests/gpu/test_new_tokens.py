"""What becomes of new tokens: norm, rotation and append against float64, and attention to them, by either plan."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np
import pytest

from gpu.device import BF16, FP8, DeviceArray, random_bf16, relative_error, to_device
from gpu.paged import Batch, Kernels, NewTokens, Paged, attend, page_offsets, reference, run

pytestmark = pytest.mark.gpu

both = pytest.mark.parametrize("kv", [BF16, FP8], ids=["bf16", "fp8"])
HEADS = [
    (32, 8, 128), (16, 2, 128), (8, 1, 128), (16, 1, 128), (5, 5, 128), (9, 3, 64), (14, 2, 64), (4, 4, 64), (8, 1, 64)
]  # fmt: skip
RUNS = {
    "decodes": [
        (slot, start, 1) for slot, start in enumerate([0, 15, 16, 17, 63, 64, 5, 511, 512, 513, 1023, 1024, 1100])
    ],
    "any": [(0, 0, 1), (1, 15, 3), (2, 63, 1), (3, 5, 1), (4, 510, 2), (5, 0, 40), (6, 700, 33)],
}


def angles(max_len: int, dim: int) -> Any:
    """Return (max_len, dim) float32: cosines, then sines."""
    turns = np.outer(np.arange(max_len), 1e4 ** (-np.arange(0, dim, 2) / dim))
    return np.concatenate([np.cos(turns), np.sin(turns)], axis=1).astype(np.float32)


@both
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("kind", RUNS)
def test_new_tokens_are_turned_appended_and_attended_to(
    kernels: Kernels, kind: str, norm: bool, heads: tuple[int, int, int], page_size: int, kv: Any
) -> None:
    num_heads, num_kv_heads, dim = heads
    runs = RUNS[kind]
    batch = Batch.of([*runs[:3], (-1, 0, 2), *runs[3:], (-1, 0, 1)])
    num_tokens, num_slots = len(batch.slots), len(runs)
    present = [t for t in range(num_tokens) if batch.slots[t] >= 0]
    positions = np.array(batch.positions)
    table = angles(1152, dim)
    weights = np.random.default_rng(0).uniform(0.5, 1.5, (2, dim)).astype(np.float32)
    state = Paged.make(batch.starts(num_slots), 1152, num_kv_heads, dim, page_size, kv)
    qkv = random_bf16((num_tokens, (num_heads + 2 * num_kv_heads) * dim), 1.0, dim)
    norms = (to_device(weights[0]), to_device(weights[1])) if norm else None
    result = attend(kernels, state, batch, NewTokens(qkv, to_device(table), num_heads, norms))

    values = cupy.asnumpy(qkv.float64()).reshape(num_tokens, -1, dim)
    q, k, v = np.split(values, [num_heads, num_heads + num_kv_heads], axis=1)
    if norm:
        q = q / np.sqrt((q**2).mean(-1, keepdims=True) + 1e-6) * weights[0]
        k = k / np.sqrt((k**2).mean(-1, keepdims=True) + 1e-6) * weights[1]

    def turn(x: Any) -> Any:
        a, b = np.split(x, 2, axis=-1)
        cosines, sines = np.split(table[positions][:, None].astype(np.float64), 2, axis=-1)
        return np.concatenate([a * cosines - b * sines, b * cosines + a * sines], axis=-1)

    turned = result.q.float64().reshape(num_tokens, num_heads, dim)
    assert relative_error(turned[present], turn(q)[present]) < 3e-3
    assert bool(cupy.isfinite(turned).all())
    before, host_table = state.pages.bits.copy(), state.table.bits.get()
    for t in present:
        page, row = int(host_table[batch.slots[t], positions[t] // page_size]), positions[t] % page_size
        for which, expected in ((0, turn(k)[t]), (1, v[t])):
            places = page_offsets(page_size, dim, kv, is_value=which == 1)[row]
            stored = DeviceArray(result.pages[page, :, which][:, places], kv)
            if state.scales is None:
                assert relative_error(stored.float64(), expected) < 3e-3
            else:
                check_codes(stored.host(), expected / np.float64(np.float32(state.scales[which])))
            before[page, :, which, places] = result.pages[page, :, which, places]
    assert bool((before == result.pages).all())  # and nothing else was written

    state.take_over(result.pages, batch.positions, batch.slots)
    expected = reference(state, turned, batch.positions, batch.slots, dim**-0.5, 0)
    assert relative_error(result.out.float64(), expected) < 6e-3


def check_codes(stored: Any, expected: Any) -> None:
    """See that codes are the nearest ones; float32 may take the neighbour where it is as near."""
    nearest = np.clip(expected, -448, 448).astype(np.float32).astype(FP8)
    assert np.mean(stored.view(np.uint8) != nearest.view(np.uint8)) < 0.02
    error = np.abs(stored.astype(np.float64) - np.clip(expected, -448, 448))
    assert (error <= np.abs(expected) * (2**-4 * 1.01) + 2**-10 * 1.01).all()


@both
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("heads", "grouped"), [((16, 2, 128), True), ((16, 2, 128), False), ((8, 1, 64), False)])
@pytest.mark.parametrize("batch", [1, 8, 64, 250])
@pytest.mark.parametrize("window", [0, 300])
def test_plans_of_decodes_give_the_bits_of_any_other(
    kernels: Kernels, batch: int, heads: tuple[int, int, int], grouped: bool, norm: bool, window: int, kv: Any
) -> None:
    num_heads, num_kv_heads, dim = heads
    starts = np.random.default_rng(batch).integers(0, 1100, batch).tolist()
    tokens = Batch.of([(slot, start, 1) for slot, start in enumerate(starts)])
    state = Paged.make(starts, 1152, num_kv_heads, dim, 16, kv)
    qkv = random_bf16((batch, (num_heads + 2 * num_kv_heads) * dim), 1.0, dim)
    weights = np.random.default_rng(0).uniform(0.5, 1.5, (2, dim)).astype(np.float32)
    norms = (to_device(weights[0]), to_device(weights[1])) if norm else None
    new = NewTokens(qkv, to_device(angles(1152, dim)), num_heads, norms)
    result = attend(kernels, state, tokens, new, window, grouped=grouped)  # compares
    assert bool(cupy.isfinite(result.out.float64()).all())


@pytest.mark.parametrize("decode_only", [False, True])
def test_values_beyond_e4m3_are_clipped_and_nan_stays(kernels: Kernels, decode_only: bool) -> None:
    state = Paged.make([0], 64, 1, 128, 16, FP8, (1e-3, 1e-3))
    values = np.random.default_rng(1).standard_normal((1, 3, 128)).astype(np.float32)
    values[0, 1:, :4] = [np.inf, -np.inf, 1e30, -1e30]
    values[0, 2, 7] = np.nan
    rope = np.concatenate([np.ones((64, 64)), np.zeros((64, 64))], axis=1).astype(np.float32)  # turns nothing
    tokens = NewTokens(to_device(values.astype(BF16).reshape(1, -1)), to_device(rope), 1)
    page = run(kernels, state, Batch([0], [0]), tokens, decode_only=decode_only).pages[int(state.table.bits[0, 0]), 0]
    for which, row in ((0, values[0, 1]), (1, values[0, 2])):
        places = page_offsets(16, 128, FP8, is_value=which == 1)[0]
        stored = DeviceArray(page[which][places], FP8).host().astype(np.float32)
        if which == 0:  # infinity times a sine of zero is NaN, in bfloat16 pages too
            row, stored = row[2:64], stored[2:64]
        np.testing.assert_array_equal(np.isnan(stored), np.isnan(row))
        kept = ~np.isnan(row)
        assert np.abs(stored[kept]).max() == 448
        np.testing.assert_array_equal(np.sign(stored[kept]), np.sign(row[kept]))
