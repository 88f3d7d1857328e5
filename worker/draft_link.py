"""Between a model's ranks and the ranks that its draft has to itself: who meets whom, and the messages of a step.

Each step that runs tokens ends with one message from the model's rank 0 to every rank of the draft: the tokens that it
emitted. Each step that verifies drafts begins with one from the draft's rank 0 to every rank of the model: the tokens
that it proposes. A round of both costs some 35 us on one host (benchmarks/draft_link.py). Messages are small, and plans
few steps ahead, so the system's buffers hold what a rank that works has not read yet. Between nodes they are within
mutual TLS.
"""

from __future__ import annotations

import socket
import struct
import time
from functools import partial

import numpy as np

from tpserve.collectives.rendezvous import Handshake
from tpserve.proto.rank import RankConfig, rank_name
from tpserve.worker.arrays import Array
from tpserve.worker.errors import PlanError, WorkerError
from tpserve.worker.group_tls import group_tls
from tpserve.worker.host_group import attach_timeout_s

_HEADER = struct.Struct("!QIII")  # step, kind, slots, int32 that follow
_KINDS = ("proposals", "emitted tokens")
_MAX_INTEGERS = 1 << 20
"""Of one message, which is not read beyond if a header makes no sense."""
_DRAFT_DEADLINES = 1.25
"""The model waits longer for proposals than the draft's ranks for each other, by this many times the deadline of one
collective: drafting has many, and if one of the draft's ranks is late in one, the others shall say so first."""
_STEP_DEADLINES = 2.0
"""The draft waits longer for a step's tokens than the coordinator does, by this many times the deadline of one
collective: the model's ranks may compute for longer than they may wait for each other, and who is late in a step is for
the coordinator to say, who hears of all ranks."""


