"""Collectives by NCCL, through CuPy: what works between any GPUs, and the plain twin of `push`.

A GEMM, a sum and a norm one after the other where `push` overlaps them; taken where ranks cannot map each other's
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import cupy
import tvm_ffi
from cupy.cuda import nccl

from tpserve.collectives.names import (
    ALL_GATHER,
    ALL_REDUCE,
    GEMM_ALL_REDUCE_ADD_RMS_NORM,
    GEMM_ALL_REDUCE_ADD_RMS_NORM_FP8,
    WHOLE_ROWS,
)
from tpserve.collectives.rendezvous import Rendezvous

_NCCL_BFLOAT16 = 9  # ncclBfloat16: CuPy has no name for it


class NcclCommunicator:
    """One rank of a group; see `PushCommunicator` for the parameters.

    Sums are in NCCL's order, the same on all ranks. Norms and quantisation are kernels of their own. Calls are queued
    on the current stream and can be captured in a graph.

    Raises
    ------
    TimeoutError
        If a rank does not come to the rendezvous.
    """

    backend: ClassVar[str] = "nccl"
    """For the log and the metrics."""

    def __init__(self, kernels: Any, rendezvous: Rendezvous, rank: int, world_size: int) -> None:
        token = rendezvous.exchange(nccl.get_unique_id() if rank == 0 else b"")[0]
        self._communicator = nccl.NcclCommunicator(world_size, token, rank)
        self._world_size = world_size
        self._kernels = kernels
        self._address = kernels["device_address"]
        self._scratch: dict[tuple[tuple[int, ...], str], Any] = {}
        self._functions = {
            ALL_REDUCE: self._all_reduce,
            ALL_GATHER: self._all_gather,
            WHOLE_ROWS: self._whole_rows,
            GEMM_ALL_REDUCE_ADD_RMS_NORM: self._gemm_all_reduce_add_rms_norm,
            GEMM_ALL_REDUCE_ADD_RMS_NORM_FP8: self._gemm_all_reduce_add_rms_norm_fp8,
        }

    def function(self, name: str) -> Any:
        """Return a collective by its global name, for tests."""
        return self._functions[name]

    def gather_logits(
        self, x: Any, vocab_size: int, slots: Any, greedy_state: Sequence[Any], out: Any, best: Any
    ) -> bool:
        """Queue the gathering of all columns of all rows, (R, columns) on each rank -> `out`; return False."""
        self._all_gather(x, out)
        return False

    def late_rank(self) -> int | None:
        """Return None: NCCL waits without a deadline of ours, and who ends it is the coordinator."""
        return None

    def register(self) -> None:
        """Make this communicator the one that compiled graphs call."""
        for name, function in self._functions.items():
            tvm_ffi.register_global_func(name, function, override=True)

    def close(self) -> None:
        """Leave the group."""
        self._communicator.destroy()

    def _all_reduce(self, x: Any, out: Any) -> None:
        stream = tvm_ffi.get_raw_stream(x.device)
        source, target = self._address(x), self._address(out)
        self._communicator.allReduce(source, target, x.numel(), _NCCL_BFLOAT16, nccl.NCCL_SUM, stream)

    def _all_gather(self, x: Any, out: Any) -> None:
        rows, columns = x.shape
        dtype = str(x.dtype)
        parts = self._scratch_of((self._world_size, rows, columns), dtype)
        stream = tvm_ffi.get_raw_stream(x.device)
        kind = nccl.NCCL_FLOAT32 if dtype == "float32" else _NCCL_BFLOAT16
        self._communicator.allGather(self._address(x), self._address(parts), x.numel(), kind, stream)
        self._kernels["join_columns"](parts, out)

    def _whole_rows(self, x: Any, out: Any) -> None:
        """Copy: here every rank has all rows."""
        stream, size = tvm_ffi.get_raw_stream(x.device), 2 * x.numel()
        source, target = self._address(x), self._address(out)
        cupy.cuda.runtime.memcpyAsync(target, source, size, cupy.cuda.runtime.memcpyDeviceToDevice, stream)

    def _gemm_all_reduce_add_rms_norm(self, gemm: str, *args: Any) -> None:
        *operands, residual, weight, eps, part, residual_out, out = args
        total = self._multiply_and_sum(gemm, operands, part)
        self._kernels["add_rms_norm"](total, residual, weight, eps, residual_out, out)

    def _gemm_all_reduce_add_rms_norm_fp8(self, gemm: str, *args: Any) -> None:
        *operands, residual, weight, eps, part, residual_out, out, scale = args
        total = self._multiply_and_sum(gemm, operands, part)
        self._kernels["add_rms_norm_fp8"](total, residual, weight, eps, residual_out, out, scale)

    def _multiply_and_sum(self, gemm: str, operands: list[Any], part: Any) -> Any:
        self._kernels[gemm](*operands, part)
        self._all_reduce(part, part)
        return part

    def _scratch_of(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return a buffer that stays where it is, as captured graphs need; made when a shape is first used."""
        if (shape, dtype) not in self._scratch:
            bits = cupy.empty(shape, cupy.float32 if dtype == "float32" else cupy.uint16)
            self._scratch[shape, dtype] = tvm_ffi.from_dlpack(bits)._create_view(shape, dtype=dtype)
        return self._scratch[shape, dtype]
