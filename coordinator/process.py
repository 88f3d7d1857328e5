"""What the processes of a replica owe each other: to end with their parent, to tell it things, to bind, to clean up.

A child writes one JSON object per line: where it listens, once it does; and why it ends, if it fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

_PR_SET_PDEATHSIG = 1
_REMOVE_WITHIN_S = 5.0


def end_with_parent(parent_pid: int) -> None:
    """Get SIGTERM when the parent dies, however it dies, so that no orphan keeps a port or a GPU.

    Parameters
    ----------
    parent_pid
        The parent as it knew itself; if it is gone already, this process ends at once.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGTERM)


def keep_stdout_for_parent() -> TextIO:
    """Return standard output for `tell_parent` alone; what anybody else writes there goes to standard error.

    For a process with a library that prints.
    """
    kept = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return kept


def tell_parent(to: TextIO | None = None, **facts: str) -> None:
    """Write one line for the parent to read, on standard output or what was kept of it: `address`, `url`, `error`."""
    to = to or sys.stdout
    to.write(json.dumps(facts) + "\n")
    to.flush()


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket, not yet listening.

    Raises
    ------
    OSError
        If the address is not ours or the port is taken.
    """
    family, kind, proto, _, address = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    bound = socket.socket(family, kind, proto)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def other_pids() -> Iterator[int]:
    """Yield the pid of each process of this host but this one."""
    pids = (int(process.name) for process in Path("/proc").glob("[0-9]*"))
    return (pid for pid in pids if pid != os.getpid())


def kill_session(leader: int) -> None:
    """Kill every process but this one of the session that a process leads or has just led.

    Soon after its end: a number is not given again while anything of its session is left, but is some time after that.
    """
    for pid in other_pids():
        with contextlib.suppress(ProcessLookupError):  # gone meanwhile
            if os.getsid(pid) == leader:
                os.kill(pid, signal.SIGKILL)


def make_ray_temp_dir() -> Path:
    """Return a new folder for Ray, with a short path: its sockets' paths must fit 107 bytes."""
    return Path(tempfile.mkdtemp(prefix="tpserve-ray-", dir="/tmp"))


def remove_folder(folder: Path) -> None:
    """Remove a folder, into which processes that are just ending may still write."""
    deadline = time.monotonic() + _REMOVE_WITHIN_S
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.02)
