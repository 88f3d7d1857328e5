"""Collectives between processes of one machine, in shared memory; and their plain twins for tests.

Owns the life of the communicator and the global functions that compiled graphs call. The protocol is in kernels/shm.cc.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import tvm_ffi

from tpserve.collectives.base import DLPackTensor
from tpserve.collectives.names import ALL_GATHER, ALL_REDUCE

# Of ranks that waited for another in vain; else they arrive as RuntimeError from native code.
tvm_ffi.register_error("TimeoutError", TimeoutError)
tvm_ffi.register_error("ConnectionError", ConnectionError)

_SPIN_US = 50
"""Longer than an all-reduce of one decode step lasts when ranks are level: benchmarks/cpu_kernels.py."""
_SPIN_OVERSUBSCRIBED_US = 2
"""With fewer cores than ranks, the rank waited for may need this very core."""


@dataclass(frozen=True, slots=True)
class CollectiveStats:
    """Totals of one kind of call on one communicator since it was made."""

    num_calls: int
    num_bytes: int
    """Put in by this rank."""
    busy_us: float
    """Time inside calls, waiting included, but not what the process was stopped for."""

    def __add__(self, other: CollectiveStats) -> CollectiveStats:
        """Return the totals of two communicators together."""
        return CollectiveStats(
            self.num_calls + other.num_calls, self.num_bytes + other.num_bytes, self.busy_us + other.busy_us
        )


class SharedMemoryCommunicator:
    """One rank of a group of processes on one machine. Implements `Communicator`.

    Parameters
    ----------
    library
        The loaded kernel library, which holds `shm_create`.
    name
        Of the shared-memory segment, the same on all ranks and new for every group. The segment is unlinked before
        the constructor returns.
    rank, world_size
        This process and the number of processes.
    capacity_bytes
        Largest piece exchanged at once, a multiple of 64; larger tensors go in pieces. The segment takes twice this
        per rank.
    timeout_s
        Deadline of each wait within a call.
    attach_timeout_s
        Deadline of attaching, if another: processes start at their own pace.

    Raises
    ------
    TimeoutError
        If a rank did not attach before the deadline; names it.
    RuntimeError
        If the segment cannot be made (the name is taken, /dev/shm is full).
    ValueError
        If arguments are out of range or ranks disagree on them.
    """

    backend: ClassVar[str] = "shared_memory"
    """For the log and the metrics."""

    def __init__(
        self,
        library: Any,
        name: str,
        rank: int,
        world_size: int,
        *,
        capacity_bytes: int = 1 << 20,
        timeout_s: float = 60.0,
        attach_timeout_s: float | None = None,
    ) -> None:
        enough_cores = len(os.sched_getaffinity(0)) >= world_size
        spin_us = _SPIN_US if enough_cores else _SPIN_OVERSUBSCRIBED_US
        attach_s = timeout_s if attach_timeout_s is None else attach_timeout_s
        functions = library["shm_create"](name, rank, world_size, capacity_bytes, attach_s, timeout_s, spin_us)
        self._rank = rank
        self._world_size = world_size
        self._all_reduce = functions["all_reduce"]
        self._all_gather = functions["all_gather"]
        self._abort = functions["abort"]
        self._close = functions["close"]
        self._stats = functions["stats"]

    @property
    def rank(self) -> int:
        """Number of the process in its group."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._world_size

    def all_reduce(self, x: DLPackTensor, out: DLPackTensor) -> None:
        """Write into `out` the sum over ranks of `x`; see `Communicator`."""
        self._all_reduce(x, out)

    def all_gather(self, x: DLPackTensor, out: DLPackTensor) -> None:
        """Put the ranks' columns side by side; see `Communicator`."""
        self._all_gather(x, out)

    def register(self) -> None:
        """Make this communicator the one that compiled graphs call, as `tpserve.all_reduce` and `tpserve.all_gather`.

        The calls go to native code without entering Python.
        """
        tvm_ffi.register_global_func(ALL_REDUCE, self._all_reduce, override=True)
        tvm_ffi.register_global_func(ALL_GATHER, self._all_gather, override=True)

    def stats(self) -> dict[str, CollectiveStats]:
        """Return totals by kind, `all_reduce` and `all_gather`; from any thread."""
        return {
            str(kind): CollectiveStats(totals["calls"], totals["bytes"], totals["microseconds"])
            for kind, totals in self._stats().items()
        }

    def abort(self) -> None:
        """Make every waiting and later call on every rank raise; from any thread."""
        self._abort()

    def close(self) -> None:
        """Leave the group; from any thread. Calls that wait for this rank raise."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def all_reduce_reference(parts: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    """Return what every rank gets from `all_reduce` of `parts`, one per rank, bit for bit."""
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total


def all_gather_reference(parts: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    """Return what every rank gets from `all_gather` of `parts`, one (rows, columns) per rank."""
    return np.concatenate(parts, axis=1)