class _Peer:
    """One connection, for messages in the order of steps."""

    def __init__(self, connection: socket.socket, own: str, name: str) -> None:
        self._connection = connection
        self._own = own
        self._name = name
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, step_id: int, kind: str, num_slots: int, data: bytes, timeout_s: float) -> None:
        """Send a message of int32.

        Raises
        ------
        TimeoutError, ConnectionError
            Naming the other rank.
        """
        self._connection.settimeout(timeout_s)
        try:
            self._connection.sendall(_HEADER.pack(step_id, _KINDS.index(kind), num_slots, len(data) // 4) + data)
        except TimeoutError:
            raise TimeoutError(
                f"rank {self._own} waited {timeout_s:g} s for rank {self._name} to take the {kind} of step {step_id}"
            ) from None
        except OSError as error:
            raise self._closed(step_id, error) from None

    def receive(self, step_id: int, kind: str, timeout_s: float) -> tuple[int, Array]:
        """Wait for the message of a step.

        Returns
        -------
        num_slots
        (n,) int32

        Raises
        ------
        TimeoutError, ConnectionError
            Naming the other rank.
        PlanError
            If it is in another step.
        """
        deadline = time.monotonic() + timeout_s
        try:
            theirs, code, num_slots, count = _HEADER.unpack(self._take(_HEADER.size, deadline))
            if (theirs, code) != (step_id, _KINDS.index(kind)) or count > _MAX_INTEGERS:
                what = _KINDS[code] if code < len(_KINDS) else f"kind {code}"
                raise PlanError(
                    f"rank {self._own} waits for {kind} of step {step_id}, rank {self._name} sent {count} integers of "
                    f"{what} of step {theirs}"
                )
            return num_slots, np.frombuffer(self._take(4 * count, deadline), "<i4").astype(np.int32)
        except TimeoutError:
            raise TimeoutError(
                f"rank {self._own} waited {timeout_s:g} s for rank {self._name} to send the {kind} of step {step_id}"
            ) from None
        except OSError as error:
            raise self._closed(step_id, error) from None

    def close(self) -> None:
        """Leave."""
        self._connection.close()

    def _take(self, size: int, deadline: float) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            self._connection.settimeout(left_s)
            part = self._connection.recv(size - len(parts))
            if not part:
                raise ConnectionResetError("end of stream")
            parts += part
        return bytes(parts)

    def _closed(self, step_id: int, error: OSError) -> ConnectionError:
        why = error.strerror or error
        return ConnectionError(
            f"rank {self._own} in step {step_id}: rank {self._name} has closed its connection or died ({why})"
        )


class _End:
    """What both ends have: a handshake, and the peers that it brought."""

    def __init__(self, config: RankConfig) -> None:
        self._own = config.name
        self._name = partial(rank_name, tp_size=config.tp_size)
        self._timeout_s = config.collective_timeout_s
        self._attach_s = attach_timeout_s(config.collective_timeout_s)
        secret = config.group_name.encode()
        self._handshake = Handshake(config.rank, secret, self._attach_s, self._name, group_tls(config))

    def _admit(self, door: socket.socket | None, ranks: range) -> list[_Peer]:
        if door is None:
            raise WorkerError(f"rank {self._own} has no door for rank {', '.join(map(self._name, ranks))}")
        with door:
            found = self._handshake.admit(door, ranks, time.monotonic() + self._attach_s)
        return [_Peer(found[rank], self._own, self._name(rank)) for rank in ranks]

    def _reach(self, rank: int, address: str) -> _Peer:
        connection = self._handshake.reach(rank, address, time.monotonic() + self._attach_s)
        return _Peer(connection, self._own, self._name(rank))


class TargetEnd(_End):
    """At a rank of the model.

    Parameters
    ----------
    door
        Rank 0's, at `config.target_door`, if the draft has more than one rank.

    Raises
    ------
    TimeoutError
        If a rank of the draft does not come in time; names it.
    """

    def __init__(self, config: RankConfig, door: socket.socket | None = None) -> None:
        super().__init__(config)
        first = config.tp_size
        self._draft = self._reach(first, config.draft_door)
        self._told: list[_Peer] = []
        if config.rank == 0:
            num_draft_ranks = 1 if config.speculation is None else config.speculation.num_draft_ranks
            others = range(first + 1, first + num_draft_ranks)
            self._told = [self._draft, *(self._admit(door, others) if others else ())]

    def proposals(self, step_id: int, slots: Array, num_draft_tokens: int) -> Array:
        """Wait for what the draft proposes.

        Parameters
        ----------
        slots : (B,) int32
            That decode in this step.

        Returns
        -------
        (B, num_draft_tokens) int32

        Raises
        ------
        TimeoutError, ConnectionError
            Naming the draft's rank.
        PlanError
            If it proposes for other slots.
        """
        _, found = self._draft.receive(step_id, "proposals", _DRAFT_DEADLINES * self._timeout_s)
        count = len(slots)
        if len(found) != count * (1 + num_draft_tokens) or (found[:count] != slots).any():
            raise PlanError(f"step {step_id}: the draft does not propose for slots {slots.tolist()}")
        token_ids: Array = found[count:].reshape(count, num_draft_tokens)
        return token_ids

    def tell(self, step_id: int, slots: Array, token_ids: Array, counts: Array) -> None:
        """Tell the draft's ranks what a step emitted, if this is rank 0; see `Proposer.emitted`."""
        if not self._told:
            return
        tokens = token_ids[np.arange(token_ids.shape[1]) < counts[:, None]]
        data = np.concatenate([slots, counts, tokens]).astype("<i4").tobytes()
        for peer in self._told:
            peer.send(step_id, "emitted tokens", len(slots), data, self._timeout_s)

    def close(self) -> None:
        """Leave."""
        for peer in {self._draft, *self._told}:
            peer.close()


class DraftEnd(_End):
    """At a rank of the draft.

    Parameters
    ----------
    door
        The draft's rank 0's, at `config.draft_door`.

    Raises
    ------
    TimeoutError
        If a rank of the model does not come in time; names it.
    """

    def __init__(self, config: RankConfig, door: socket.socket | None = None) -> None:
        super().__init__(config)
        self._told: list[_Peer] = []
        if config.draft_rank == 0:
            self._told = self._admit(door, range(config.tp_size))
            self._target = self._told[0]
        else:
            self._target = self._reach(0, config.target_door)

    def propose(self, step_id: int, slots: Array, token_ids: Array) -> None:
        """Send proposals to every rank of the model, if this is the draft's rank 0.

        Parameters
        ----------
        slots : (B,) int32, token_ids : (B, K) int32
        """
        data = np.concatenate([slots, token_ids.reshape(-1)]).astype("<i4").tobytes() if self._told else b""
        for peer in self._told:
            peer.send(step_id, "proposals", len(slots), data, self._timeout_s)

    def emitted(self, step_id: int) -> tuple[Array, Array, Array]:
        """Wait for what a step emitted.

        Returns
        -------
        slots : (N,) int32
        token_ids : (sum of counts,) int32
            Slot by slot.
        counts : (N,) int32

        Raises
        ------
        TimeoutError, ConnectionError
            Naming the model's rank.
        """
        num_slots, found = self._target.receive(step_id, "emitted tokens", _STEP_DEADLINES * self._timeout_s)
        slots, counts, token_ids = found[:num_slots], found[num_slots : 2 * num_slots], found[2 * num_slots :]
        if len(counts) != num_slots or counts.sum() != len(token_ids):
            raise PlanError(f"step {step_id}: {len(token_ids)} tokens of {num_slots} slots with counts {counts}")
        return slots, token_ids, counts

    def close(self) -> None:
        """Leave."""
        for peer in {self._target, *self._told}:
            peer.close()
