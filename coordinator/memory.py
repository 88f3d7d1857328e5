"""How much memory a rank needs, and how many KV pages fit: the defaults of the engine's modes."""

from __future__ import annotations

import math
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from tpserve.coordinator.errors import ClusterError
from tpserve.coordinator.host_limits import free_memory_limit
from tpserve.proto.manifest import Manifest

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}
MODE_MAX_NUM_SEQS = {"local": 4, "interactive": 1, "server": 64}
_LOCAL_KV_TOKENS = 8192
"""KV capacity of mode local, if the model's length does not ask for more."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one rank, with its share of a draft's."""

    parameter_bytes: int
    kv_bytes: int
    workspace_bytes: int
    num_pages: int

    @property
    def total_bytes(self) -> int:
        """Everything."""
        return self.parameter_bytes + self.kv_bytes + self.workspace_bytes


def plan_memory(
    manifest: Manifest,
    mode: str,
    max_num_seqs: int,
    utilization: float,
    available_bytes: int,
    draft: Manifest | None = None,
    draft_share: float = 1.0,
) -> MemoryPlan:
    """Decide the number of KV pages of each rank.

    Parameters
    ----------
    mode
        local: room for one sequence of the model's length, or 8192 tokens; interactive: one sequence; server: what
        `utilization` of the memory leaves, at most what `max_num_seqs` sequences of full length can use.
    available_bytes
        Memory that one rank may count on.
    draft
        Of a draft: each page has its KV too, on each of its ranks.
    draft_share
        Ranks of the draft for each of the model: 1 where they are the same. On a CPU a draft's own ranks take theirs
        from the same memory.

    Raises
    ------
    ClusterError
        If not even one sequence of full length fits; names the numbers.
    """
    parameters = _parameter_bytes(manifest)
    page = manifest.kv.page_bytes
    workspace = manifest.workspace_bytes
    if draft is not None:
        parameters += math.ceil(draft_share * _parameter_bytes(draft))
        page += math.ceil(draft_share * draft.kv.page_bytes)
        workspace += math.ceil(draft_share * draft.workspace_bytes)
    pages_per_seq = -(-manifest.max_model_len // manifest.kv.page_size)
    budget = int(available_bytes * utilization) - parameters - workspace
    if budget < pages_per_seq * page:
        raise ClusterError(
            f"one sequence of {manifest.max_model_len} tokens needs {_mb(pages_per_seq * page)} of KV cache, "
            f"{_mb(max(budget, 0))} are left beside {_mb(parameters)} of parameters: "
            "lower --max-model-len, or raise --gpu-memory-utilization or --tp"
        )
    if mode == "server":
        num_pages = min(budget // page, max_num_seqs * pages_per_seq)
    elif mode == "local":
        num_pages = min(budget // page, max(pages_per_seq, _LOCAL_KV_TOKENS // manifest.kv.page_size))
    else:
        num_pages = pages_per_seq
    return MemoryPlan(parameters, num_pages * page, workspace, num_pages)


def limit_to_own_draft(
    plan: MemoryPlan, target: Manifest, draft: Manifest, utilization: float, available_bytes: int
) -> MemoryPlan:
    """Return a plan with no more pages than fit on GPUs that a draft has to itself, whose KV has the same pages.

    Parameters
    ----------
    plan
        Of the model's ranks, without the draft.
    available_bytes
        Memory that one rank of the draft may count on.

    Raises
    ------
    ClusterError
        If not even one sequence of full length fits there; names the numbers.
    """
    parameters, page = _parameter_bytes(draft), draft.kv.page_bytes
    pages_per_seq = -(-target.max_model_len // target.kv.page_size)
    budget = int(available_bytes * utilization) - parameters - draft.workspace_bytes
    if budget < pages_per_seq * page:
        raise ClusterError(
            f"one sequence of {target.max_model_len} tokens needs {_mb(pages_per_seq * page)} of the draft's KV cache, "
            f"{_mb(max(budget, 0))} are left beside {_mb(parameters)} of its parameters: "
            "lower --max-model-len, or raise --gpu-memory-utilization or --draft-tp"
        )
    num_pages = min(plan.num_pages, budget // page)
    return replace(plan, num_pages=num_pages, kv_bytes=num_pages * target.kv.page_bytes)


def _parameter_bytes(manifest: Manifest) -> int:
    own = [param for param in manifest.params if param.layout != "shared"]
    return sum(math.prod(param.shape) * _ITEM_BYTES[param.dtype] for param in own)


def available_device_bytes() -> list[int]:
    """Return the free memory of each GPU of this host, by the driver's own tool; empty if there is none.

    Raises
    ------
    ClusterError
        If the tool is there but fails.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise ClusterError(f"nvidia-smi fails ({done.stdout.strip()} {done.stderr.strip()}): use --device cpu")
    return [int(line) * 2**20 for line in done.stdout.split()]


def available_host_bytes() -> int:
    """Return the memory that this process can still take without swapping, within its container's limit."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            free, limit = int(value.split()[0]) * 1024, free_memory_limit()
            return free if limit is None else min(free, limit)
    raise ClusterError("/proc/meminfo does not say MemAvailable: give the number of KV pages")


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MB"
