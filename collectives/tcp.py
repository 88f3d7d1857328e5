"""Collectives between processes of several machines, over TCP: the twin of `cpu` where no memory is shared.

One shot, as there: every rank sends its data to every other and adds all of them in rank order, so the bits are those
of shared memory. Within mutual TLS where that was given.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import tvm_ffi

from tpserve.collectives.base import DLPackTensor
from tpserve.collectives.cpu import CollectiveStats
from tpserve.collectives.names import ALL_GATHER, ALL_REDUCE
from tpserve.collectives.rendezvous import Handshake, Rendezvous, listen
from tpserve.collectives.tls import GroupTls

_HEADER = struct.Struct("!QII")  # call, kind, bytes that follow
_KINDS = ("all_reduce", "all_gather")
_LATER = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_SLICE_S = 0.1
"""Upper bound of one wait: whether this rank has left is looked at again."""


class TcpCommunicator:
    """One rank of a group of processes, wherever they are. Implements `Communicator`.

    Parameters
    ----------
    rendezvous
        Where the ranks tell each other their addresses; not used after the constructor.
    host
        Address of this machine at which the others reach it.
    rank, world_size
        This process and the number of processes.
    secret
        Shared by the group; a stranger is turned away.
    timeout_s
        Deadline of each wait within a call.
    attach_timeout_s
        Deadline of coming together.
    tls
        Of this rank; None: plain connections.

    Raises
    ------
    TimeoutError
        Naming a rank that does not come.
    OSError
        If `host` is no address of this machine.
    """

    backend: ClassVar[str] = "tcp"
    """For the log and the metrics."""

    def __init__(
        self,
        rendezvous: Rendezvous,
        host: str,
        rank: int,
        world_size: int,
        *,
        secret: str,
        timeout_s: float,
        attach_timeout_s: float,
        tls: GroupTls | None = None,
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._call = 0
        self._left = False
        self._broken = False
        self._lock = threading.Lock()
        self._received = [bytearray(_HEADER.size) for _ in range(world_size)]
        self._totals = {kind: [0, 0, 0.0] for kind in _KINDS}
        handshake = Handshake(rank, secret.encode(), attach_timeout_s, tls=tls)
        with listen(host) as door:
            doors = rendezvous.exchange(f"{host}:{door.getsockname()[1]}".encode())
            deadline = time.monotonic() + attach_timeout_s
            self._peers = {other: handshake.reach(other, doors[other].decode(), deadline) for other in range(rank)}
            self._peers |= handshake.admit(door, range(rank + 1, world_size), deadline)
        for peer in self._peers.values():
            peer.setblocking(False)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rank_of = {peer.fileno(): other for other, peer in self._peers.items()}

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
        source, target = _array("x", x), _array("out", out)
        if source.size != target.size:
            raise ValueError(f"x has {source.size} elements and out {target.size}")
        with self._counted("all_reduce", source.nbytes):
            parts = self._exchange("all_reduce", source)
            total = parts[0].copy()
            for part in parts[1:]:
                total += part
            target.reshape(-1)[:] = total

    def all_gather(self, x: DLPackTensor, out: DLPackTensor) -> None:
        """Put the ranks' columns side by side; see `Communicator`."""
        source, target = _array("x", x), _array("out", out)
        if source.ndim != 2 or target.shape != (source.shape[0], self._world_size * source.shape[1]):
            raise ValueError(
                f"x has shape {source.shape} and out {target.shape}, expected (rows, columns) and "
                f"(rows, {self._world_size} * columns)"
            )
        with self._counted("all_gather", source.nbytes):
            parts = self._exchange("all_gather", source)
            np.concatenate([part.reshape(source.shape) for part in parts], axis=1, out=target)

    def register(self) -> None:
        """Make this communicator the one that compiled graphs call."""
        tvm_ffi.register_global_func(ALL_REDUCE, self.all_reduce, override=True)
        tvm_ffi.register_global_func(ALL_GATHER, self.all_gather, override=True)

    def stats(self) -> dict[str, CollectiveStats]:
        """Return totals by kind, `all_reduce` and `all_gather`; from any thread."""
        return {kind: CollectiveStats(int(calls), int(size), us) for kind, (calls, size, us) in self._totals.items()}

    def close(self) -> None:
        """Leave the group; from any thread. Calls that wait for this rank raise."""
        self._left = True
        for peer in self._peers.values():
            try:
                # Not the method of TLS, which would let a call that runs now go on without encryption.
                socket.socket.shutdown(peer, socket.SHUT_RDWR)
            except OSError:  # the other has left before
                continue
        with self._lock:  # a call that ran has seen it
            for peer in self._peers.values():
                peer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _counted(self, kind: str, num_bytes: int) -> Iterator[None]:
        """Let one call in at a time. After an error ranks are out of step, so the communicator is then broken."""
        with self._lock:
            if self._left:
                raise RuntimeError(f"communicator of rank {self._rank} is closed")
            if self._broken:
                raise RuntimeError(
                    f"communicator of rank {self._rank} failed in call {self._call} and cannot be used again"
                )
            begun = time.perf_counter()
            try:
                yield
            except BaseException:
                self._broken = True
                raise
            finally:
                totals = self._totals[kind]
                totals[0] += 1
                totals[1] += num_bytes
                totals[2] += (time.perf_counter() - begun) * 1e6

    def _exchange(self, kind: str, source: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        """Give every rank `source`; return what all gave, flat and by rank, good until the next call."""
        self._call += 1
        size = _HEADER.size + source.nbytes
        data = _HEADER.pack(self._call, _KINDS.index(kind), source.nbytes) + source.tobytes()
        unsent, missing = dict.fromkeys(self._peers, 0), dict.fromkeys(self._peers, 0)
        for other, buffer in enumerate(self._received):
            if len(buffer) < size:
                self._received[other] = bytearray(size)
        poller = select.poll()
        for peer in self._peers.values():
            poller.register(peer, select.POLLIN | select.POLLOUT)
        deadline = time.monotonic() + self._timeout_s
        while unsent or missing:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                late = ", ".join(str(other) for other in sorted({*unsent, *missing}))
                raise TimeoutError(
                    f"rank {self._rank} waited {self._timeout_s:g} s in {kind}, call {self._call}, for rank {late}"
                )
            for descriptor, events in poller.poll(min(left_s, _SLICE_S) * 1e3):
                other = self._rank_of[descriptor]
                try:
                    if events & ~select.POLLIN and other in unsent:
                        unsent[other] += self._send(other, memoryview(data)[unsent[other] :])
                        if unsent[other] == size:
                            del unsent[other]
                    while events & ~select.POLLOUT and other in missing:
                        count = self._receive(other, missing[other], size, kind)
                        missing[other] += count
                        if missing[other] == size:
                            del missing[other]
                        if not count or not _has_more(self._peers[other]):
                            break
                except TimeoutError as error:  # the kernel's own, of a connection that nobody answers on
                    raise TimeoutError(
                        f"rank {self._rank} in {kind}, call {self._call}: rank {other}: {error.strerror}"
                    ) from None
                except OSError:
                    raise self._closed(other, kind) from None
                wanted = (select.POLLOUT if other in unsent else 0) | (select.POLLIN if other in missing else 0)
                if wanted:
                    poller.modify(descriptor, wanted)
                else:
                    poller.unregister(descriptor)
            if self._left:
                raise self._closed(self._rank, kind)
        flat = source.reshape(-1)
        return [
            flat if other == self._rank else np.frombuffer(buffer, np.float32, source.size, _HEADER.size)
            for other, buffer in enumerate(self._received)
        ]

    def _send(self, other: int, data: memoryview) -> int:
        """Send what can be sent now; return how many bytes that was."""
        try:
            return self._peers[other].send(data)
        except _LATER:
            return 0  # TLS wants the same bytes again, as they are then

    def _receive(self, other: int, at: int, size: int, kind: str) -> int:
        """Take what has come of a rank's message; no byte of its next one, which may be there already."""
        try:
            count = self._peers[other].recv_into(memoryview(self._received[other])[at:size])
        except _LATER:
            return 0  # TLS has a part of a record, or one of its own
        if not count:
            raise ConnectionResetError
        if at < _HEADER.size <= at + count:
            call, code, num_bytes = _HEADER.unpack_from(self._received[other])
            theirs = _KINDS[code] if code < len(_KINDS) else f"kind {code}"
            if (call, theirs, num_bytes) != (self._call, kind, size - _HEADER.size):
                raise ValueError(
                    f"call {self._call} is {kind} of {size - _HEADER.size} bytes on rank {self._rank} and "
                    f"{theirs} of {num_bytes} bytes on rank {other}, its call {call}"
                )
        return count

    def _closed(self, other: int, kind: str) -> RuntimeError | ConnectionError:
        # Closed by another thread, this rank's own sockets end as well.
        who = self._rank if self._left else other
        what = f"{kind}, call {self._call} on rank {self._rank}: rank {who} has closed its communicator or died"
        return RuntimeError(what) if who == self._rank else ConnectionError(what)


def _has_more(peer: socket.socket) -> bool:
    """Tell whether TLS holds bytes that it has decrypted already, of which no poll knows."""
    return isinstance(peer, ssl.SSLSocket) and peer.pending() > 0


def _array(name: str, tensor: DLPackTensor) -> npt.NDArray[np.float32]:
    """Return a view of a tensor's memory."""
    untyped: Any = tensor  # numpy asks for more arguments than all libraries take
    array: npt.NDArray[Any] = np.from_dlpack(untyped)
    if array.dtype != np.float32:
        raise TypeError(f"{name} has dtype {array.dtype}, expected float32")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} is not contiguous")
    return array
