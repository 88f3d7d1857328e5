"""A container's limits, of both versions of control groups, the tightest of nested ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tpserve.coordinator.host_limits import free_memory_limit, usable_cpus

MIB = 1 << 20


def tree(root: Path, files: dict[str, str], membership: str) -> tuple[Path, Path]:
    for name, text in files.items():
        path = root / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "membership").write_text(membership)
    return root / "cgroup", root / "membership"


@pytest.fixture(autouse=True)
def sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


@pytest.mark.parametrize(
    ("files", "membership", "expected"),
    [
        ({"cpu.max": "max 100000"}, "0::/", 16),
        ({"cpu.max": "250000 100000"}, "0::/", 3),
        ({"cpu.max": "10000 100000"}, "0::/", 1),
        ({"cpu.max": "6400000 100000"}, "0::/", 16),
        (
            {"cpu.max": "400000 100000", "pod/cpu.max": "max 100000", "pod/box/cpu.max": "800000 100000"},
            "0::/pod/box",
            4,
        ),
        ({"cpu.max": "200000 100000"}, "0::/a/path/of/the/host", 2),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/\n1:memory:/", 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/", 16),
        ({}, "", 16),
    ],
)
def test_cpus(tmp_path: Path, files: dict[str, str], membership: str, expected: int) -> None:
    assert usable_cpus(*tree(tmp_path, files, membership)) == expected


@pytest.mark.parametrize(
    ("files", "membership", "expected"),
    [
        ({"memory.max": "max", "memory.current": "5"}, "0::/", None),
        ({"memory.max": f"{100 * MIB}", "memory.current": f"{30 * MIB}"}, "0::/", 70 * MIB),
        (
            {
                "memory.max": f"{100 * MIB}",
                "memory.current": f"{90 * MIB}",
                "memory.stat": f"anon 1\ninactive_file {50 * MIB}",
            },
            "0::/",
            60 * MIB,
        ),
        (
            {
                "pod/memory.max": f"{64 * MIB}",
                "pod/memory.current": f"{60 * MIB}",
                "pod/box/memory.max": "max",
                "pod/box/memory.current": "1",
            },
            "0::/pod/box",
            4 * MIB,
        ),
        (
            {"memory/memory.limit_in_bytes": f"{8 * MIB}", "memory/memory.usage_in_bytes": f"{3 * MIB}"},
            "7:memory:/docker/abc",
            5 * MIB,
        ),
        (
            {"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "3"},
            "7:memory:/",
            None,
        ),
        ({}, "", None),
    ],
)
def test_memory(tmp_path: Path, files: dict[str, str], membership: str, expected: int | None) -> None:
    assert free_memory_limit(*tree(tmp_path, files, membership)) == expected
