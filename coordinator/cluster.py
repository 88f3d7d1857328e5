"""Ray places, starts and ends the ranks of one TP group. Steps do not travel through it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tpserve.coordinator.distribution import Distribute, Distributor, Receiver, root_cause
from tpserve.coordinator.errors import ClusterError
from tpserve.coordinator.group_layout import GroupLayout, order
from tpserve.coordinator.own_ray import start_own_ray
from tpserve.coordinator.process import make_ray_temp_dir, remove_folder
from tpserve.coordinator.rank_actor import RankActor
from tpserve.coordinator.ray_daemons import RayDaemons
from tpserve.coordinator.ray_nodes import describe, find_own_node, wait_head_lost
from tpserve.proto.rank import (
    COORDINATOR_TLS_NAME,
    Door,
    Place,
    RankAddress,
    RankConfig,
    TlsIdentity,
    rank_name,
    rank_tls_name,
)

logger = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 80 << 20
"""Ray's smallest; nothing of ours is put there."""
_TEMP_DIR_BYTES = 16 << 20
"""For Ray's sockets and logs; without room for logs it goes on, without room to start it does not come up."""
_PLACE_TIMEOUT_S = 30.0
"""For a place in a cluster that stands already."""
_TELL_AFTER_S = 5.0
"""A rank that has no place for longer is told of in the log."""
_RANK_ENVIRONMENT = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
"""A rank chooses its GPU by number: peer memory needs every GPU visible in every rank."""

Placement = Literal["one-node", "pack", "spread"]
_STRATEGIES = {"one-node": "STRICT_PACK", "pack": "PACK", "spread": "SPREAD"}


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """How ranks are started."""

    rank: RankConfig
    """Template of every rank; `rank` and `group_name` are set for each."""
    start_timeout_s: float
    """Loading the library and the weights on every rank must take no longer."""
    ray_address: str | None = None
    """An existing Ray cluster, of which this machine is a node; None starts one here, which ends with this process."""
    placement: Placement = "one-node"
    """one-node: all ranks on one, as they exchange activations in every layer; pack: on as few as have room; spread: on
    as many as there are."""
    distribute: Distribute = "auto"
    """auto: nodes that lack the model or the library are sent it; never: they are an error."""
    temp_dir: Path | None = None
    """Folder for a Ray started here, removed in the end; None makes one."""


