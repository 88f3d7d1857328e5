"""How a rank on a CPU joins its group: in shared memory on one node, over TCP across nodes."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from tpserve.collectives.cpu import SharedMemoryCommunicator
from tpserve.collectives.rendezvous import Rendezvous
from tpserve.collectives.tcp import TcpCommunicator

if TYPE_CHECKING:
    from tpserve.worker.model import ModelRank

_ATTACH_TIMEOUT_S = 60.0
"""For the slowest rank's process to start, however short a step's deadline is."""


def attach_timeout_s(collective_timeout_s: float) -> float:
    """Return within what time ranks must come together."""
    return max(_ATTACH_TIMEOUT_S, collective_timeout_s)


def join(
    config: ModelRank, kernels: Any, door: socket.socket | None
) -> SharedMemoryCommunicator | TcpCommunicator | None:
    """Meet the other ranks and make the communicator the one that graphs call; None for a rank alone.

    Parameters
    ----------
    kernels
        The artifact's kernel library.
    door
        Rank 0's, if the group is on several nodes.

    Raises
    ------
    TimeoutError
        If a rank of the group does not come in time; names it.
    """
    if config.tp_size == 1:
        return None
    within_s = attach_timeout_s(config.collective_timeout_s)
    communicator: SharedMemoryCommunicator | TcpCommunicator
    if config.rendezvous is not None:
        with Rendezvous(
            config.rank,
            config.tp_size,
            config.rendezvous,
            config.group_name,
            timeout_s=within_s,
            door=door,
            tls=config.tls,
        ) as rendezvous:
            communicator = TcpCommunicator(
                rendezvous,
                config.host,
                config.rank,
                config.tp_size,
                secret=config.group_name,
                timeout_s=config.collective_timeout_s,
                attach_timeout_s=within_s,
                tls=config.tls,
            )
    else:
        communicator = SharedMemoryCommunicator(
            kernels,
            config.group_name,
            config.rank,
            config.tp_size,
            timeout_s=config.collective_timeout_s,
            attach_timeout_s=within_s,
        )
    communicator.register()
    return communicator
