"""Two hosts on one machine: each has a network, a host name and a /dev/shm of its own, and a cable to the other.

A third cable leads from the first host to the machine itself, where clients are. Everything ends with the processes
that hold the namespaces.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil
import pytest

from server import environment, processes_of

CLIENT, DOOR = (f"198.18.{os.getpid() % 250}.{host}" for host in (1, 2))
"""Of the machine itself and of the first host, between them (RFC 2544 sets this network aside for tests), another for
each process that tests."""
FIRST, SECOND = "198.19.0.1", "198.19.0.2"
"""Of the two hosts, between them."""
GCS_PORT = 6379
RAY_ENVIRON = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "GRPC_ENABLE_FORK_SUPPORT": "0",
    "RAY_worker_niceness": "15",  # Ray's own
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}
"""Of all that joins the cluster."""


def _command(*arguments: str | Path, within_s: float = 60.0, environ: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(argument) for argument in arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=within_s,
        env=environ,
    )
    assert done.returncode == 0, f"{' '.join(map(str, arguments))}: {done.stdout}"
    return done.stdout


@dataclass(slots=True)
class Host:
    """One of them; `inside` is the command that runs another there."""

    name: str
    address: str
    holder: subprocess.Popen[bytes]
    ray_dir: Path
    environ: dict[str, str] = field(repr=False)

    @property
    def inside(self) -> tuple[str, ...]:
        return ("nsenter", "--target", str(self.holder.pid), "--net", "--mount", "--uts", "--")

    def run(self, *arguments: str | Path, within_s: float = 60.0) -> str:
        return _command(*self.inside, *arguments, within_s=within_s, environ=self.environ)

    def start_ray(self, *, num_cpus: int) -> None:
        """Start a Ray head on the first host, a further node on the second."""
        joins: tuple[str, ...] = ("--address", f"{FIRST}:{GCS_PORT}")
        if self.address == FIRST:
            joins = ("--head", "--port", str(GCS_PORT), "--include-dashboard", "false")
        flags = ("--node-ip-address", self.address, "--num-cpus", str(num_cpus), "--temp-dir", self.ray_dir)
        store = ("--object-store-memory", str(80 << 20), "--disable-usage-stats")
        self.run(Path(sys.executable).parent / "ray", "start", *joins, *flags, *store)

    def kill_all(self) -> None:
        """Kill everything that runs there, as a power cut does; the host itself stays."""
        _kill_all(
            lambda: {pid for pid in psutil.pids() if _network(pid) == _network(self.holder.pid)} - {self.holder.pid}
        )

    def set_cable(self, device: str, state: str) -> None:
        """Pull the cable, or put it back: `state` is down or up."""
        self.run("ip", "link", "set", device, state)


@dataclass(slots=True)
class TwoHosts:
    """The first host, where the server is, and the second."""

    first: Host
    second: Host
    mark: str

    def cut(self) -> None:
        """Cut the second host off from the first."""
        self.second.set_cable("cable", "down")

    def restore(self) -> None:
        self.second.set_cable("cable", "up")

    @classmethod
    @contextmanager
    def connected(cls, mark: str, *, hidden: Sequence[Path], second_home: Path) -> Iterator[Self]:
        """Make both; skip the test where that is not allowed.

        Parameters
        ----------
        mark
            By which `processes_of` finds what runs there.
        hidden
            Folders that the second host does not have.
        second_home
            The second host's cache.
        """
        _require_namespaces()
        root = Path(tempfile.mkdtemp(prefix="tpserve-hosts-", dir="/tmp"))  # Ray's sockets need a short path
        hide = " && ".join(f'mount -t tmpfs tmpfs "{folder}"' for folder in (Path("/dev/shm"), *hidden))
        holders: list[subprocess.Popen[bytes]] = []
        try:
            hosts = []
            for name, address, mounts, home in (
                ("host-a", FIRST, "true", None),
                ("host-b", SECOND, hide, second_home),
            ):
                environ = environment(mark, RAY_ENVIRON)
                if home is not None:
                    environ["TPSERVE_HOME"] = str(home)
                script = f"hostname {name} && {mounts} && ip link set lo up && echo ready && exec sleep 3600"
                holder = subprocess.Popen(
                    ["unshare", "--net", "--mount", "--uts", "sh", "-c", script], stdout=subprocess.PIPE, env=environ
                )
                holders.append(holder)
                assert holder.stdout is not None
                with holder.stdout:
                    assert holder.stdout.readline() == b"ready\n", f"{name} cannot be made"
                hosts.append(Host(name, address, holder, root / name[-1], environ))
            first, second = hosts
            _connect(first, second)
            yield cls(first, second, mark)
        finally:
            _end_all(mark, {_network(holder.pid) for holder in holders})
            for holder in holders:
                holder.wait(10)
            shutil.rmtree(root, ignore_errors=True)


def _connect(first: Host, second: Host) -> None:
    to_first, to_second = (f"/proc/{host.holder.pid}/ns/net" for host in (first, second))
    ours = f"tps{os.getpid()}"
    _command("ip", "link", "add", ours, "type", "veth", "peer", "name", "door", "netns", to_first)
    _command("ip", "addr", "add", f"{CLIENT}/30", "dev", ours)
    _command("ip", "link", "set", ours, "up")
    first.run("ip", "addr", "add", f"{DOOR}/30", "dev", "door")
    first.run("ip", "link", "set", "door", "up")
    first.run("ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", to_second)
    for host in (first, second):
        host.run("ip", "addr", "add", f"{host.address}/30", "dev", "cable")
        host.run("ip", "link", "set", "cable", "up")


def _require_namespaces() -> None:
    missing = [name for name in ("ip", "nsenter", "unshare") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: two hosts need network namespaces (iproute2, util-linux)")
    probe = "ip link add tps0 type veth peer name tps1 && mount -t tmpfs tmpfs /mnt && hostname probe"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "sh", "-c", probe], capture_output=True, text=True, check=False
    )
    if os.geteuid() != 0 or tried.returncode != 0:
        pytest.skip(f"two hosts need root and network namespaces: {tried.stderr.strip() or 'not root'}")


def _end_all(mark: str, networks: set[str]) -> None:
    """Kill what has the mark, and what is in these networks: some of Ray's processes overwrite their environment."""
    _kill_all(
        lambda: (
            {process.pid for process in processes_of(mark)}
            | {pid for pid in psutil.pids() if _network(pid) in networks}
        )
    )


def _kill_all(find: Callable[[], set[int]]) -> None:
    deadline = time.monotonic() + 10
    while (found := find()) and time.monotonic() < deadline:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _network(pid: int) -> str:
    """Return the name of a process's network namespace; empty if it has ended."""
    with suppress(OSError):
        return str(Path(f"/proc/{pid}/ns/net").readlink())
    return ""
