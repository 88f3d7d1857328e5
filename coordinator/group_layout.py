"""Which rank of a group is where, and what each is therefore told: pure, no Ray and no waiting.

Behind the model's ranks are those that a draft has to itself, if it has any.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tpserve.coordinator.distribution import with_folders
from tpserve.coordinator.errors import ClusterError
from tpserve.proto.rank import Place, RankConfig, TlsIdentity


def order(places: Sequence[Place], own_node_id: str) -> list[int]:
    """Return the places in the order of ranks: the coordinator's node first, and neighbours side by side."""
    return sorted(
        range(len(places)),
        key=lambda at: (places[at].node_id != own_node_id, places[at].node_id, places[at].device or 0),
    )


class GroupLayout:
    """The ranks of one group, each at its place.

    Parameters
    ----------
    template
        What all ranks have in common.
    places
        By rank.
    own_node_id
        The coordinator's.

    Raises
    ------
    ClusterError
        If what was asked for cannot be at these places; names flag and nodes.
    """

    def __init__(self, template: RankConfig, places: Sequence[Place], own_node_id: str) -> None:
        self._places = places
        self._own_node_id = own_node_id
        ours, drafts = places[: template.tp_size], places[template.tp_size :]
        self.is_across_nodes = len({place.node_id for place in ours}) > 1
        self._template = replace(
            template,
            group_name=f"tpserve-{uuid.uuid4().hex}",
            token=secrets.token_urlsafe(32),
            across_nodes=self.is_across_nodes,
        )
        if self.is_across_nodes and template.collectives == "push":
            raise ClusterError(
                "--collectives push works over memory that GPUs of one node share, and the ranks are on "
                f"{_names(ours)}: take auto or nccl"
            )
        size = 1 if template.speculation is None else template.speculation.draft_tp_size
        if template.device is not None:
            # GPUs have the draft whole, or share it by the group's own collectives, which may cross nodes.
            if drafts and len({place.node_id for place in places}) > 1:
                raise ClusterError(
                    "--draft-placement dedicated works over memory that GPUs of one node share, and the ranks are on "
                    f"{_names(places)}: give --draft-placement colocated, or lower --tp or --draft-tp"
                )
            return
        for first in range(0, len(places), size) if not drafts else (template.tp_size,):
            group = places[first : first + size]
            if len({place.node_id for place in group}) > 1:
                raise ClusterError(
                    f"--draft-tp {size} would put a draft group, whose ranks share memory, on {_names(group)}: lower it"
                )

    @property
    def away(self) -> dict[str, int]:
        """A rank of each node but the coordinator's, by the node's id."""
        return {place.node_id: rank for rank, place in enumerate(self._places) if self._is_away(place)}

    @property
    def leaves_loopback(self) -> bool:
        """Whether somebody comes to a rank from another node: then all of the group's connections are within TLS."""
        return bool(self.away) or self.is_across_nodes

    @property
    def hosts(self) -> list[str]:
        """By rank, where it listens: on loopback, unless somebody comes from another node."""
        if self.leaves_loopback:
            return [place.host for place in self._places]
        return [self._template.host] * len(self._places)

    @property
    def needs_door(self) -> bool:
        """Whether the ranks meet at a door of rank 0, and not in shared memory alone."""
        return self._template.tp_size > 1 and (self._template.device is not None or self.is_across_nodes)

    def configs(
        self,
        rendezvous: str,
        folders: Mapping[str, Mapping[str, Path]],
        draft_door: str = "",
        target_door: str = "",
        draft_rendezvous: str = "",
        *,
        tls: Sequence[TlsIdentity] | None = None,
    ) -> list[RankConfig]:
        """Return what each rank is told.

        Parameters
        ----------
        rendezvous, draft_rendezvous
            Addresses of the doors of the model's ranks and, on GPUs, of a draft's own; empty without one.
        folders
            What ranks load, by kind, at each node of `away`.
        draft_door, target_door
            See `RankConfig`.
        tls
            By rank; needed if the group leaves loopback.
        """
        if self.leaves_loopback and tls is None:
            raise ValueError("ranks that listen on a network need certificates")
        configs = []
        for rank, (place, host) in enumerate(zip(self._places, self.hosts, strict=True)):
            device = self._template.device
            if device is not None:  # without a GPU of Ray's, the group's first device plus the rank
                device = device + rank if place.device is None else place.device
            own = rendezvous if rank < self._template.tp_size else draft_rendezvous
            config = replace(self._template, rank=rank, host=host, device=device, rendezvous=own)
            config = replace(config, draft_door=draft_door, target_door=target_door)
            if tls is not None:
                config = replace(config, tls=tls[rank])
            if self._is_away(place):
                config = with_folders(replace(config, is_away=True), folders[place.node_id])
            configs.append(config)
        return configs

    def _is_away(self, place: Place) -> bool:
        return place.node_id != self._own_node_id


def _names(places: Sequence[Place]) -> str:
    return ", ".join(dict.fromkeys(place.node for place in places))
