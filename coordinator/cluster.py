"""Ray places, starts and ends the ranks of one TP group. Steps do not travel through it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import select
import shutil
import signal
import socket
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tpserve.coordinator.errors import ClusterError
from tpserve.coordinator.process import make_ray_temp_dir, remove_folder
from tpserve.proto.rank import RankAddress, RankConfig

logger = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 80 << 20
"""Ray's smallest; nothing of ours is put there."""
_TEMP_DIR_BYTES = 16 << 20
"""For Ray's sockets and logs; without room for logs it goes on, without room to start it does not come up."""
_DAEMONS = ("gcs_server", "raylet")
"""Without which Ray starts and ends nothing."""


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """How ranks are started."""

    rank: RankConfig
    """Template of every rank; `rank` and `group_name` are set for each."""
    start_timeout_s: float
    """Loading the library and the weights on every rank must take no longer."""
    ray_address: str | None = None
    """An existing Ray cluster; None starts one on this machine, which ends with this process."""
    temp_dir: Path | None = None
    """Folder for a Ray started here, removed in the end; None makes one."""


class RankActor:
    """Runs in the actor's process; finds the rank's code by name, as coordinator and worker meet only over `proto`."""

    def __init__(self) -> None:
        self._rank: Any = importlib.import_module("tpserve.worker.actor").Rank()

    def start(self, config: RankConfig) -> RankAddress:
        """Start the rank; see `tpserve.worker.actor`."""
        address: RankAddress = self._rank.start(config)
        return address

    def open_door(self, host: str) -> str:
        """Open the place where ranks on GPUs meet; see `tpserve.worker.actor`."""
        address: str = self._rank.open_door(host)
        return address


