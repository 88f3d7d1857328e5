"""`python -m tpserve.coordinator.router.ray_head CONFIG`: the Ray on which all replicas of one server are placed.

CONFIG is a JSON object (see `fleet`). Prints one JSON line with its address when it is up.
SIGTERM ends it, with every rank that is still there; the loss of one of its daemons ends it with 1.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from tpserve.coordinator.log import configure
from tpserve.coordinator.process import end_with_parent, keep_stdout_for_parent, remove_folder, tell_parent

logger = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 80 << 20
"""Ray's smallest."""
_DAEMONS = ("gcs_server", "raylet")
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

    temp_dir = Path(config["temp_dir"])
    try:
        ray.init(
            address="local",
            _node_ip_address="127.0.0.1",  # with any other one its daemons listen on all interfaces
            num_cpus=config["num_cpus"],
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            _temp_dir=str(temp_dir),
            logging_level=logging.WARNING,
            log_to_driver=False,  # each replica shows its own ranks' lines
        )
    except Exception as error:  # Ray raises bare Exception when a daemon does not come up
        tell_parent(parent, error=f"Ray cannot be started: {error}")
        remove_folder(temp_dir)
        return 1
    daemons = _pidfds_of(temp_dir)
    signal.signal(signal.SIGTERM, stop)  # Ray has put its own there
    tell_parent(parent, address=ray.get_runtime_context().gcs_address)
    lost: list[str] = []
    while not stopping and not lost:
        ended, _, _ = select.select(daemons.values(), [], [], _POLL_S)
        lost = [name for name, pidfd in daemons.items() if pidfd in ended]
    if lost and not stopping:
        logger.error("Ray has lost its %s", ", ".join(lost))
        tell_parent(parent, error=f"Ray has lost its {', '.join(lost)}: start the server again")
        for pid, _ in _processes_of(temp_dir):
            os.kill(pid, signal.SIGKILL)
        remove_folder(temp_dir)
        parent.flush()
        os._exit(1)  # what Ray does to end takes minutes without its daemons
    if os.getppid() != config["parent_pid"]:
        # The launcher is gone, and the replicas, told at the same moment, end their ranks first: without Ray they would
        # wait for it.
        _await_ranks(temp_dir, config["drain_timeout_s"] + _GRACE_S)
    ray.shutdown()
    remove_folder(temp_dir)
    return 0


def _await_ranks(temp_dir: Path, within_s: float) -> None:
    """Wait until no rank is left, and then for their coordinators to take leave of Ray."""
    raylets = [pid for pid, name in _processes_of(temp_dir) if name == "raylet"]
    deadline = time.monotonic() + within_s
    while any(map(_has_rank, raylets)) and time.monotonic() < deadline:
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


def _pidfds_of(temp_dir: Path) -> dict[str, int]:
    found = {name: pid for pid, name in _processes_of(temp_dir)}
    return {name: os.pidfd_open(found[name]) for name in _DAEMONS}


def _processes_of(temp_dir: Path) -> list[tuple[int, str]]:
    """Return pid and name of each process of the Ray that has this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int(process.name) != os.getpid() and f"{temp_dir}/".encode() in (process / "cmdline").read_bytes():
                found.append((int(process.name), (process / "comm").read_text().strip()))
        except OSError:  # gone meanwhile
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
