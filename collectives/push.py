"""Collectives between the GPUs of one host over peer memory: no library call, no host, one kernel each.

A GEMM before an all-reduce is part of it: of up to 512 rows it sends its sums to the peers by itself.

Owns the workspaces that ranks map from one another. The protocol is in kernels/peer.cuh and kernels/push.cu.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, ClassVar

import cupy
import tvm_ffi

from tpserve.collectives.names import (
    ALL_GATHER,
    ALL_REDUCE,
    GEMM_ALL_REDUCE_ADD_RMS_NORM,
    GEMM_ALL_REDUCE_ADD_RMS_NORM_FP8,
    WHOLE_ROWS,
)
from tpserve.collectives.rendezvous import Rendezvous

ONE_SHOT_MAX_BYTES = {2: 1 << 20, 4: 262_144, 8: 98_304}
"""Size of a call up to which every rank sends its rows to every other (one-shot), if they are 128 at most; larger calls
reduce where the row belongs (two-shot). As measured with rows of 8192. TP=4: within steps, whose GEMMs send them; of 16
rows one-shot is faster, of 32 no more. 2: where both took the same time alone. 8: an estimate."""
_GATHER_BYTES = 16 << 20
"""Of one rank's part of an all-gather that is sent at once; larger ones go in pieces."""


class PushCommunicator:
    """One rank of a group of processes on one host, each with a GPU of its own.

    Parameters
    ----------
    kernels
        The loaded kernel library, which holds `push_create`.
    rendezvous
        Where the ranks exchange handles of their memory; used here and in `close`.
    rank, world_size
        2, 4 or 8 ranks.
    max_hidden_size
        Of the rows that are reduced; models with smaller ones may share the group.
    timeout_s
        Deadline of each wait on the device; `late_rank` then tells who was waited for.

    Raises
    ------
    TimeoutError
        If a rank does not come to the rendezvous.
    RuntimeError
        If the GPUs cannot reach each other's memory.
    """

    backend: ClassVar[str] = "push"
    """For the log and the metrics."""

    def __init__(
        self,
        kernels: Any,
        rendezvous: Rendezvous,
        rank: int,
        world_size: int,
        max_hidden_size: int,
        *,
        timeout_s: float,
    ) -> None:
        self._rendezvous = rendezvous
        runtime = cupy.cuda.runtime
        sizes = (world_size, max_hidden_size, _GATHER_BYTES)
        num_bytes = kernels["push_workspace_bytes"](*sizes)
        self._workspace = runtime.malloc(num_bytes)  # not from the pool: only whole allocations can be shared
        self._opened: list[int] = []
        self._late = cupy.cuda.alloc_pinned_memory(4)
        ctypes.memset(self._late.ptr, 0, 4)
        kernels["push_clear"](self._workspace, *sizes, self._late.ptr)
        handles = rendezvous.exchange(bytes(runtime.ipcGetMemHandle(self._workspace)))
        addresses = []
        for peer, handle in enumerate(handles):
            if peer == rank:
                addresses.append(self._workspace)
                continue
            try:
                # 1: peer access is enabled as needed
                address = runtime.ipcOpenMemHandle(handle, 1)
            except runtime.CUDARuntimeError as error:
                raise RuntimeError(f"rank {rank} cannot map the memory of rank {peer}: {error}") from None
            self._opened.append(address)
            addresses.append(address)
        one_shot_bytes = ONE_SHOT_MAX_BYTES[world_size]
        functions = kernels["push_create"](rank, addresses, max_hidden_size, _GATHER_BYTES, one_shot_bytes, timeout_s)
        self._functions = {name: functions[name] for name in functions}
        rendezvous.exchange(b"mapped")  # nobody may send before everybody is there

    def late_rank(self) -> int | None:
        """Return the rank that a wait of a step that has ended gave up on; kernels write it to the host's memory."""
        word = ctypes.c_int32.from_address(self._late.ptr).value
        return word - 1 if word else None

    def gather_logits(
        self, x: Any, vocab_size: int, slots: Any, greedy_state: Sequence[Any], out: Any, best: Any
    ) -> bool:
        """Queue what brings logits by rank together, as far as a sampler wants them.

        Parameters
        ----------
        x : (R, columns) float32
        slots : (R,) int32
            -1: padding, of which nothing is sent.
        greedy_state : tensors by slot
            Temperature, frequency and presence penalty, number of biases, of log-probabilities, and mask row. A row
            that is greedy without any of the others needs its best token only.
        out : (R, ranks * columns) float32
            Gets the other rows.
        best : (R, 8) int64
            Gets, of rows that need no more, the best tokens of parts of the columns (kernels/ranked_token.cuh), and 0.

        Returns
        -------
        True: `best` has been used.
        """
        self._functions["gather_logits"](x, vocab_size, slots, *greedy_state, out, best)
        return True

    def function(self, name: str) -> Any:
        """Return a collective by the last part of its global name, for tests.

        `all_reduce_add_rms_norm` and `all_reduce_add_rms_norm_fp8` are what follows a GEMM whose sums go by memory.
        """
        return self._functions[name.rpartition(".")[2]]

    def register(self) -> None:
        """Make this communicator the one that compiled graphs call."""
        fused = (GEMM_ALL_REDUCE_ADD_RMS_NORM, GEMM_ALL_REDUCE_ADD_RMS_NORM_FP8)
        for name in (ALL_REDUCE, ALL_GATHER, WHOLE_ROWS, *fused):
            tvm_ffi.register_global_func(name, self.function(name), override=True)

    def close(self) -> None:
        """Leave the group, when all ranks do; memory that another rank still maps must not be freed before."""
        for address in self._opened:
            cupy.cuda.runtime.ipcCloseMemHandle(address)
        self._rendezvous.exchange(b"unmapped")
        cupy.cuda.runtime.free(self._workspace)
