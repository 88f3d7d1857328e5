"""A Ray actor is one rank. Ray places, starts and watches it; steps travel over gRPC."""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import threading
from typing import Any

from tpserve.proto.garbage import spare_standing_objects
from tpserve.proto.rank import Door, RankAddress, RankConfig

logger = logging.getLogger(__name__)

_LINGER_S = 5.0
"""Ray ends ranks sooner wherever it reaches them."""


class Rank:
    """The actor's class. Made by the coordinator through Ray, by name."""

    def __init__(self) -> None:
        gc.freeze()  # what Ray has made stands: a collection while a rank loads goes through it for 0.1 s
        self._server: Any = None
        self._runner: Any = None
        self._doors: dict[Door, socket.socket] = {}

    def open_door(self, host: str, door: Door) -> str:
        """Open a place where ranks meet; return its `host:port`. Before `start`.

        Parameters
        ----------
        door
            group: of the model's ranks, at its rank 0, or of a draft's own ranks on GPUs, at their first; draft: where
            the model's ranks and the draft's own meet.
        """
        from tpserve.collectives.rendezvous import listen

        self._doors[door] = listen(host)
        return f"{host}:{self._doors[door].getsockname()[1]}"

    def start(self, config: RankConfig) -> RankAddress:
        """Load the library and this rank's weights, join the group, listen.

        Raises
        ------
        WorkerError
            If the artifact or the weights cannot be used.
        TimeoutError
            If a rank of the group does not come in time; names it.
        """
        logging.basicConfig(
            level=logging.INFO,
            format=f"%(levelname)s rank {config.name}: %(message)s",
            stream=sys.stderr,
            force=True,
        )
        # Imported here: the actor's process loads TVM, the coordinator that pickles this class by name does not.
        from tpserve.worker.service import serve

        group, draft = self._doors.get("group"), self._doors.get("draft")
        if config.draft_rank is not None and config.device is not None:
            from tpserve.worker.device_draft_runner import DeviceDraftRunner

            self._runner = DeviceDraftRunner(config, _log_progress, group_door=group, link_door=draft)
        elif config.draft_rank is not None:
            from tpserve.worker.draft_runner import DraftRunner

            self._runner = DraftRunner(config, _log_progress, door=draft)
        elif config.device is None:
            from tpserve.worker.runner import Runner

            self._runner = Runner(config, _log_progress, door=group, drafts_door=draft)
        else:
            from tpserve.worker.device_runner import DeviceRunner

            self._runner = DeviceRunner(config, _log_progress, door=group)
        spare_standing_objects()
        on_end = _end_soon if config.is_away else None
        self._server, port = serve(self._runner, config.rank, config.host, config.token, on_end, config.tls)
        return RankAddress(
            config.rank,
            config.host,
            port,
            os.getpid(),
            socket.gethostname(),
            config.is_away,
            config.token,
            self._runner.collectives,
            config.draft_rank,
            size_times=self._runner.size_times,
        )


def _end_soon() -> None:
    """End this process when the coordinator has gone.

    If the node is cut off nobody else can, and once it is back the next group needs the place.
    """
    logger.warning("the coordinator has gone or is cut off: this rank ends")
    timer = threading.Timer(_LINGER_S, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _log_progress(done: int, total: int) -> None:
    if done == total:
        logger.info("loaded %d parameters", total)
