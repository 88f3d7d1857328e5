"""`python -m tpserve.coordinator.router.ray_head CONFIG`: the Ray on which all replicas of one server are placed.

CONFIG is a JSON object (see `fleet`). Prints one JSON line with its address when it is up.
SIGTERM ends it, with every rank that is still there; the loss of one of its daemons ends it with 1.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from tpserve.coordinator.log import configure
from tpserve.coordinator.process import end_with_parent, keep_stdout_for_parent, remove_folder, tell_parent
from tpserve.coordinator.ray_daemons import RayDaemons

logger = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 80 << 20
"""Ray's smallest."""
_POLL_S = 0.5
_GRACE_S = 10.0
_LEAVE_S = 2.0
_RANK = b"ray::RankActor"
"""How Ray names the process of a rank."""


def main() -> int:
    """Run it; return the exit code."""
    config: dict[str, Any] = json.loads(sys.argv[1])
    parent = keep_stdout_for_parent()
    configure(config["log_format"], "ray")
    stopping = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    end_with_parent(config["parent_pid"])
    import ray

    from tpserve.coordinator.own_ray import start_own_ray

    temp_dir = Path(config["temp_dir"])
    try:
        start_own_ray(
            config["num_ranks"],
            is_joined=True,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=str(temp_dir),
            logging_level=logging.WARNING,
            log_to_driver=False,  # each replica shows its own ranks' lines
        )
    except Exception as error:  # Ray raises bare Exception when a daemon does not come up
        tell_parent(parent, error=f"Ray cannot be started: {error}")
        remove_folder(temp_dir)
        return 1
    daemons = RayDaemons(temp_dir)
    signal.signal(signal.SIGTERM, stop)  # Ray has put its own there
    tell_parent(parent, address=ray.get_runtime_context().gcs_address)
    lost = ""
    while not stopping and not lost:
        lost = daemons.lost(_POLL_S)
    if lost and not stopping:
        logger.error("Ray has lost its %s", lost)
        tell_parent(parent, error=f"Ray has lost its {lost}: start the server again")
        daemons.kill()
        remove_folder(temp_dir)
        parent.flush()
        os._exit(1)  # what Ray does to end takes minutes without its daemons
    if os.getppid() != config["parent_pid"]:
        # The launcher is gone, and the replicas, told at the same moment, end their ranks first: without Ray they would
        # wait for it.
        _await_ranks(daemons.raylet, config["drain_timeout_s"] + _GRACE_S)
    ray.shutdown()
    remove_folder(temp_dir)
    return 0


def _await_ranks(raylet: int, within_s: float) -> None:
    """Wait until no rank is left, and then for their coordinators to take leave of Ray."""
    deadline = time.monotonic() + within_s
    while _has_rank(raylet) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    time.sleep(_LEAVE_S)


def _has_rank(raylet: int) -> bool:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):  # gone meanwhile
            if (process / "cmdline").read_bytes().startswith(_RANK) and f"PPid:\t{raylet}\n" in (
                process / "status"
            ).read_text():
                return True
    return False


if __name__ == "__main__":
    sys.exit(main())
