"""Where the ranks of a group meet before they exchange activations: small messages over TCP, each with a deadline.

The first rank listens, the others come. One exchange gives every rank what all ranks brought, and is a barrier besides.
Used while a group starts and by nothing in a step. Over a network everything here is within mutual TLS, see `tls`.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets
import socket
import ssl
import struct
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tpserve.collectives.tls import GroupTls, StrangerError, describe

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("!iI")  # rank, bytes that follow
_MAX_BYTES = 1 << 20
_NONCE_BYTES = 16
_RETRY_S = 0.05
_HANDSHAKE_S = 5.0
"""Who comes to a door and does not say who it is keeps the others waiting no longer."""


def listen(host: str, port: int = 0) -> socket.socket:
    """Open a rank's door; port 0 takes a free one."""
    return socket.create_server((host, port))


@dataclass(frozen=True, slots=True)
class Handshake:
    """How one rank gets connections to others: those that come to its door, and those to whose door it goes.

    Who comes proves that it knows the group's secret, which is never sent; who owns the door does not.
    """

    rank: int
    secret: bytes
    timeout_s: float
    """What the deadlines below were made of, for messages."""
    name: Callable[[int], str] = str
    """What a rank is called in messages."""
    tls: GroupTls | None = None
    """None: plain connections, for those that stay on one host."""

    def admit(self, door: socket.socket, ranks: Collection[int], deadline: float) -> dict[int, socket.socket]:
        """Wait until each of `ranks` has come; strangers are turned away, which the log tells.

        Raises
        ------
        TimeoutError
            Naming those that did not come. Who came is let go.
        """
        peers: dict[int, socket.socket] = {}
        while len(peers) < len(ranks):
            try:
                door.settimeout(_left(deadline))
                peer, origin = door.accept()
            except TimeoutError:
                for peer in peers.values():
                    peer.close()
                absent = ", ".join(self.name(rank) for rank in ranks if rank not in peers)
                own = self.name(self.rank)
                raise TimeoutError(f"rank {own} waited {self.timeout_s:g} s for rank {absent} to come") from None
            try:
                rank, peer = self._ask(peer, min(deadline, time.monotonic() + _HANDSHAKE_S))
                if rank not in ranks or rank in peers:
                    peer.close()
                    raise StrangerError(f"rank {self.name(rank)} is not awaited here")
            except StrangerError as error:
                logger.warning(
                    "the door of rank %s has turned away who came from %s: %s", self.name(self.rank), origin[0], error
                )
            else:
                peers[rank] = peer
        return peers

    def reach(self, rank: int, address: str, deadline: float) -> socket.socket:
        """Go to the door of `rank` at `host:port`, which may not be open yet.

        Raises
        ------
        TimeoutError
        """
        host, _, port = address.rpartition(":")
        why = ""
        while True:
            try:
                with contextlib.ExitStack() as opened:
                    peer = opened.enter_context(socket.create_connection((host, int(port)), timeout=_left(deadline)))
                    if self.tls is not None:
                        peer = opened.enter_context(self.tls.connect(peer, rank))
                    _, nonce = _receive(peer, deadline)
                    _send(peer, self.rank, _proof(self.secret, nonce, self.rank), deadline)
                    opened.pop_all()
                    return peer
            except TimeoutError:
                raise TimeoutError(
                    f"rank {self.name(self.rank)} waited {self.timeout_s:g} s for rank {self.name(rank)} at {address} "
                    f"to answer{why}"
                ) from None
            except OSError as error:  # nobody listens yet, or there is no way there now
                why = f" ({describe(error) if isinstance(error, ssl.SSLError) else error.strerror or error})"
                time.sleep(min(_RETRY_S, max(0.0, deadline - time.monotonic())))

    def _ask(self, peer: socket.socket, deadline: float) -> tuple[int, socket.socket]:
        """Return the rank that came, and its connection, which TLS may have replaced.

        Raises
        ------
        StrangerError
            If it is not of this group; it is let go.
        """
        nonce = secrets.token_bytes(_NONCE_BYTES)
        with contextlib.ExitStack() as opened:
            opened.enter_context(peer)
            try:
                if self.tls is not None:
                    peer.settimeout(_left(deadline))
                    peer = opened.enter_context(self.tls.accept(peer))
                _send(peer, 0, nonce, deadline)
                rank, answer = _receive(peer, deadline)
            except StrangerError:
                raise
            except TimeoutError:
                raise StrangerError("it did not say in time who it is") from None
            except OSError as error:
                raise StrangerError(describe(error)) from None
            except ValueError as error:
                raise StrangerError(f"it did not say who it is: {error}") from None
            if not hmac.compare_digest(answer, _proof(self.secret, nonce, rank)):
                raise StrangerError("it does not know the group's secret")
            if isinstance(peer, ssl.SSLSocket) and self.tls is not None:
                self.tls.require(peer, rank)
            opened.pop_all()
            return rank, peer


