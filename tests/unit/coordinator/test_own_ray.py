"""What a Ray of one host is started with."""

from __future__ import annotations

import os
from typing import Any

import pytest
import ray
from ray._private import node

from tpserve.coordinator.own_ray import start_own_ray


@pytest.mark.parametrize(
    ("num_ranks", "num_cores", "num_cpus"), [(1, 1, 1), (1, 2, 2), (1, 128, 2), (4, 2, 4), (4, 6, 6), (8, 128, 16)]
)
def test_as_many_processes_stand_ready_as_there_are_ranks(
    num_ranks: int, num_cores: int, num_cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(ray, "init", lambda **options: given.update(options))
    monkeypatch.setattr(os, "cpu_count", lambda: num_cores)
    start_own_ray(num_ranks, object_store_memory=1)
    assert given["num_cpus"] == num_cpus
    assert (given["address"], given["include_dashboard"], given["object_store_memory"]) == ("local", False, 1)


def test_rays_node_is_another_only_while_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = node.Node

    def fail(**_: Any) -> None:
        assert issubclass(node.Node, whole)
        for name in ("start_monitor", "start_api_server", "start_ray_processes"):
            assert getattr(node.Node, name) is not getattr(whole, name), "Ray still calls it so"
        raise RuntimeError("no port is free")

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(RuntimeError, match="no port is free"):
        start_own_ray(2)
    assert node.Node is whole
