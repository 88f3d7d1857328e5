"""e4m3 KV pages, lane by lane on the host: what the GPU appends, and what its products read back."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from scripts import ROOT

Bytes = npt.NDArray[np.uint8]
HEADERS = f"-I{ROOT / 'compile/kernels/cuda'}"
SLICE = 16


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("layout") / "layout.so"
    source = Path(__file__).with_name("kv_layout.cpp")
    command = ["c++", "-std=c++20", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", HEADERS]
    subprocess.run([*command, str(source), "-o", str(library)], check=True, timeout=60)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    library = tmp_path_factory.mktemp("codes") / "codes.so"
    source = Path(__file__).with_name("fp8_codes.cu")
    command = ["nvcc", "-std=c++20", "-O1", "-arch=sm_90a", "-shared", "-Xcompiler=-fPIC", HEADERS]
    subprocess.run([*command, str(source), "-o", str(library)], check=True, timeout=240)
    return ctypes.CDLL(str(library))


def address(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def appended(layout: Any, rows: Bytes, is_value: bool) -> Bytes:
    """Return the keys (or values) of a page of (page_size, head_dim) codes, appended in no order of rows."""
    page_size, dim = rows.shape
    page = np.full(page_size * dim, 0xEE, np.uint8)
    for row in np.random.default_rng(1).permutation(page_size):
        codes = np.ascontiguousarray(rows[row])
        layout.append(dim, address(page), page_size, int(row), int(is_value), address(codes))
    return page


@pytest.mark.parametrize("is_value", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("page_size", [16, 64])
def test_products_read_what_was_appended(layout: ctypes.CDLL, page_size: int, dim: int, is_value: bool) -> None:
    rows = np.random.default_rng(dim + page_size).integers(0, 256, (page_size, dim), dtype=np.uint8)
    page = appended(layout, rows, is_value)
    np.testing.assert_array_equal(np.sort(page), np.sort(rows.ravel()))  # each code in a place of its own
    for first in range(0, page_size, SLICE):
        slice_ = page[first * dim : (first + SLICE) * dim].copy()  # one panel: its rows are one copy
        found = np.zeros((dim // 16, 32, 4, 2), np.uint8)
        addresses = np.zeros((dim // 32, 4, 8), np.int32)
        layout.load(dim, address(slice_), int(is_value), address(found), address(addresses))
        for column in range(dim // 16):
            for lane in range(32):
                for i in range(4):
                    # Register i % 2 of the second operand of mma.sync m16n8k16: rows k and k + 1, column lane / 4.
                    k, n = lane % 4 * 2 + i % 2 * 8, lane // 4 + i // 2 * 8
                    d = column * 16
                    wanted = (
                        [rows[first + k, d + n], rows[first + k + 1, d + n]]
                        if is_value
                        else [rows[first + n, d + k], rows[first + n, d + k + 1]]
                    )
                    assert found[column, lane, i].tolist() == wanted, (column, lane, i)
        # The eight rows of a matrix are in different sets of four banks.
        sets = addresses // 16 % 8
        assert (np.sort(sets, axis=-1) == np.arange(8)).all()


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("page_size", [16, 64])
def test_bfloat16_pages_are_laid_out_as_before(layout: ctypes.CDLL, page_size: int, dim: int) -> None:
    for row in range(page_size):
        for d in range(dim):
            place = (d // 64 * page_size + row) * 64 + ((d // 8 % 8) ^ (row % 8)) * 8 + d % 8
            assert layout.bf16_offset(dim, page_size, row, d) == place


def test_all_codes_are_widened_exactly(codes: ctypes.CDLL) -> None:
    pairs = np.stack([np.arange(256), np.arange(256)[::-1]], axis=1).astype(np.uint8)
    halves = np.zeros(256, np.uint32)
    codes.widen(address(np.ascontiguousarray(pairs)), 256, address(halves))
    expected = pairs.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(halves.view(np.float16).reshape(256, 2).astype(np.float32), expected)
    assert np.isnan(expected).sum() == 4


def test_floats_are_rounded_to_even_and_clipped(codes: ctypes.CDLL) -> None:
    exact = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    finite = np.unique(exact[np.isfinite(exact)])
    ties = (finite[1:] + finite[:-1]) / 2
    near = np.concatenate([np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))])
    random = np.random.default_rng(0).standard_normal(4096).astype(np.float32) * 50
    values = np.concatenate([finite, ties, near, random, [np.nan, -0.0]]).astype(np.float32)
    beyond = np.array([448.1, 460, 464, 465, 1e4, 3e38, np.inf], np.float32)
    values = np.concatenate([values, beyond, -beyond])
    values = np.pad(values, (0, -len(values) % 4))
    found = np.zeros(len(values), np.uint8)
    codes.narrow(address(values), len(values), address(found))
    with np.errstate(invalid="ignore"):
        expected = np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    got = found.view(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(got.astype(np.float32), expected.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(got.astype(np.float32)), np.signbit(expected.astype(np.float32)))
    assert np.isnan(got.astype(np.float32)).sum() == 1, "nothing but NaN becomes NaN"
