"""Between a model's GPUs and those that its draft has to itself: letters over peer memory, queued like any kernel.

Before a round the draft's first rank sends every rank of the model its draft tokens. After each step that runs tokens
the model's first rank tells every rank of the draft where the slots are. No host takes part in either; what a CPU's
ranks say over TCP is in `draft_link`. A letter costs its ends a kernel each (kernels/draft_link.cu).
"""

from __future__ import annotations

import ctypes
import socket
from functools import partial
from typing import Any

import cupy

from tpserve.collectives.rendezvous import Rendezvous
from tpserve.proto.rank import RankConfig, rank_name
from tpserve.proto.speculation import Speculation
from tpserve.worker.device_group import START_TIMEOUT_S
from tpserve.worker.errors import WorkerError
from tpserve.worker.group_tls import group_tls

_DRAFT_DEADLINES = 1.25
"""The model waits longer for draft tokens than the draft's ranks for each other, by this many times the deadline of one
collective: if one of those is late, the others shall say so first."""
_STEP_DEADLINES = 2.0
"""The draft waits longer for the end of a step than the coordinator does, who hears of all ranks."""


class DeviceDraftLink:
    """One rank's end of the link: of the model, or of its draft.

    Each function below that takes the slots' state (`device_speculation.State`, four int32 tensors by slot) queues one
    letter on the current stream; both sides queue the same ones in the same order, as their plans say. None may be
    captured: graphs are launched before anybody is there to answer.

    Parameters
    ----------
    kernels
        The artifact's kernel library.
    config
        Of this rank, as it is told; with a draft of its own ranks.
    door
        The draft's first rank's, at `config.draft_door`; None at all others.

    Raises
    ------
    TimeoutError
        If a rank does not come in time; names it.
    WorkerError
        If the two sides cannot reach each other's memory; names the remedy.
    """

    def __init__(
        self, kernels: Any, config: RankConfig, speculation: Speculation, door: socket.socket | None = None
    ) -> None:
        first, size = config.tp_size, config.tp_size + speculation.num_draft_ranks
        ranks = (*range(first, size), *range(first))  # it meets at the draft's door
        self._own, self._timeout_s = config.name, config.collective_timeout_s
        self._name = partial(rank_name, tp_size=first)
        self._rendezvous = Rendezvous(
            config.rank,
            size,
            config.draft_door,
            config.group_name,
            timeout_s=START_TIMEOUT_S,
            door=door,
            tls=group_tls(config),
            ranks=ranks,
        )
        self._require_reach(config)
        runtime = cupy.cuda.runtime
        num_words = config.max_num_seqs * (2 + speculation.max_num_draft_tokens)
        self._mailbox = runtime.malloc(kernels["link_bytes"](num_words))  # only whole allocations can be shared
        self._late = cupy.cuda.alloc_pinned_memory(4)
        ctypes.memset(self._late.ptr, 0, 4)
        kernels["link_clear"](self._mailbox, num_words, self._late.ptr)
        given = self._rendezvous.exchange(bytes(runtime.ipcGetMemHandle(self._mailbox)))
        handles = dict(zip(ranks, given, strict=True))
        self._opened: list[int] = []
        # A rank of the model reads what the draft's first one writes, and the other way round.
        is_draft = config.rank >= first
        ours, theirs = (range(first, size), range(first)) if is_draft else (range(first), range(first, size))
        readers = theirs if config.rank == ours[0] else range(0)
        addresses = {rank: self._open(handles[rank], rank) for rank in {theirs[0], *readers}}
        self._functions = kernels["link_create"](
            self._mailbox,
            addresses[theirs[0]],
            theirs[0],
            ours.index(config.rank),
            [addresses[rank] for rank in readers],
            list(readers),
            num_words,
            self._timeout_s,
            self._timeout_s * (_STEP_DEADLINES if is_draft else _DRAFT_DEADLINES),
        )
        self._writes = len(readers) > 0
        self._rendezvous.exchange(b"mapped")  # nobody may send before everybody is there

    # ---- at the model's ranks

    def take_drafts(self, state: tuple[Any, ...]) -> None:
        """Queue the wait for the draft tokens of a round."""
        self._functions["take_drafts"](*state)

    def tell(self, state: tuple[Any, ...]) -> None:
        """Queue the letter of where the slots are after a step, if this is the model's first rank."""
        if self._writes:
            self._functions["tell"](*state)

    # ---- at the draft's

    def send_drafts(self, state: tuple[Any, ...]) -> None:
        """Queue the letter of a round's draft tokens, if this is the draft's first rank."""
        if self._writes:
            self._functions["send_drafts"](*state)

    def take_told(self, state: tuple[Any, ...]) -> None:
        """Queue the wait for where the slots are after a step."""
        self._functions["take_told"](*state)

    def raise_if_late(self) -> None:
        """Look whether a step that has ended waited in vain.

        Raises
        ------
        TimeoutError
            Naming the rank that a kernel waited for in vain.
        """
        word = ctypes.c_int32.from_address(self._late.ptr).value
        if word:
            other = self._name(word - 1)
            raise TimeoutError(
                f"rank {self._own} waited {self._timeout_s:g} s or more for rank {other} to send a letter or take one"
            )

    def close(self) -> None:
        """Leave, when all ranks do; memory that another rank still maps must not be freed before."""
        for address in self._opened:
            cupy.cuda.runtime.ipcCloseMemHandle(address)
        self._rendezvous.exchange(b"unmapped")
        cupy.cuda.runtime.free(self._mailbox)
        self._rendezvous.close()

    def _open(self, handle: bytes, rank: int) -> int:
        runtime = cupy.cuda.runtime
        try:
            address: int = runtime.ipcOpenMemHandle(handle, 1)  # 1: peer access is enabled as needed
        except runtime.CUDARuntimeError as error:
            raise WorkerError(f"{self._unreachable(rank)}: {error}") from None
        self._opened.append(address)
        return address

    def _require_reach(self, config: RankConfig) -> None:
        """Check that all ranks are on one host, on GPUs that reach each other's memory."""
        facts = self._rendezvous.exchange(f"{socket.gethostname()} {config.device} {config.rank}".encode())
        for host, device, rank in (fact.decode().split() for fact in facts):
            is_here = host == socket.gethostname()
            if not is_here or not (
                int(device) == config.device or cupy.cuda.runtime.deviceCanAccessPeer(config.device, int(device))
            ):
                raise WorkerError(self._unreachable(int(rank)))

    def _unreachable(self, rank: int) -> str:
        return (
            f"rank {self._own} cannot reach the memory of rank {self._name(rank)}, by which a model and a draft with "
            "GPUs of its own exchange tokens: give --draft-placement colocated"
        )
