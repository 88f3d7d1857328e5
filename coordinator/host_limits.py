"""What the kernel lets this process have: CPUs and memory within its control groups (a container's limits)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED_BYTES = 1 << 60
"""Version 1 says nearly 2**63 for no limit."""


def usable_cpus(root: Path = _ROOT, membership: Path = Path("/proc/self/cgroup")) -> int:
    """Return the CPUs that this process may keep busy, at least 1: those it may run on, within its quota."""
    quotas = []
    for group in _groups(root, membership, "cpu"):
        words = _read(group / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            quotas.append(int(words[0]) / int(words[1]))
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
        if quota and period and int(quota) > 0:
            quotas.append(int(quota) / int(period))
    allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, *(math.ceil(quota) for quota in quotas))) if quotas else allowed


def free_memory_limit(root: Path = _ROOT, membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Return the bytes that its control groups leave to this process; None without a limit.

    Memory that the kernel takes back when it needs it, as that of files, counts as free.
    """
    free = []
    for group in _groups(root, membership, "memory"):
        for limit_name, usage_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, usage = _read(group / limit_name), _read(group / usage_name)
            if limit.isdigit() and usage.isdigit() and int(limit) < _UNLIMITED_BYTES:
                facts = dict(line.split()[:2] for line in _read(group / "memory.stat").splitlines() if " " in line)
                free.append(max(0, int(limit) - int(usage) + int(facts.get(cache_name, 0))))
    return min(free, default=None)


def _groups(root: Path, membership: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's groups, its own and those around it; of version 2 or of a controller's."""
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        if controllers and not top.is_dir():
            top = root / controller
        group = top / path.lstrip("/")
        # In a container the path is the host's, and what is mounted there is the group itself.
        inside = group if group.is_dir() else top
        while True:
            yield inside
            if inside == top:
                break
            inside = inside.parent


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
