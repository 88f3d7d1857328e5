"""How the coordinator starts a rank, and what the rank answers. Carried once by Ray; steps travel over gRPC."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tpserve.proto.speculation import Speculation


@dataclass(frozen=True, slots=True)
class RankConfig:
    """One rank of a tensor-parallel group."""

    rank: int
    tp_size: int
    model_dir: Path
    """Hugging Face folder with the weights."""
    artifact_dir: Path
    """Compiled library and manifest."""
    load_format: Literal["auto", "dummy"]
    """dummy: seeded random weights in place of the checkpoint's."""
    num_pages: int
    """KV pages of this rank."""
    max_num_seqs: int
    """Slots."""
    num_threads: int
    """Threads of the kernels."""
    group_name: str
    """Unique name of the group, under which its ranks find each other's memory."""
    collective_timeout_s: float
    """A rank that is later than this in a collective ends the group."""
    host: str = "127.0.0.1"
    """Address to listen on for step plans."""
    device: int | None = None
    """GPU of this rank; None computes on the CPU."""
    rendezvous: str = ""
    """`host:port` of rank 0's door, where ranks on GPUs meet; empty for one rank, and on the CPU."""
    collectives: Literal["auto", "push", "nccl"] = "auto"
    """Between GPUs: over peer memory, or by NCCL; auto takes peer memory wherever ranks can map it."""
    speculation: Speculation | None = None
    """How draft tokens are proposed; None: never."""


@dataclass(frozen=True, slots=True)
class RankAddress:
    """Where a started rank listens."""

    rank: int
    host: str
    port: int
    pid: int
    node: str
    """Host name, for the log."""

    @property
    def target(self) -> str:
        """`host:port` for gRPC."""
        return f"{self.host}:{self.port}"
