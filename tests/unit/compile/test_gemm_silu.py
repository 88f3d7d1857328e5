"""The end of gate_up's GEMM, its device code run on the host: which activation each thread makes, and where it goes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

Array = npt.NDArray[Any]
BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
NUM_ACTIVATIONS = 160
"""Five tiles: a block may finish several."""


@pytest.fixture(scope="module")
def library(build_tile_ends: Callable[[str], ctypes.CDLL]) -> ctypes.CDLL:
    return build_tile_ends("gemm_silu")


def address(array: Array | None) -> ctypes.c_void_p | None:
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


def tile_of(num_m: int) -> int:
    return next(size for size in (8, 16, 32, 64, 96, 128) if num_m <= size)


def interleaved(rows: Array) -> Array:
    """Gate then up, along the first dimension, as gate_up's weight has them."""
    gate, up = np.split(rows, 2)
    return np.stack([gate.reshape(-1, 8, *rows.shape[1:]), up.reshape(-1, 8, *rows.shape[1:])], 1).reshape(rows.shape)


def sums_of(num_m: int, seed: int) -> Array:
    """(2F, tile) float32; tokens that are not there have NaN."""
    sums = np.random.default_rng(seed).normal(0, 2, (2 * NUM_ACTIVATIONS, tile_of(num_m))).astype(np.float32)
    sums[:, num_m:] = np.nan
    return sums


def activated(gate_up: Array) -> Array:
    """(2F, M) of gate then up -> (M, F) float64."""
    gate, up = np.split(gate_up.astype(np.float32).astype(BF16).astype(np.float64), 2)
    with np.errstate(over="ignore"):  # of large negative gates, whose SiLU is 0
        out: Array = gate / (1 + np.exp(-gate)) * up
    return out.T


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("num_m", [1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 96, 97, 128])
def test_bf16_activations_stand_in_their_order(library: ctypes.CDLL, num_m: int, bias: bool) -> None:
    sums = sums_of(num_m, num_m)
    added = np.random.default_rng(1).normal(0, 1, len(sums)).astype(np.float32) if bias else None
    out = np.full((num_m + 1, NUM_ACTIVATIONS), 0x1234, np.uint16)
    given = interleaved(sums)
    offset = None if added is None else interleaved(added)
    size = (num_m, 2 * NUM_ACTIVATIONS)
    assert library.silu_bf16(address(given), tile_of(num_m), address(offset), address(out), *size) == 0
    expected = activated(sums[:, :num_m] + (0 if added is None else added[:, None]))
    np.testing.assert_allclose(out[:num_m].view(BF16).astype(np.float64), expected, rtol=5e-3, atol=1e-6)
    assert (out[num_m] == 0x1234).all(), "nothing is stored behind the last token"


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("num_m", [1, 2, 7, 8, 9, 15, 16])
def test_e4m3_activations_have_a_scale_for_each_tile(library: ctypes.CDLL, num_m: int, bias: bool) -> None:
    rng = np.random.default_rng(num_m)
    sums = sums_of(num_m, num_m + 100)
    if num_m > 1:
        sums[:, 1] *= 1e4
    sums[NUM_ACTIVATIONS : NUM_ACTIVATIONS + 32, 0] = 0.0  # without a bias a group of zeros
    channels, tokens = (rng.uniform(0.5, 1.5, n).astype(np.float32) for n in (len(sums), num_m))
    added = rng.normal(0, 1, len(sums)).astype(np.float32) if bias else None
    padded = -(-num_m // 8) * 8
    out = np.full((num_m + 1, NUM_ACTIVATIONS), 0x12, np.uint8)
    scales = np.full((NUM_ACTIVATIONS // 32 + 1, padded), -7.0, np.float32)
    inputs = [interleaved(sums), interleaved(channels), tokens, None if added is None else interleaved(added)]
    status = library.silu_fp8(
        address(inputs[0]),
        tile_of(num_m),
        *map(address, inputs[1:]),
        address(out),
        address(scales),
        num_m,
        2 * NUM_ACTIVATIONS,
    )
    assert status == 0
    plain = sums[:, :num_m].astype(np.float64) * channels[:, None] * tokens
    expected = activated(plain + (0 if added is None else added[:, None]))
    groups = expected.reshape(num_m, -1, 32)
    largest = np.abs(groups).max(2)
    np.testing.assert_allclose(scales[:-1, :num_m].T, np.maximum(largest, 1e-12) / 448, rtol=2e-2)
    assert (scales[:-1, num_m:] == -7).all(), "nor are scales of tokens that are not there"
    assert (scales[-1] == -7).all()
    found = out[:num_m].view(FP8).astype(np.float64).reshape(num_m, -1, 32)
    assert (np.abs(found).max(2)[largest > 0] == 448).all()
    errors = np.abs(found * scales[:-1, :num_m].T[..., None] - groups)
    assert (errors <= np.abs(groups) / 14 + largest[..., None] * 2e-2).all()
    assert (out[num_m] == 0x12).all()
    if not bias:
        assert not largest[0, 0]
        assert not found[0, 0].any()


def test_what_is_no_number_stays_none(library: ctypes.CDLL) -> None:
    sums = sums_of(3, 0)
    sums[5, 1], sums[NUM_ACTIVATIONS + 40, 2] = np.nan, np.nan
    ones = np.ones(len(sums), np.float32)
    out, scales = np.zeros((3, NUM_ACTIVATIONS), np.uint8), np.zeros((NUM_ACTIVATIONS // 32, 8), np.float32)
    given = interleaved(sums)
    arguments = (address(given), 8, address(ones), address(ones), None, address(out), address(scales))
    assert library.silu_fp8(*arguments, 3, 2 * NUM_ACTIVATIONS) == 0
    assert np.argwhere(np.isnan(out.view(FP8).astype(np.float32))).tolist() == [[1, 5], [2, 40]]
    assert np.isfinite(scales[:, :3]).all(), "other activations keep their values"
