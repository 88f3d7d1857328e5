"""The ends of wide tiles, their device code run on the host: sums exchanged, scales found, outputs in place."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

Array = npt.NDArray[Any]
BF16 = ml_dtypes.bfloat16


@pytest.fixture(scope="module")
def library(build_tile_ends: Callable[[str], ctypes.CDLL]) -> ctypes.CDLL:
    return build_tile_ends("gemm_wide")


def address(array: Array | None) -> ctypes.c_void_p | None:
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize("to", ["bf16", "float32", "peers"])
@pytest.mark.parametrize("empty", [0, 16], ids=["full", "not_full"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "e4m3"])
@pytest.mark.parametrize(("tokens", "pieces"), [(96, 1), (96, 8), (160, 3), (192, 2), (256, 1), (256, 3), (256, 4)])
def test_tiles_are_added_scaled_and_stored(
    library: ctypes.CDLL, tokens: int, pieces: int, empty: int, fp8: bool, to: str
) -> None:
    team, tile, member = 2, 1, 1
    tile_tokens = tokens - empty
    first_channel, first_token = tile * 128, member * tile_tokens
    num_n, num_m = first_channel + 40, first_token + tile_tokens - 13  # neither channels nor tokens fill the tile
    rng = np.random.default_rng(tokens + pieces)
    sums = rng.normal(0, 2, (pieces, 64, tokens)).astype(np.float32)
    sums[..., tile_tokens:] = np.nan  # what was never fetched
    channel, token, bias = (rng.uniform(0.5, 1.5, n).astype(np.float32) for n in (num_n, num_m, num_n))
    float32 = to == "float32"
    out = np.full((num_m + 1, num_n), 0x1234, np.uint32 if float32 else np.uint16)
    peer = out.copy() if to == "peers" else None
    scales = (channel, token) if fp8 else (None, None)
    sizes = (tokens, tile_tokens, pieces, team, tile, member)
    inputs = (sums, *scales, bias)
    status = library.finish_tile(
        *sizes, *map(address, inputs), address(out), address(peer), int(float32), 0, num_m, num_n
    )
    assert status == 0, "a slot was not emptied"
    expected = sums.astype(np.float64).sum(0)[:40, : tile_tokens - 13].T
    if fp8:
        expected = expected * channel[first_channel:] * token[first_token:, None]
    expected = expected + bias[first_channel:]
    found = out.view(np.float32 if float32 else BF16).astype(np.float64)
    np.testing.assert_allclose(
        found[first_token:-1, first_channel:], expected, rtol=1e-5 if float32 else 5e-3, atol=1e-5
    )
    assert peer is None or (peer == out).all()
    untouched = out == 0x1234
    assert untouched[:first_token].all()
    assert untouched[:, :first_channel].all()
    assert untouched[-1].all(), "nothing is stored behind the last token"


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("tokens", "pieces", "empty"), [(96, 1, 8), (160, 3, 0), (192, 2, 16), (256, 1, 0), (256, 4, 0)]
)
def test_tiles_of_gate_and_up_end_in_activations(
    library: ctypes.CDLL, tokens: int, pieces: int, empty: int, bias: bool
) -> None:
    team, tile, member = 2, 1, 1
    tile_tokens = tokens - empty
    first_channel, first_token = tile * 128, member * tile_tokens
    num_n, num_m = first_channel + 64, first_token + tile_tokens - 13
    rng = np.random.default_rng(tokens + pieces)
    sums = rng.normal(0, 2, (pieces, 64, tokens)).astype(np.float32)
    sums[..., tile_tokens:] = np.nan
    added = rng.normal(0, 1, num_n).astype(np.float32) if bias else None
    out = np.full((num_m + 1, num_n // 2), 0x1234, np.uint16)
    sizes = (tokens, tile_tokens, pieces, team, tile, member)
    status = library.finish_tile(
        *sizes, address(sums), None, None, address(added), address(out), None, 0, 1, num_m, num_n
    )
    assert status == 0, "a slot was not emptied"
    product = sums.astype(np.float64).sum(0)[:, : tile_tokens - 13]
    if added is not None:
        product += added[first_channel:, None]
    turns = product.astype(np.float32).astype(BF16).astype(np.float64).reshape(4, 2, 8, -1)  # 8 of gate, 8 of up
    gate, up = turns[:, 0].reshape(32, -1), turns[:, 1].reshape(32, -1)
    expected = (gate / (1 + np.exp(-gate)) * up).T
    found = out.view(BF16).astype(np.float64)[first_token:-1, first_channel // 2 :]
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=1e-5)
    untouched = out == 0x1234
    assert untouched[:first_token].all()
    assert untouched[:, : first_channel // 2].all()
    assert untouched[-1].all(), "nothing is stored behind the last token"