class Cluster:
    """The Ray side of one replica."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._temp_dir = config.temp_dir
        self._placement: Any = None
        self._actors: list[Any] = []
        self._pidfds: list[int] = []
        """Of the ranks that run on this machine."""
        self._daemons: dict[str, int] = {}
        """Of a Ray that was started here: pidfds by name."""

    def connect(self) -> None:
        """Start or join Ray and reserve a place for each rank. Blocks for seconds.

        Raises
        ------
        ClusterError
            If Ray cannot be started or joined, or has no room for the group.
        """
        tp_size = self._config.rank.tp_size
        options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": True}
        if self._config.ray_address is None:
            if self._temp_dir is None:
                self._temp_dir = make_ray_temp_dir()
            free_bytes = shutil.disk_usage(self._temp_dir).free
            if free_bytes < _TEMP_DIR_BYTES:  # Ray would give up after half a minute, and not say why
                raise ClusterError(
                    f"Ray cannot be started: the disk of {self._temp_dir.parent} has {free_bytes >> 10} KiB left; "
                    f"free {_TEMP_DIR_BYTES >> 20} MiB or more"
                )
            options |= {
                "address": "local",
                "num_cpus": max(tp_size, os.cpu_count() or 1),
                "object_store_memory": _OBJECT_STORE_BYTES,
                "include_dashboard": False,
                "_temp_dir": str(self._temp_dir),
            }
        else:
            options["address"] = self._config.ray_address
        try:
            ray.init(**options)
            if self._config.ray_address is None:
                assert self._temp_dir is not None
                found = {name: pid for pid, name in _processes_of(self._temp_dir)}
                self._daemons = {name: os.pidfd_open(found[name]) for name in _DAEMONS}
            # All ranks on one node: they exchange activations in every layer.
            self._placement = placement_group([{"CPU": 1}] * tp_size, strategy="STRICT_PACK")
            if not self._placement.wait(30):
                raise ClusterError(f"no Ray node has {tp_size} free CPUs for {tp_size} ranks: free some, or lower --tp")
        except ClusterError:
            raise
        except Exception as error:  # Ray raises bare Exception when a daemon does not come up
            raise ClusterError(f"Ray cannot be started: {error}") from error

    async def wait_lost(self) -> str:
        """Wait until the Ray that was started here has lost a daemon; return which.

        Ray itself lets its processes go on for a minute and then ends them, the coordinator too. Of a cluster that was
        joined, Ray tells by the ranks that it loses.
        """
        loop, lost = asyncio.get_running_loop(), asyncio.Event()
        for pidfd in self._daemons.values():
            loop.add_reader(pidfd, lost.set)
        try:
            await lost.wait()
        finally:
            for pidfd in self._daemons.values():
                loop.remove_reader(pidfd)
        return self._lost_daemons()

    @property
    def is_lost(self) -> bool:
        """Whether the Ray that was started here can start and end nothing any more."""
        return bool(self._lost_daemons())

    def _lost_daemons(self) -> str:
        """Return the daemons that have ended by themselves; empty while all live."""
        ended, _, _ = select.select(self._daemons.values(), [], [], 0)
        return ", ".join(name for name, pidfd in self._daemons.items() if pidfd in ended)

    async def start_ranks(self) -> Sequence[RankAddress]:
        """Start every rank of a new group and return their addresses by rank.

        Raises
        ------
        ClusterError
            Naming the first rank that failed and why, or those that did not come in time.
        """
        if lost := self._lost_daemons():
            raise ClusterError(f"Ray has lost its {lost}: no rank can be started")
        template = self._config.rank
        group_name = f"tpserve-{uuid.uuid4().hex}"
        actor_class = ray.remote(RankActor)
        strategy = PlacementGroupSchedulingStrategy(self._placement)
        self._actors = [
            actor_class.options(
                num_cpus=1,
                max_restarts=0,  # one lost rank ends the group; the engine rebuilds it whole
                scheduling_strategy=strategy,
            ).remote()
            for _ in range(template.tp_size)
        ]
        if template.device is not None and template.tp_size > 1:
            template = replace(template, rendezvous=await self._open_door(template.host))
        starts = [
            asyncio.ensure_future(_result(actor.start.remote(_rank_config(template, rank, group_name))))
            for rank, actor in enumerate(self._actors)
        ]
        _, late = await asyncio.wait(starts, timeout=self._config.start_timeout_s, return_when=asyncio.FIRST_EXCEPTION)
        # A rank's own failure says more than that of those which waited for it.
        failures = [
            (rank, start.exception()) for rank, start in enumerate(starts) if start.done() and start.exception()
        ]
        for start in late:
            start.cancel()
        await asyncio.gather(*starts, return_exceptions=True)
        if failures:
            rank, error = min(failures, key=lambda failure: isinstance(failure[1], TimeoutError))
            raise ClusterError(f"rank {rank} cannot start: {_root_cause(error)}")
        if late:
            ranks = ", ".join(str(rank) for rank, start in enumerate(starts) if start in late)
            raise ClusterError(f"rank {ranks} did not start within {self._config.start_timeout_s:g} s")
        addresses = [start.result() for start in starts]
        for address in addresses:
            logger.info("rank %d: pid %d on %s", address.rank, address.pid, address.node)
            if address.node == socket.gethostname():
                with contextlib.suppress(OSError):  # it died just now, or lives in a container: then Ray ends it alone
                    self._pidfds.append(os.pidfd_open(address.pid))
        return addresses

    async def _open_door(self, host: str) -> str:
        """Let rank 0 open the group's rendezvous; return its address."""
        opening = _result(self._actors[0].open_door.remote(host))
        try:
            return await asyncio.wait_for(opening, self._config.start_timeout_s)
        except TimeoutError:
            raise ClusterError(f"rank 0 did not start within {self._config.start_timeout_s:g} s") from None
        except Exception as error:  # whatever the actor raised, Ray wraps it
            raise ClusterError(f"rank 0 cannot start: {_root_cause(error)}") from None

    async def kill_ranks(self) -> None:
        """End every rank of the group at once."""
        self._end_ranks()

    def _end_ranks(self) -> None:
        # Ray asks a process to end before it kills it. One that hangs does not answer, and would keep its place, which
        # the next group needs, for seconds more.
        pidfds, self._pidfds = self._pidfds, []
        for pidfd in pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
        actors, self._actors = self._actors, []
        if self._lost_daemons():
            return  # nobody is there who would do it
        for actor in actors:
            ray.kill(actor, no_restart=True)

    def shutdown(self) -> None:
        """End the ranks, and Ray if it was started here; leave nothing behind. Blocks."""
        if self._lost_daemons():
            # What Ray does to end takes minutes without its daemons.
            self._end_ranks()
            assert self._temp_dir is not None
            for pid, _ in _processes_of(self._temp_dir):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        elif ray.is_initialized():
            self._end_ranks()
            if self._placement is not None:
                remove_placement_group(self._placement)
            ray.shutdown()
        if self._temp_dir is not None:
            remove_folder(self._temp_dir)


def _processes_of(temp_dir: Path) -> Iterator[tuple[int, str]]:
    """Yield pid and name of each process of the Ray that has this folder, whoever its parent is by now."""
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # gone meanwhile
            if f"{temp_dir}/".encode() in (process / "cmdline").read_bytes():
                yield int(process.name), (process / "comm").read_text().strip()


async def _result(ref: Any) -> Any:
    return await ref


def _rank_config(template: RankConfig, rank: int, group_name: str) -> RankConfig:
    """Return the configuration of one rank; on GPUs, rank r has the group's first device plus r."""
    device = None if template.device is None else template.device + rank
    return replace(template, rank=rank, group_name=group_name, device=device)


def _root_cause(error: BaseException | None) -> str:
    """Return the remote exception's own words, without Ray's trace."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {cause}"
