"""How the CUDA GEMMs want their weights, in plain numpy: `gemm_kernel.cuh` describes why.

A stage is 64 output channels by 256 bytes of input columns: two tiles of 64 rows of 128 bytes, in each row the 16-byte
chunk `c` at place `c ^ (row % 8)`. Stages, channels first, are dealt to the kernel's blocks in equal contiguous runs;
stage `i` of block `b` is stored at `i * GRID + b`, the order in which the grid reads them.

Rows of gate_up are interleaved before they are packed, `INTERLEAVE` of gate, as many of up, and so on, so that one
thread has both of an activation: `silu.cuh`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

LAYOUT = "wgmma64x256g132"
"""Name for the manifest; changes with anything below."""

GRID = 132
CHANNELS = 64
STAGE_BYTES_OF_K = 256
INTERLEAVE = 8
"""Of gate_up: 16 rows of an accumulator, of which a thread has one of the first eight and its like of the second."""
_CHUNK = 16


def packed_shape(rows: int, columns: int, itemsize: int) -> tuple[int, int, int]:
    """Return (stages, 64, 256 / itemsize): the shape of a packed (rows, columns) weight."""
    stages = -(-rows // CHANNELS) * -(-columns * itemsize // STAGE_BYTES_OF_K)
    return stages, CHANNELS, STAGE_BYTES_OF_K // itemsize


def stage_order(num_stages: int) -> npt.NDArray[np.int64]:
    """Return the place of each stage, (num_stages,), in the packed weight."""
    base, rem = divmod(num_stages, GRID)
    runs = np.full(GRID, base, np.int64)
    runs[:rem] += 1
    block = np.repeat(np.arange(GRID), runs)
    step = np.arange(num_stages) - np.repeat(np.cumsum(runs) - runs, runs)
    place: npt.NDArray[np.int64] = step * GRID + block
    return place


def pack(weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Pack a weight as a checkpoint has it.

    Parameters
    ----------
    weight : (rows, columns) of a 1-byte or 2-byte type
        Output channels by input columns; padded with zeros to whole stages.

    Returns
    -------
    packed_shape(rows, columns, itemsize), same dtype
    """
    rows, columns = weight.shape
    shape = packed_shape(rows, columns, weight.itemsize)
    blocks = -(-rows // CHANNELS)
    steps = shape[0] // blocks
    data = np.zeros((blocks * CHANNELS, steps * STAGE_BYTES_OF_K), np.uint8)
    data[:rows, : columns * weight.itemsize] = np.ascontiguousarray(weight).view(np.uint8).reshape(rows, -1)
    # (block, row / 8, row % 8, step, tile, chunk, byte) -> (block, step, tile, row / 8, row % 8, chunk, byte)
    tiles = data.reshape(blocks, CHANNELS // 8, 8, steps, 2, 8, _CHUNK).transpose(0, 3, 4, 1, 2, 5, 6)
    chunks = np.arange(8)
    swizzled = np.empty_like(tiles)
    for row in range(8):
        swizzled[..., row, chunks ^ row, :] = tiles[..., row, :, :]
    packed = np.empty((shape[0], CHANNELS * STAGE_BYTES_OF_K), np.uint8)
    packed[stage_order(shape[0])] = swizzled.reshape(shape[0], -1)
    return packed.view(weight.dtype).reshape(shape)


def unpack(packed: npt.NDArray[Any], rows: int, columns: int) -> npt.NDArray[Any]:
    """Return the (rows, columns) weight that `pack` was given."""
    blocks = -(-rows // CHANNELS)
    steps = packed.shape[0] // blocks
    stages = packed.reshape(packed.shape[0], -1).view(np.uint8)[stage_order(packed.shape[0])]
    swizzled = stages.reshape(blocks, steps, 2, CHANNELS // 8, 8, 8, _CHUNK)
    tiles = np.empty_like(swizzled)
    chunks = np.arange(8)
    for row in range(8):
        tiles[..., row, :, :] = swizzled[..., row, chunks ^ row, :]
    data = np.ascontiguousarray(tiles.transpose(0, 3, 4, 1, 2, 5, 6)).reshape(blocks * CHANNELS, -1)
    return np.ascontiguousarray(data[:rows].view(packed.dtype)[:, :columns])
