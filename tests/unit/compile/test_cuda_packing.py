"""The packed weight is a permutation of the plain one, in the order that blocks of the grid read it."""

from __future__ import annotations

import numpy as np
import pytest

from tpserve.proto import packing


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(("rows", "columns"), [(64, 256), (200, 1040), (960, 576), (4096, 512)])
def test_unpack_undoes_pack(dtype: type[np.generic], rows: int, columns: int) -> None:
    weight = np.random.default_rng(rows).integers(1, 255, (rows, columns)).astype(dtype)
    packed = packing.pack(weight)
    assert packed.shape == packing.packed_shape(rows, columns, weight.itemsize)
    np.testing.assert_array_equal(packing.unpack(packed, rows, columns), weight)
    assert np.count_nonzero(packed) == weight.size  # the rest is padding


@pytest.mark.parametrize("num_stages", [1, 131, 132, 133, 500, 2640])
def test_each_block_reads_a_contiguous_run_of_stages(num_stages: int) -> None:
    order = packing.stage_order(num_stages)
    assert sorted(order) == list(range(num_stages))
    block, step = order % packing.GRID, order // packing.GRID
    assert (np.diff(block) >= 0).all()
    starts = np.flatnonzero(np.diff(block, prepend=-1))
    assert (step == np.arange(num_stages) - np.repeat(starts, np.diff(starts, append=num_stages))).all()


def test_a_row_stands_swizzled_in_its_tile() -> None:
    weight = np.arange(64 * 128, dtype=np.uint16).reshape(64, 128)
    tiles = packing.pack(weight).reshape(2, 64, 8, 8)  # (tile, row, 16-byte chunk, element)
    for row, column in ((0, 0), (1, 0), (9, 70), (63, 127)):
        tile, chunk = column // 64, column % 64 // 8
        assert tiles[tile, row, chunk ^ (row % 8), column % 8] == weight[row, column]
