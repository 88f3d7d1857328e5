"""What a Ray of one host is started with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import node, services

from tpserve.coordinator import own_ray
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
        for name in ("start_monitor", "start_api_server", "start_raylet", "start_ray_processes"):
            assert getattr(node.Node, name) is not getattr(whole, name), "Ray still calls it so"
        raise RuntimeError("no port is free")

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(RuntimeError, match="no port is free"):
        start_own_ray(2)
    assert node.Node is whole


@pytest.mark.parametrize("is_joined", [False, True])
def test_a_raylet_has_the_agents_that_it_needs(
    is_joined: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray's own ones tell it where they listen, in files of the session's folder."""
    started: list[list[str]] = []

    def start(command: list[str], kind: str) -> None:
        assert kind == "raylet"
        started.append(command)

    monkeypatch.setattr(services, "start_ray_process", start)
    agents = ["--dashboard_agent_command=python agent.py --x=1", "--runtime_env_agent_command=python main.py"]
    unneeded = own_ray._DASHBOARD_AGENT if is_joined else own_ray._BOTH_AGENTS
    with own_ray._without_agents(unneeded, str(tmp_path), "f" * 56):
        services.start_ray_process(["raylet", *agents, "--head"], "raylet")
    assert services.start_ray_process is start
    second = agents[1] if is_joined else "--runtime_env_agent_command=cat"
    assert started == [["raylet", "--dashboard_agent_command=cat", second, "--head"]]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"-1"}
    told = {path.name.rpartition("_")[0] for path in tmp_path.iterdir()}
    assert told >= {"metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port"}
    assert ("runtime_env_agent_port" in told) == (not is_joined)
