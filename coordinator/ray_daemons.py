"""The processes of a Ray that this process has started: whether those that it cannot do without are there, and an end.

What Ray itself does to end takes minutes without them.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Collection
from pathlib import Path

from tpserve.coordinator.process import kill_session, other_pids

_DAEMONS = ("gcs_server", "raylet")
"""Without which Ray starts and ends nothing."""


class RayDaemons:
    """Of the Ray that has a folder.

    Raises
    ------
    KeyError
        If one of them is not there.
    """

    def __init__(self, temp_dir: Path) -> None:
        self._folder = f"{temp_dir}/".encode()
        pids = {_read(pid, "comm").decode().strip(): pid for pid in other_pids() if self._names_folder(pid)}
        self._pidfds = {name: os.pidfd_open(pids[name]) for name in _DAEMONS}
        self.raylet = pids["raylet"]
        """Its pid."""

    @property
    def pidfds(self) -> Collection[int]:
        """Readable when one has ended."""
        return self._pidfds.values()

    def lost(self, within_s: float = 0.0) -> str:
        """Return which have ended, if one does in that time; empty otherwise."""
        ended, _, _ = select.select(self.pidfds, [], [], within_s)
        return ", ".join(name for name, pidfd in self._pidfds.items() if pidfd in ended)

    def kill(self) -> None:
        """Kill all that is left, whoever its parent is by now.

        A raylet's agents, or what stands for them, name no folder in their command lines; but all that Ray starts stays
        in the session of who started it, which is this process's own, if it leads one.
        """
        for pid in filter(self._names_folder, other_pids()):
            with contextlib.suppress(ProcessLookupError):  # gone meanwhile
                os.kill(pid, signal.SIGKILL)
        kill_session(os.getpid())

    def _names_folder(self, pid: int) -> bool:
        return self._folder in _read(pid, "cmdline")


def _read(pid: int, file: str) -> bytes:
    """Return what a file of a process in /proc says; nothing if it is gone or not ours to look at."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{file}").read_bytes()
    return b""
