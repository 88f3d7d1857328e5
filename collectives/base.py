"""What every backend of collectives offers. Owns the contract; knows no backend."""

from __future__ import annotations

from typing import Any, Protocol


class DLPackTensor(Protocol):
    """A tensor of any library that shares memory by DLPack."""

    def __dlpack__(self) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


class Communicator(Protocol):
    """Joins one rank to its tensor-parallel group.

    All ranks make the same calls in the same order with the same shapes. On a CPU a call blocks its thread until
    every rank has made it; on a GPU it is queued on the current stream. Reductions add in rank order, so all ranks
    get the same bits. Tensors are float32 (on a GPU bfloat16 where they are reduced), contiguous, on this rank's
    device, and belong to the caller.

    A call raises `TimeoutError` naming the late ranks when the deadline passes, `RuntimeError` when a rank aborted or
    closed, and `ValueError` when ranks disagree on the call or shapes do not match. After an error from within the
    exchange the communicator is of no more use: ranks may be out of step.
    """

    @property
    def rank(self) -> int:
        """Number of the process in its group, 0 to `world_size` - 1."""
        ...

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        ...

    def all_reduce(self, x: DLPackTensor, out: DLPackTensor) -> None:
        """Write into `out` the sum over ranks of `x`; same number of elements. `out` may be `x`."""
        ...

    def all_gather(self, x: DLPackTensor, out: DLPackTensor) -> None:
        """Put the ranks' columns side by side: `x` (rows, columns), `out` (rows, world_size * columns)."""
        ...

    def close(self) -> None:
        """Leave the group and free what it holds. Ranks that still wait for this one raise."""
        ...
