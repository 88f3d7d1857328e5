"""A norm that one GEMM begins and the next ends, its device code run on the host: what each thread adds and stores."""

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
EPS = 1e-3
"""Large enough to be seen."""
ALL_M = [1, 7, 8, 9, 16, 31, 32]
SIZE = 328
"""Channels: five tiles and an eighth of one; a block may finish several."""


@pytest.fixture(scope="module")
def library(build_tile_ends: Callable[[str], ctypes.CDLL]) -> ctypes.CDLL:
    return build_tile_ends("gemm_norm")


def address(array: Array | None) -> ctypes.c_void_p | None:
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


def tile_of(num_m: int) -> int:
    return next(size for size in (8, 16, 32) if num_m <= size)


def padded(num_m: int) -> int:
    return -(-num_m // 8) * 8


def rounded(values: Array) -> Array:
    return values.astype(np.float32).astype(BF16).astype(np.float32)


class Begun:
    """The outputs of a product of `num_m` tokens, random, whose norm is begun."""

    def __init__(self, library: ctypes.CDLL, num_m: int, *, bias: bool = False) -> None:
        rng = np.random.default_rng(num_m)
        sums = rng.normal(0, 1, (SIZE, tile_of(num_m))).astype(np.float32)
        sums[:, num_m:] = np.nan  # tokens that are not there
        self.added = rng.normal(0, 1, SIZE).astype(np.float32) if bias else None
        self.residual = rng.normal(0, 1, (num_m, SIZE)).astype(BF16)
        self.weight = rng.uniform(0.5, 1.5, SIZE).astype(np.float32)
        self.product = sums[:, :num_m].T + (0 if self.added is None else self.added)
        self.stream, self.out = (np.full((num_m + 1, SIZE), 0x1234, np.uint16) for _ in range(2))
        self.squares = np.full(((SIZE + 63) // 64, padded(num_m)), -1.0, np.float32)
        outputs = (address(each) for each in (self.stream, self.out, self.squares))
        inputs = (address(each) for each in (self.added, self.residual, self.weight))
        given = (tile_of(num_m), address(sums), num_m, SIZE, *inputs, ctypes.c_float(EPS), *outputs)
        assert library.begin_norm(*given) == 0


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("num_m", ALL_M)
def test_the_residual_stream_and_its_squares(library: ctypes.CDLL, num_m: int, bias: bool) -> None:
    begun = Begun(library, num_m, bias=bias)
    stream = rounded(rounded(begun.product) + begun.residual.astype(np.float32))
    assert np.array_equal(begun.stream[:num_m].view(BF16).astype(np.float32), stream), (
        "as the plain twin's, bit for bit"
    )
    weighted = begun.out[:num_m].view(BF16).astype(np.float32)
    assert np.array_equal(weighted, rounded(stream * begun.weight))
    for rows in (begun.stream, begun.out):
        assert (rows[num_m] == 0x1234).all(), "nothing is stored behind the last token"
    by_tile = np.add.reduceat(stream.astype(np.float64) ** 2, np.arange(0, SIZE, 64), axis=1).T
    by_tile[0] += EPS * SIZE
    np.testing.assert_allclose(begun.squares[:, :num_m], by_tile, rtol=1e-6)
    assert (begun.squares[:, num_m:] == -1).all()


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("num_m", ALL_M)
def test_the_next_product_is_that_of_a_whole_norm(library: ctypes.CDLL, num_m: int, bias: bool) -> None:
    begun, num_n = Begun(library, num_m), 72
    rng = np.random.default_rng(100 + num_m)
    weights = rng.normal(0, 1, (num_n, SIZE)).astype(np.float32)
    added = rng.normal(0, 1, num_n).astype(np.float32) if bias else None
    sums = np.full((num_n, tile_of(num_m)), np.nan, np.float32)
    sums[:, :num_m] = weights @ begun.out[:num_m].view(BF16).astype(np.float32).T
    begun.squares[:, num_m:] = np.nan  # never written
    out = np.full((num_m, num_n), np.nan, np.float32)
    given = (tile_of(num_m), address(begun.squares), num_m, SIZE, address(sums), address(added), num_n, address(out))
    assert library.end_norm(*given) == 0
    stream = begun.stream[:num_m].view(BF16).astype(np.float64)
    normed = stream / np.sqrt(np.mean(stream**2, axis=1, keepdims=True) + EPS) * begun.weight
    expected = normed @ weights.T.astype(np.float64) + (0 if added is None else added)
    np.testing.assert_allclose(out, expected, atol=0.02 * np.abs(expected).max())
    assert np.sqrt(np.mean((out - expected) ** 2) / np.mean(expected**2)) < 3e-3


@pytest.mark.parametrize("num_m", [1, 9, 32])
def test_other_tokens_have_factors_of_one(library: ctypes.CDLL, num_m: int) -> None:
    sums = np.random.default_rng(num_m).normal(0, 1, (72, tile_of(num_m))).astype(np.float32)
    out = np.full((num_m, 72), np.nan, np.float32)
    assert library.end_norm(tile_of(num_m), None, num_m, 0, address(sums), None, 72, address(out)) == 0
    assert np.array_equal(out, sums[:, :num_m].T)


@pytest.mark.parametrize("num_m", [1, 8, 32])
def test_rows_of_nothing_have_a_norm(library: ctypes.CDLL, num_m: int) -> None:
    """Padding: eps alone keeps the factor finite."""
    squares = np.zeros((2, padded(num_m)), np.float32)
    squares[0] = EPS * 128
    sums = np.zeros((8, tile_of(num_m)), np.float32)
    out = np.full((num_m, 8), np.nan, np.float32)
    assert library.end_norm(tile_of(num_m), address(squares), num_m, 128, address(sums), None, 8, address(out)) == 0
    assert (out == 0).all()


@pytest.mark.parametrize("num_m", [1, 7, 8, 9, 16])
def test_codes_of_a_norm_that_is_begun(library: ctypes.CDLL, num_m: int) -> None:
    """e4m3: a scale for each token of a tile; the residual stream and its squares are those of bf16."""
    size = 320
    rng = np.random.default_rng(num_m)
    sums = rng.normal(0, 1, (size, tile_of(num_m))).astype(np.float32)
    sums[:, num_m:] = np.nan  # tokens that are not there
    sums[64:128, 0] = 0
    residual = rng.normal(0, 1, (num_m, size)).astype(BF16)
    residual[0, 64:128] = 0  # and a group of nothing
    weight = rng.uniform(0.5, 1.5, size).astype(np.float32)
    streams: list[Array] = []
    squares: list[Array] = []
    outs: list[Array] = [np.zeros((num_m, size), np.uint16), np.full((num_m + 1, size), 0x7F, np.uint8)]
    scales = np.full((size // 64, padded(num_m)), -1.0, np.float32)
    for fp8 in (False, True):
        streams.append(np.full((num_m, size), 0x1234, np.uint16))
        squares.append(np.full((size // 64, padded(num_m)), -1.0, np.float32))
        given = (
            tile_of(num_m),
            address(sums),
            num_m,
            size,
            None,
            address(residual),
            address(weight),
            ctypes.c_float(EPS),
        )
        outputs = (address(streams[-1]), address(outs[fp8]))
        if fp8:
            assert library.begin_norm_fp8(*given, *outputs, address(scales), address(squares[-1])) == 0
        else:
            assert library.begin_norm(*given, *outputs, address(squares[-1])) == 0
    assert np.array_equal(streams[0], streams[1])
    assert np.array_equal(squares[0], squares[1])
    assert (outs[1][num_m] == 0x7F).all(), "nothing is stored behind the last token"
    weighted = streams[0].view(BF16).astype(np.float32) * weight
    most = np.maximum(np.abs(weighted).reshape(num_m, -1, 64).max(2), 1e-12)
    np.testing.assert_allclose(scales[:, :num_m].T, most / 448, rtol=1e-6)
    assert (scales[:, num_m:] == -1).all()
    codes = (weighted * np.repeat(np.float32(448) / most, 64, axis=1)).astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(outs[1][:num_m], codes.view(np.uint8))
