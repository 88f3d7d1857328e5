"""A rank's place in its group of GPUs: which collectives the graph calls, and how a late rank shows.

Nothing here runs within a step; kernels that wait in vain leave a word in the host's memory.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import cupy

from tpserve.collectives.nccl import NcclCommunicator
from tpserve.collectives.push import PushCommunicator
from tpserve.collectives.rendezvous import Rendezvous
from tpserve.proto.rank import RankConfig, rank_name
from tpserve.worker.group_tls import group_tls

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 600.0
"""For the slowest rank to load its weights or to capture its graphs; the coordinator's own deadline is shorter or the
same."""


class DeviceGroup:
    """The communicator of one rank, and its rendezvous.

    Parameters
    ----------
    kernels
        The artifact's kernel library.
    max_hidden_size
        Of the rows that are reduced: the larger of a model's and that of a draft with the same ranks.
    door
        The first rank's, or None.
    own_draft
        The ranks of a draft that has its own, behind the model's; None: those of a model.

    Raises
    ------
    TimeoutError
        If a rank does not come in time; names it.
    RuntimeError
        If collectives over peer memory were asked for and the GPUs cannot reach one another.
    """

    def __init__(
        self,
        kernels: Any,
        config: RankConfig,
        max_hidden_size: int,
        door: socket.socket | None,
        own_draft: range | None = None,
    ) -> None:
        ranks = range(config.tp_size) if own_draft is None else own_draft
        self._name = partial(rank_name, tp_size=config.tp_size if own_draft is None else own_draft[0])
        self._ranks = ranks
        self._own = self._name(ranks[config.rank])
        self._timeout_s = config.collective_timeout_s
        size = config.tp_size
        self._rendezvous = Rendezvous(
            ranks[config.rank],
            size,
            config.rendezvous,
            config.group_name,
            timeout_s=START_TIMEOUT_S,
            door=door,
            tls=group_tls(config),
            ranks=ranks,
        )
        self._communicator: PushCommunicator | NcclCommunicator
        may_map = config.collectives == "auto" and not config.across_nodes
        if config.collectives == "push" or (may_map and self._can_map(config.device)):
            self._communicator = PushCommunicator(
                kernels, self._rendezvous, config.rank, size, max_hidden_size, timeout_s=config.collective_timeout_s
            )
        else:
            if config.collectives == "auto":
                logger.warning("ranks cannot map each other's memory: collectives go by NCCL, which is slower")
            self._communicator = NcclCommunicator(kernels, self._rendezvous, config.rank, size)
        self._communicator.register()

    @property
    def backend(self) -> str:
        """By which ranks exchange activations."""
        return self._communicator.backend

    @property
    def gather_logits(self) -> Callable[..., bool]:
        """What brings logits by rank together, see `PushCommunicator.gather_logits`."""
        return self._communicator.gather_logits

    def meet(self, what: str) -> None:
        """Wait until every rank has come as far.

        Raises
        ------
        RuntimeError
            If ranks meet at different places.
        """
        words = self._rendezvous.exchange(what.encode())
        if any(word != what.encode() for word in words):
            raise RuntimeError(f"rank {self._own} is at {what!r}, the group at {[word.decode() for word in words]}")

    def raise_if_late(self) -> None:
        """Look whether a step that has ended waited in vain.

        Raises
        ------
        TimeoutError
            Naming the rank that a kernel waited for in vain.
        """
        late = self._communicator.late_rank()
        if late is not None:
            late_name = self._name(self._ranks[late])
            raise TimeoutError(f"rank {self._own} waited {self._timeout_s:g} s in a collective for rank {late_name}")

    def close(self) -> None:
        """Leave, when all ranks do."""
        self._communicator.close()
        self._rendezvous.close()

    def _can_map(self, device: int | None) -> bool:
        """Tell whether all ranks are on one host, on GPUs that reach each other's memory; all ranks get one answer."""
        facts = self._rendezvous.exchange(f"{socket.gethostname()} {device}".encode())
        hosts = {fact.split()[0] for fact in facts}
        peers = {int(fact.split()[1]) for fact in facts} - {device}
        reach = len(hosts) == 1 and all(cupy.cuda.runtime.deviceCanAccessPeer(device, peer) for peer in peers)
        return all(answer == b"yes" for answer in self._rendezvous.exchange(b"yes" if reach else b"no"))
