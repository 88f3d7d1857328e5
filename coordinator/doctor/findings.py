"""What a check found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact of the host, and what follows from it."""

    check: str
    """Its name, stable for programs that read the JSON."""
    status: Status
    """warn: a server starts, but slower or with less than it might have; fail: it does not, or not as asked."""
    found: str
    remedy: str = ""
    """What to do; empty where all is well."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The server that the host is to run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    tp_size: int = 1
    num_draft_ranks: int = 0
    """That a draft has to itself, behind the model's."""
    tp_across_nodes: str | None = None
    """Whether ranks may be on several nodes of a cluster, and how; None: all on one."""
    host: str = "127.0.0.1"
    port: int = 8000
    ray_address: str | None = None
    model: str | None = None
    model_lib: Path | None = None
    mode: str = "local"

    @property
    def num_ranks(self) -> int:
        """Of the model and of its draft."""
        return self.tp_size + self.num_draft_ranks

    @property
    def flags(self) -> str:
        """What says how many ranks there are."""
        own = f" --draft-placement dedicated --draft-tp {self.num_draft_ranks}" if self.num_draft_ranks else ""
        return f"--tp {self.tp_size}{own}"

    @property
    def fewer(self) -> str:
        """How there would be fewer."""
        return "lower --tp or --draft-tp, give --draft-placement colocated" if self.num_draft_ranks else "lower --tp"


Check = Callable[[Wanted], Iterator[Finding]]


def least(check: str, value: float, fail_below: float, warn_below: float, found: str, remedy: str) -> Finding:
    """Judge a value of which more is better."""
    status: Status = "fail" if value < fail_below else "warn" if value < warn_below else "ok"
    return Finding(check, status, found, "" if status == "ok" else remedy)
