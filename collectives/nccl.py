"""Collectives between GPUs through NCCL, by CuPy. Knows streams, not models."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import tvm_ffi
from cupy.cuda import nccl

from tpserve.collectives.cpu import ALL_GATHER, ALL_REDUCE

_TYPES = {"bfloat16": nccl.NCCL_BFLOAT16, "float32": nccl.NCCL_FLOAT32}
_POLL_S = 0.01


class NcclCommunicator:
    """One rank of a group of GPUs on one machine. Calls are queued on TVM's current stream and may be captured.

    Parameters
    ----------
    name
        Of the group, the same on all ranks and new for every group; ranks find each other by it.
    rank, world_size
        This process and the number of processes.
    timeout_s
        Deadline for all ranks to come.

    Raises
    ------
    TimeoutError
        If rank 0 does not come in time.
    """

    def __init__(self, name: str, rank: int, world_size: int, *, timeout_s: float) -> None:
        self._rank = rank
        self._world_size = world_size
        self._comm = nccl.NcclCommunicator(world_size, _exchange_id(name, rank, timeout_s), rank)
        if rank == 0:
            _meeting_place(name).unlink()  # all ranks have read it: the communicator stands

    def register(self) -> None:
        """Make this communicator the one that compiled graphs call."""
        tvm_ffi.register_global_func(ALL_REDUCE, self.all_reduce, override=True)
        tvm_ffi.register_global_func(ALL_GATHER, self.all_gather, override=True)

    def all_reduce(self, x: Any, out: Any) -> None:
        """Write into `out` the sum over ranks of `x`; bfloat16 or float32."""
        stream = tvm_ffi.get_raw_stream(x.device)
        dtype = _TYPES[str(x.dtype)]
        self._comm.allReduce(x.data_ptr(), out.data_ptr(), x.numel(), dtype, nccl.NCCL_SUM, stream)

    def all_gather(self, x: Any, out: Any) -> None:
        """Put the ranks' blocks one after another: `x` (rows, columns), `out` (world_size, rows, columns)."""
        stream = tvm_ffi.get_raw_stream(x.device)
        self._comm.allGather(x.data_ptr(), out.data_ptr(), x.numel(), _TYPES[str(x.dtype)], stream)

    def close(self) -> None:
        """Leave the group without waiting for the others."""
        self._comm.abort()


def _meeting_place(name: str) -> Path:
    return Path("/dev/shm") / f"{name}.nccl"


def _exchange_id(name: str, rank: int, timeout_s: float) -> tuple[int, ...]:
    """Give rank 0's unique id to every rank."""
    place = _meeting_place(name)
    if rank == 0:
        unique_id: tuple[int, ...] = nccl.get_unique_id()
        partial = place.with_suffix(f".{os.getpid()}")
        partial.write_bytes(bytes(value & 0xFF for value in unique_id))
        partial.rename(place)
        return unique_id
    deadline = time.monotonic() + timeout_s
    while not place.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank 0 of {name} did not come within {timeout_s:g} s")
        time.sleep(_POLL_S)
    return tuple(value - 256 if value > 127 else value for value in place.read_bytes())
