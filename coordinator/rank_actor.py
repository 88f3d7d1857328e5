"""The Ray actor that is one rank, and how its place is known."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from tpserve.proto.rank import Door, FileFacts, Place, RankAddress, RankConfig


class RankActor:
    """Runs in the actor's process; finds the rank's code by name, as coordinator and worker meet only over `proto`."""

    def __init__(self) -> None:
        self._rank: Any = importlib.import_module("tpserve.worker.actor").Rank()
        self._reception: Any = importlib.import_module("tpserve.worker.reception")
        self._receiving: Any = None

    def locate(self) -> Place:
        """Tell where this is."""
        context = ray.get_runtime_context()
        given = context.get_accelerator_ids().get("GPU", [])
        device = _cuda_ordinal(given[0], os.environ.get("CUDA_VISIBLE_DEVICES")) if given else None
        host = ray.util.get_node_ip_address()
        return Place(context.get_node_id(), socket.gethostname(), host, device, os.nice(0))

    def has_files(self, folder: Path, files: Sequence[FileFacts]) -> bool:
        """Tell whether this node has these files in a folder of the same path; see `tpserve.worker.reception`."""
        found: bool = self._reception.has_files(folder, files)
        return found

    def find_received(self, key: str) -> Path | None:
        """Return the folder of that content that this node was sent before, if it was."""
        folder: Path | None = self._reception.find_received(key)
        return folder

    def begin(self, key: str, num_bytes: int) -> None:
        """Make room for a folder of that content."""
        self._receiving = self._reception.Reception(key, num_bytes)

    def take(self, name: str, chunk: Any) -> None:
        """Append to a file of the folder."""
        self._receiving.take(name, chunk)

    def finish(self, digests: Mapping[str, str]) -> Path:
        """Verify the folder and return where it is."""
        folder: Path = self._receiving.finish(digests)
        return folder

    def start(self, config: RankConfig) -> RankAddress:
        """Start the rank; see `tpserve.worker.actor`."""
        address: RankAddress = self._rank.start(config)
        return address

    def open_door(self, host: str, door: Door) -> str:
        """Open a place where ranks meet; see `tpserve.worker.actor`."""
        address: str = self._rank.open_door(host, door)
        return address


def _cuda_ordinal(name: str, visible: str | None) -> int:
    """Return CUDA's number of a GPU that Ray names by what `CUDA_VISIBLE_DEVICES` of its node holds."""
    names = visible.split(",") if visible else []
    return names.index(name) if name in names else int(name)
