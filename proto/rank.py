"""How the coordinator starts a rank, and what the rank answers. Carried once by Ray; steps travel over gRPC."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tpserve.proto.speculation import Speculation

_FINGERPRINT_BYTES = 1 << 20

Door = Literal["group", "draft"]
"""Where ranks meet: those of one group; or those of the model with a draft's own."""


def rank_name(rank: int, tp_size: int) -> str:
    """Return what a rank is called in messages and metrics: a draft's own ranks are counted behind the model's."""
    return str(rank) if rank < tp_size else f"draft {rank - tp_size}"


LET_IN = "tpserve-rank"
"""Key of the metadata that a rank answers first with, when it takes a coordinator's stream of plans: its number."""

COORDINATOR_TLS_NAME = "coordinator.tpserve"
"""In the coordinator's certificate, see `TlsIdentity`."""


def rank_tls_name(rank: int) -> str:
    """Return the name in a rank's certificate, see `TlsIdentity`."""
    return f"rank-{rank}.tpserve"


@dataclass(frozen=True, slots=True)
class TlsIdentity:
    """By which one process of a group shows others of it who it is, and knows them; all PEM."""

    certificate: bytes
    key: bytes = field(repr=False)
    """Of the certificate."""
    authority: bytes
    """Certificate of the group's authority, which signs for its members alone."""


@dataclass(frozen=True, slots=True)
class RankConfig:
    """One rank of a tensor-parallel group, or of its draft's own ranks: those from `tp_size` on."""

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
    """Unique name of the group, under which its ranks find each other's memory; the secret by which they meet."""
    collective_timeout_s: float
    """A rank that is later than this in a collective ends the group."""
    host: str = "127.0.0.1"
    """Address to listen on for step plans, and for other ranks: loopback, or its node's where the coordinator or a rank
    is on another."""
    token: str | None = field(default=None, repr=False)
    """What the coordinator shows with its plans; None takes plans from anybody who reaches `host`."""
    tls: TlsIdentity | None = field(default=None, repr=False)
    """With what it takes plans and meets other ranks; None: plain connections, as `host` is loopback."""
    is_away: bool = False
    """Whether this rank is on another node than the coordinator, which then cannot end its process itself."""
    across_nodes: bool = False
    """Whether the group's ranks are on several nodes."""
    device: int | None = None
    """GPU of this rank; None computes on the CPU."""
    rendezvous: str = ""
    """`host:port` of rank 0's door, where ranks meet on GPUs or across nodes, or, on GPUs, of the door of a draft's
    first own rank for its others; empty for one rank, and on one CPU."""
    collectives: Literal["auto", "push", "nccl"] = "auto"
    """Between GPUs: over peer memory, or by NCCL; auto takes peer memory wherever ranks can map it."""
    speculation: Speculation | None = None
    """How draft tokens are proposed; None: never."""
    target_door: str = ""
    """`host:port` of rank 0's door for the draft's own ranks but the first; empty if there are none, and on GPUs."""
    draft_door: str = ""
    """`host:port` of the draft's first own rank's door for the model's ranks, and on GPUs for the draft's others, too;
    empty if it has none."""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return rank_name(self.rank, self.tp_size)

    @property
    def draft_rank(self) -> int | None:
        """Its number among the draft's own ranks; None: it is one of the model's."""
        return self.rank - self.tp_size if self.rank >= self.tp_size else None


@dataclass(frozen=True, slots=True)
class Place:
    """Where Ray has put a rank."""

    node_id: str
    """Ray's."""
    node: str
    """Host name."""
    host: str
    """Address at which other nodes reach it."""
    device: int | None
    """GPU that Ray gave it, as CUDA numbers them there; None if it was given none."""
    niceness: int = 0
    """Of its process: the higher, the more others of its host go before it."""


@dataclass(frozen=True, slots=True)
class FileFacts:
    """By which a file is known without being read whole."""

    name: str
    num_bytes: int
    fingerprint: str
    """Of its size, its beginning and its end; see `fingerprint_of`."""


def fingerprint_of(path: Path) -> str:
    """Return the hex digest of a file's size, first and last MiB."""
    with path.open("rb") as file:
        size = path.stat().st_size
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        digest.update(file.read(_FINGERPRINT_BYTES))
        file.seek(max(0, size - _FINGERPRINT_BYTES))
        digest.update(file.read())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class SizeTime:
    """What a captured step takes, by its size: padding is computed like any token."""

    num_tokens: int
    decode_only: bool
    """Whether each token must be its sequence's only one."""
    step_us: int


@dataclass(frozen=True, slots=True)
class RankAddress:
    """Where a started rank listens."""

    rank: int
    host: str
    port: int
    pid: int
    node: str
    """Host name, for the log."""
    is_away: bool = False
    """Whether it is on another node than the coordinator."""
    token: str | None = field(default=None, repr=False)
    """What the rank wants to be shown."""
    collectives: str = "none"
    """By which it exchanges activations: shared_memory, tcp, push or nccl; none for a rank alone."""
    draft_rank: int | None = None
    """See `RankConfig`."""
    tls: TlsIdentity | None = field(default=None, repr=False)
    """The coordinator's own, which it has added, if the rank takes plans within mutual TLS."""
    size_times: tuple[SizeTime, ...] = ()
    """What its steps take; none where they are not captured, as on a CPU."""

    @property
    def name(self) -> str:
        """What it is called in messages and metrics."""
        return str(self.rank) if self.draft_rank is None else f"draft {self.draft_rank}"

    @property
    def target(self) -> str:
        """`host:port` for gRPC."""
        return f"{self.host}:{self.port}"
