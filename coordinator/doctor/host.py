"""Checks of what the kernel gives: shared memory, limits, CPUs, ports, disks."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from tpserve.coordinator.doctor.findings import Finding, Wanted, least
from tpserve.coordinator.host_limits import free_memory_limit, usable_cpus
from tpserve.coordinator.process import bind

_MIB = 1 << 20
_RAY_STORE_BYTES = 80 * _MIB
_RANK_BYTES = 2 * _MIB + 4096
"""Of the segment by which ranks on a CPU exchange activations (collectives/cpu.py)."""
_NCCL_RANK_BYTES = 32 * _MIB
_MIN_FILES, _GOOD_FILES = 1024, 4096
_MIN_PROCESSES = 1024
"""Threads count as processes: Ray and a rank start hundreds."""
_SMALL_TEMP_BYTES, _GOOD_TEMP_BYTES = 16 * _MIB, 1024 * _MIB
_SMALL_CACHE_BYTES, _GOOD_CACHE_BYTES = 1024 * _MIB, 10 * 1024 * _MIB


def check_shared_memory(wanted: Wanted, folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """See that /dev/shm holds Ray's object store and what ranks exchange."""
    needed = 0 if wanted.ray_address else _RAY_STORE_BYTES
    num_sharing = sum(size for size in (wanted.tp_size, wanted.num_draft_ranks) if size > 1)  # a draft is a group too
    needed += num_sharing * (_RANK_BYTES if wanted.device == "cpu" else _NCCL_RANK_BYTES)
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield Finding("shm", "fail", f"{folder}: {error.strerror}", f"mount a tmpfs at {folder}")
        return
    size = f"{-(-needed // _MIB) + 64}m"
    remedy = (
        f"enlarge it: mount -o remount,size={size} {folder}; docker run --shm-size={size}; in a pod, an emptyDir "
        + ("with medium Memory")
    )
    yield least(
        "shm", free, needed, needed, f"{folder} has {free // _MIB} MiB free, {needed // _MIB} MiB are needed", remedy
    )


def check_limits(wanted: Wanted) -> Iterator[Finding]:
    """See that this user may have the files, processes and locked memory of a server."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    more = _GOOD_FILES * 16
    remedy = f"ulimit -n {more}, LimitNOFILE= of the systemd unit, or docker run --ulimit nofile={more}"
    yield least("nofile", _number(files), _MIN_FILES, _GOOD_FILES, f"{_words(files)} open files", remedy)
    processes = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    remedy = f"ulimit -u {_MIN_PROCESSES * 16}, or LimitNPROC= of the systemd unit"
    yield least("nproc", _number(processes), 256, _MIN_PROCESSES, f"{_words(processes)} processes and threads", remedy)
    if wanted.device == "cuda":
        locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        remedy = "ulimit -l unlimited: NCCL locks memory between hosts (RDMA)"
        infinite = float("inf")
        yield least("memlock", _number(locked), 0, infinite, f"{_words(locked)} bytes of locked memory", remedy)


def check_cpus(wanted: Wanted) -> Iterator[Finding]:
    """See that every rank, and the coordinator besides, may have a CPU of its own; and tell the memory's limit."""
    usable, whole = usable_cpus(), os.cpu_count() or 1
    found = f"{usable} of {whole} CPUs" if usable < whole else f"{usable} CPUs"
    if usable < wanted.num_ranks:
        found = f"{found}; {wanted.flags} has {wanted.num_ranks} ranks"
    remedy = f"{wanted.fewer}, or raise the container's CPU limit: ranks that share a CPU wait for each other"
    yield least("cpus", usable, 1, wanted.num_ranks, found, remedy)
    limit = free_memory_limit()
    if limit is not None:
        remedy = "raise the container's memory limit"
        found = f"{limit // _MIB} MiB are left within the container's limit"
        yield least("memory-limit", limit, 512 * _MIB, 1024 * _MIB, found, remedy)


def check_ports(wanted: Wanted) -> Iterator[Finding]:
    """See that the API's port can be bound."""
    if not 0 <= wanted.port <= 65535:
        yield Finding("port", "fail", f"{wanted.port}", "choose a --port in 0..65535")
        return
    try:
        bind(wanted.host, wanted.port).close()
    except OSError as error:
        remedy = "choose another --host or --port, or end who has it: ss -tlnp"
        yield Finding("port", "fail", f"{wanted.host}:{wanted.port}: {error.strerror}", remedy)
    else:
        yield Finding("port", "ok", f"{wanted.host}:{wanted.port} is free")


def check_disks(wanted: Wanted, temp: Path = Path("/tmp")) -> Iterator[Finding]:
    """See that there is room for the cache and for Ray's files, and that the cache may be written to."""
    cache = cache_root()
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    found = f"{cache} has {free // _MIB} MiB free"
    if not os.access(existing, os.W_OK):
        yield Finding("cache", "fail", f"{existing} cannot be written to", "set TPSERVE_HOME to a folder of your own")
    else:
        remedy = (
            "free some, or set TPSERVE_HOME to a folder with more room: converted models and libraries are kept there"
        )
        yield least("cache", free, _SMALL_CACHE_BYTES, _GOOD_CACHE_BYTES, found, remedy)
    if wanted.ray_address is None:
        free = shutil.disk_usage(temp).free
        found = f"{temp} has {free // _MIB} MiB free for Ray"
        yield least("temp", free, _SMALL_TEMP_BYTES, _GOOD_TEMP_BYTES, found, f"free some of {temp}")


def cache_root() -> Path:
    """Return where converted models and libraries are kept, as the compiler has it."""
    home = os.environ.get("TPSERVE_HOME")
    return Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tpserve"


def _number(limit: int) -> float:
    return float("inf") if limit == resource.RLIM_INFINITY else limit


def _words(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