class Rendezvous:
    """One rank's place at the meeting.

    Parameters
    ----------
    rank, world_size
        This process and the number of processes.
    address
        `host:port` of the first rank's door.
    secret
        Shared by the group; a stranger is turned away.
    timeout_s
        Deadline of each exchange, the first of which waits for the slowest process to start.
    door
        The first rank's listening socket, from `listen`; closed with the rest.
    tls
        Of this rank; None: plain connections.
    ranks
        Who meets, the first at its own door; None: 0 to world_size - 1.

    Raises
    ------
    TimeoutError
        Naming the ranks that did not come.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        address: str,
        secret: str,
        *,
        timeout_s: float,
        door: socket.socket | None = None,
        tls: GroupTls | None = None,
        ranks: Sequence[int] | None = None,
    ) -> None:
        self._rank = rank
        self._first, *self._others = range(world_size) if ranks is None else ranks
        self._timeout_s = timeout_s
        self._peers: dict[int, socket.socket] = {}
        self._door = door
        deadline = time.monotonic() + timeout_s
        handshake = Handshake(rank, secret.encode(), timeout_s, tls=tls)
        try:
            if rank != self._first:
                self._peers = {self._first: handshake.reach(self._first, address, deadline)}
            elif door is None:
                raise ValueError(f"rank {rank} needs the door that it opened with `listen`")
            else:
                self._peers = handshake.admit(door, self._others, deadline)
        except BaseException:
            self.close()
            raise

    def exchange(self, payload: bytes) -> list[bytes]:
        """Give `payload`, return what every rank gave, in the order of the ranks that meet.

        Raises
        ------
        TimeoutError
            Naming the late rank.
        ConnectionError
            If a rank has ended.
        """
        deadline = time.monotonic() + self._timeout_s
        if self._rank != self._first:
            _send(self._peers[self._first], self._rank, payload, deadline)
            return _split(self._take(self._first, deadline))
        gathered = [payload] + [self._take(rank, deadline) for rank in self._others]
        everything = b"".join(struct.pack("!I", len(part)) + part for part in gathered)
        for rank in self._others:
            _send(self._peers[rank], self._first, everything, deadline)
        return gathered

    def close(self) -> None:
        """Leave."""
        for peer in self._peers.values():
            peer.close()
        if self._door is not None:
            self._door.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, rank: int, deadline: float) -> bytes:
        try:
            return _receive(self._peers[rank], deadline)[1]
        except TimeoutError:
            raise TimeoutError(f"rank {self._rank} waited {self._timeout_s:g} s for rank {rank} to exchange") from None
        except ConnectionError as error:
            raise ConnectionError(f"rank {rank} left the rendezvous of its group ({error})") from None


def _proof(secret: bytes, nonce: bytes, rank: int) -> bytes:
    return hmac.digest(secret, nonce + struct.pack("!i", rank), "sha256")


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _send(peer: socket.socket, rank: int, payload: bytes, deadline: float) -> None:
    peer.settimeout(_left(deadline))
    with contextlib.suppress(BrokenPipeError):  # whoever left shows in the answer that does not come
        peer.sendall(_HEADER.pack(rank, len(payload)) + payload)


def _receive(peer: socket.socket, deadline: float) -> tuple[int, bytes]:
    rank, size = _HEADER.unpack(_receive_exactly(peer, _HEADER.size, deadline))
    if size > _MAX_BYTES:
        raise ValueError(f"a message of {size} bytes, at most {_MAX_BYTES} are taken")
    return rank, _receive_exactly(peer, size, deadline)


def _receive_exactly(peer: socket.socket, size: int, deadline: float) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        peer.settimeout(_left(deadline))
        part = peer.recv(size - len(parts))
        if not part:
            raise ConnectionError("the connection was closed")
        parts += part
    return bytes(parts)


def _split(everything: bytes) -> list[bytes]:
    parts, at = [], 0
    while at < len(everything):
        (size,) = struct.unpack_from("!I", everything, at)
        parts.append(everything[at + 4 : at + 4 + size])
        at += 4 + size
    return parts