class Cluster:
    """The Ray side of one replica."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._temp_dir = config.temp_dir
        rank = config.rank
        self._distributor = Distributor(rank, config.distribute)
        self._num_draft_ranks = 0 if rank.speculation is None else rank.speculation.num_draft_ranks
        self._num_ranks = rank.tp_size + self._num_draft_ranks
        self._bundle = {"CPU": 1}
        if config.ray_address is not None and rank.device is not None:
            self._bundle["GPU"] = 1  # others may use the cluster; ours counts none and makes no environments
        self._placement: Any = None
        self._node_id = ""
        """Ray's, of this node."""
        self._head_lost = ""
        """What a cluster that was joined has lost, once it has."""
        self._actors: list[Any] = []
        self._tls: TlsIdentity | None = None
        """Of this process, in the present group; None: its ranks are on loopback."""
        self._pidfds: list[int] = []
        """Of the ranks that run on this machine."""
        self._daemons: RayDaemons | None = None
        """Of a Ray that was started here."""

    def connect(self) -> None:
        """Start or join Ray and reserve a place for each rank. Blocks for seconds.

        Raises
        ------
        ClusterError
            If Ray cannot be started or joined, or has no room for the group.
        """
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
                "num_ranks": self._num_ranks,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_temp_dir": str(self._temp_dir),
            }
        else:
            head, own = find_own_node(self._config.ray_address)
            options |= {"address": head, "_node_ip_address": own}
        try:
            start = start_own_ray if self._config.ray_address is None else ray.init
            start(**options)
            self._node_id = ray.get_runtime_context().get_node_id()
            if self._config.ray_address is None:
                assert self._temp_dir is not None
                self._daemons = RayDaemons(self._temp_dir)
        except Exception as error:  # Ray raises bare Exception when a daemon does not come up
            raise ClusterError(
                f"Ray cannot be {'joined' if self._config.ray_address else 'started'}: {error}"
            ) from error
        self._placement = placement_group(
            [self._bundle] * self._num_ranks, strategy=_STRATEGIES[self._config.placement]
        )
        if not self._placement.wait(_PLACE_TIMEOUT_S):
            raise ClusterError(self._no_room())

    def _no_room(self) -> str:
        """Say which resources are missing, and where they are."""
        count = self._num_ranks
        needed = " and ".join(f"{count} free {name}s" for name in self._bundle)
        nodes = describe(self._bundle)
        lower = "lower --tp or --draft-tp" if self._num_draft_ranks else "lower --tp"
        if self._config.placement == "one-node":
            remedy = f"free some, {lower}, or let ranks be on several nodes with --tp-across-nodes"
            return f"no Ray node has {needed} for {count} ranks: {nodes}; {remedy}"
        return f"the Ray nodes have not {needed} for {count} ranks: {nodes}; free some, add nodes, or {lower}"

    async def wait_lost(self) -> str:
        """Wait until Ray has lost what it needs to start and end ranks; return what.

        Of a Ray that was started here that is a daemon: Ray itself lets its processes go on for a minute and then ends
        them, the coordinator too. Of a cluster that was joined it is its head, or this node's place in it; other nodes
        show by the ranks on them.
        """
        if self._config.ray_address is not None:
            self._head_lost = await wait_head_lost()
            return self._head_lost
        assert self._daemons is not None
        loop, lost = asyncio.get_running_loop(), asyncio.Event()
        for pidfd in self._daemons.pidfds:
            loop.add_reader(pidfd, lost.set)
        try:
            await lost.wait()
        finally:
            for pidfd in self._daemons.pidfds:
                loop.remove_reader(pidfd)
        return self._lost()

    @property
    def is_lost(self) -> bool:
        """Whether Ray can start and end nothing any more."""
        return bool(self._lost())

    def _lost(self) -> str:
        """Return what Ray has lost; empty while it works."""
        if self._head_lost:
            return self._head_lost
        return "" if self._daemons is None else self._daemons.lost()

    async def start_ranks(self) -> Sequence[RankAddress]:
        """Start every rank of a new group and return their addresses by rank, the draft's own behind the model's.

        Raises
        ------
        ClusterError
            Naming the first rank that failed and why, or those that did not come in time.
        """
        if lost := self._lost():
            raise ClusterError(f"Ray has lost its {lost}: no rank can be started")
        actor_class = ray.remote(RankActor)
        options: dict[str, Any] = {"num_cpus": 1, "max_restarts": 0}  # the engine rebuilds a lost rank's group whole
        if "GPU" in self._bundle:
            options |= {"num_gpus": 1, "runtime_env": {"env_vars": _RANK_ENVIRONMENT}}
        self._actors = [
            actor_class.options(
                **options,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=at),
            ).remote()
            for at in range(self._num_ranks)
        ]
        configs = await self._configure(await self._locate())
        starts = [
            asyncio.ensure_future(_result(actor.start.remote(config)))
            for actor, config in zip(self._actors, configs, strict=True)
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
            raise ClusterError(f"rank {configs[rank].name} cannot start: {root_cause(error)}")
        if late:
            ranks = ", ".join(config.name for config, start in zip(configs, starts, strict=True) if start in late)
            raise ClusterError(f"rank {ranks} did not start within {self._config.start_timeout_s:g} s")
        addresses = [replace(start.result(), tls=self._tls) for start in starts]
        for address in addresses:
            logger.info("rank %s: pid %d on %s", address.name, address.pid, address.node)
            if not address.is_away:
                with contextlib.suppress(OSError):  # it died just now
                    self._pidfds.append(os.pidfd_open(address.pid))
        return addresses

    async def _locate(self) -> list[Place]:
        """Wait until every rank has a place, and put them in order: this node's first, neighbours side by side."""
        located = [asyncio.ensure_future(_result(actor.locate.remote())) for actor in self._actors]
        timeout_s = self._config.start_timeout_s
        try:
            for wait_s in (min(_TELL_AFTER_S, timeout_s), max(0.0, timeout_s - _TELL_AFTER_S)):
                _, late = await asyncio.wait(located, timeout=wait_s, return_when=asyncio.FIRST_EXCEPTION)
                for each in located:
                    if each.done() and (error := each.exception()) is not None:
                        raise ClusterError(f"a rank's process cannot start: {root_cause(error)}")
                if not late:
                    break
                nodes = await asyncio.to_thread(describe, self._bundle)
                logger.warning("%d of the ranks wait for a node, or for their process to start: %s", len(late), nodes)
            else:
                missing = f"{len(late)} of the ranks found no node, or did not start"
                raise ClusterError(f"{missing}, within {timeout_s:g} s: {nodes}")
            places: list[Place] = [each.result() for each in located]
        finally:
            for each in located:
                each.cancel()
        ranks = order(places, self._node_id)
        self._actors = [self._actors[at] for at in ranks]
        places = [places[at] for at in ranks]
        _warn_of_niceness(places)
        return places

    async def _configure(self, places: Sequence[Place]) -> list[RankConfig]:
        """Return each rank's configuration; its node has by then what the rank loads."""
        layout = GroupLayout(self._config.rank, places, self._node_id)
        receivers = {node: Receiver(places[rank].node, self._actors[rank]) for node, rank in layout.away.items()}
        folders = await self._distributor.ensure(receivers) if receivers else {}
        rendezvous, draft_door, target_door, draft_rendezvous = "", "", "", ""
        if layout.needs_door:
            rendezvous = await self._open_door(0, layout.hosts[0], "group")
        if self._num_draft_ranks:
            first = self._config.rank.tp_size
            draft_door = await self._open_door(first, layout.hosts[first], "draft")
            if self._num_draft_ranks > 1 and self._config.rank.device is not None:
                draft_rendezvous = await self._open_door(first, layout.hosts[first], "group")
            elif self._num_draft_ranks > 1:
                target_door = await self._open_door(0, layout.hosts[0], "draft")
        doors = (draft_door, target_door, draft_rendezvous)
        return layout.configs(rendezvous, folders, *doors, tls=self._certify(layout))

    def _certify(self, layout: GroupLayout) -> list[TlsIdentity] | None:
        """Return a certificate for each rank, which Ray carries there; None if they stay on loopback."""
        self._tls = None
        if not layout.leaves_loopback:
            return None
        from tpserve.coordinator.group_authority import GroupAuthority  # most groups need none

        logger.info("the ranks listen on their nodes' addresses, within mutual TLS")
        authority = GroupAuthority()
        self._tls = authority.issue(COORDINATOR_TLS_NAME)
        return [authority.issue(rank_tls_name(rank)) for rank in range(self._num_ranks)]

    async def _open_door(self, rank: int, host: str, door: Door) -> str:
        """Let a rank open a door; return its address."""
        name = rank_name(rank, self._config.rank.tp_size)
        opening = _result(self._actors[rank].open_door.remote(host, door))
        try:
            return await asyncio.wait_for(opening, self._config.start_timeout_s)
        except TimeoutError:
            raise ClusterError(f"rank {name} did not start within {self._config.start_timeout_s:g} s") from None
        except Exception as error:  # whatever the actor raised, Ray wraps it
            raise ClusterError(f"rank {name} cannot start: {root_cause(error)}") from None

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
        if self._lost():
            return  # nobody is there who would do it
        for actor in actors:
            ray.kill(actor, no_restart=True)

    def shutdown(self) -> None:
        """End the ranks, and Ray if it was started here; leave nothing behind. Blocks."""
        if self._lost():
            self._end_ranks()
        elif ray.is_initialized():
            self._end_ranks()
            if self._placement is not None:
                remove_placement_group(self._placement)
            ray.shutdown()
        if self._daemons is not None:
            self._daemons.kill()  # also those that would notice later that Ray has ended
        if self._temp_dir is not None:
            remove_folder(self._temp_dir)


def _warn_of_niceness(places: Sequence[Place]) -> None:
    """Say which ranks other processes of their hosts go before, by the way that Ray was started there."""
    own = os.nice(0)
    late = [f"rank {rank} on {place.node}" for rank, place in enumerate(places) if place.niceness > own]
    if late:
        logger.warning(
            "%s run at nice %d: other processes of these hosts go before them; start Ray there with "
            "RAY_worker_niceness=0",
            ", ".join(late),
            max(place.niceness for place in places),
        )


async def _result(ref: Any) -> Any:
    return await ref
