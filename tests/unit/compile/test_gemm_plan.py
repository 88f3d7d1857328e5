"""Plans of wide products: every unit taken once, every partial sum added once and in block order, weights found."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts import ROOT

ENDS, TEAMS, PIECES, THREE, ROTATE = 1, 2, 4, 8, 16
FEATURES = [0, ENDS, TEAMS, ENDS | TEAMS, PIECES, TEAMS | PIECES, TEAMS | PIECES | THREE, 31]
TILES = [(96, 2), (128, 2), (160, 2), (192, 2), (256, 2), (192, 3), (256, 3)]
SHAPES = [
    *((n, k) for n, k in ((2560, 8192), (8192, 2048), (14336, 8192), (8192, 7168))),  # 70B TP=4, e4m3
    *((n, 2 * k) for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))),  # 8B, bfloat16
    *((n, 2 * k) for n, k in ((64, 128), (960, 576), (576, 1536), (16032, 512), (1000, 1040), (200, 64), (200, 8))),
]
"""Channels, bytes of K."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("plan") / "plan.so"
    source = Path(__file__).with_name("gemm_plan.cpp")
    headers = f"-I{ROOT / 'compile/kernels/cuda'}"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-shared", "-fPIC", headers]
    subprocess.run(["c++", *flags, str(source), "-o", str(path)], check=True, timeout=120)
    loaded = ctypes.CDLL(str(path))
    loaded.follow_chosen.argtypes = [ctypes.c_int] * 2 + [ctypes.c_int64, ctypes.c_uint] + [ctypes.c_void_p] * 3
    loaded.follow_plan.argtypes = (
        [ctypes.c_int] * 2 + [ctypes.c_int64] + [ctypes.c_int] * 3 + [ctypes.c_uint, ctypes.c_char_p]
    )
    return loaded


def chosen(library: Any, num_m: int, num_n: int, row_bytes: int, features: int) -> tuple[list[int], float]:
    """Return what `follow_chosen` gives, after it has followed the plan without a fault."""
    values, us, why = (ctypes.c_int * 9)(), ctypes.c_float(), ctypes.create_string_buffer(200)
    status = library.follow_chosen(num_m, -(-num_n // 64), row_bytes, features, values, ctypes.byref(us), why)
    assert status == 0, (num_m, num_n, row_bytes, features, list(values), why.value)
    return list(values), us.value


@pytest.mark.parametrize("features", FEATURES)
def test_chosen_plans_cover_every_unit_once(library: ctypes.CDLL, features: int) -> None:
    rng = np.random.default_rng(features)
    for num_n, row_bytes in SHAPES:
        for num_m in (129, 160, 192, 256, 320, 384, 512, 768, 1024, 2048, *rng.integers(129, 3000, 4)):
            values, _ = chosen(library, int(num_m), num_n, row_bytes, features)
            assert values[1] == 2 or features & THREE


@pytest.mark.parametrize("features", [TEAMS, TEAMS | PIECES, TEAMS | PIECES | THREE | ROTATE, PIECES])
def test_any_plan_covers_every_unit_once(library: ctypes.CDLL, features: int) -> None:
    """Random shapes and pieces, also those that nobody would choose."""
    rng = np.random.default_rng(features)
    for tokens, blocks in TILES:
        for _ in range(30):
            num_m, channel_blocks = int(rng.integers(129, 3000)), int(rng.integers(1, 260))
            row_bytes = 16 * int(rng.integers(1, 700))
            units = -(-row_bytes // 128)
            pieces = (1, units, int(rng.integers(1, units + 1)))[rng.integers(3)]
            why = ctypes.create_string_buffer(200)
            status = library.follow_plan(num_m, channel_blocks, row_bytes, tokens, blocks, pieces, features, why)
            assert status == 0, (num_m, channel_blocks, row_bytes, tokens, blocks, pieces, why.value)


def test_without_candidates_the_measured_tiles_are_taken(library: ctypes.CDLL) -> None:
    for num_m, wide, tokens in (
        (160, 0, 96),
        (256, 0, 128),
        (192, 1, 192),
        (256, 1, 256),
        (320, 1, 160),
        (384, 1, 192),
    ):
        num_n = 28672 if wide else 4096
        values, _ = chosen(library, num_m, num_n, 8192, 0)
        tiles = -(-num_m // tokens)
        units = 64 * tiles * -(-num_n // 128)
        assert values == [tokens, 2, 1, tiles, 64, units // 132, units % 132, 0, 0]


def test_tiles_that_nearly_fill_the_grid_stay_whole(library: ctypes.CDLL) -> None:
    values, us = chosen(library, 512, 8192, 7168, TEAMS | PIECES)
    assert values[:5] == [256, 2, 2, 1, 1], "128 tiles on 132 blocks, in teams of two"
    assert us > 0
    values, _ = chosen(library, 512, 2560, 8192, ENDS | TEAMS | PIECES)
    assert values[7], "40 tiles: three blocks for each, who share its end"
