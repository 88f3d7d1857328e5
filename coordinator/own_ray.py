"""A Ray of this host alone: started with what ranks need and nothing else, and without waiting longer than it takes.

Ray itself starts four processes more: its autoscaler, which has no nodes to add here; a dashboard that counts usage,
which is switched off; and a raylet's agents, one for the dashboard, one that makes environments for processes that ask
for them, as ranks do on GPUs of a Ray that their coordinator has joined. Each costs a second of a processor, and Ray
waits for the second; and it looks once a second for whether its raylet is there. `ray.init` has no options for these,
so its node is another class meanwhile.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray

_NO_AGENT = "cat"
"""A raylet has two agents, starts again neither and ends if one ends. This waits until the raylet is gone, which holds
the other end of its standard input."""
_DASHBOARD_AGENT = {"dashboard_agent": ("METRICS_AGENT", "METRICS_EXPORT", "DASHBOARD_AGENT_LISTEN")}
_BOTH_AGENTS = {**_DASHBOARD_AGENT, "runtime_env_agent": ("RUNTIME_ENV_AGENT",)}
"""Ray's names of them, and of the ports of each."""
_NO_PORT = -1
"""What an agent tells that listens nowhere: see `ray/dashboard/agent.py`."""
_LOOK_EVERY_S = 0.02
_RAYLET_WITHIN_S = 30.0
"""As Ray gives it, which then looks once more and says what is wrong."""


def start_own_ray(num_ranks: int, *, is_joined: bool = False, **options: Any) -> None:
    """Start a Ray that ends with this process, and connect to it; see `ray.init` for the options.

    Parameters
    ----------
    is_joined
        Whether coordinators in other processes join it.

    Raises
    ------
    Exception
        If a process of it does not come up.
    """
    # Ray starts an idle process for each CPU that it is told of, on a large host a hundred. Beside those that become
    # ranks, as many stand ready for the next group.
    num_cpus = max(num_ranks, min(2 * num_ranks, os.cpu_count() or 1))
    with _lean_node(_DASHBOARD_AGENT if is_joined else _BOTH_AGENTS):
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **options)


@contextlib.contextmanager
def _lean_node(unneeded: Mapping[str, Sequence[str]]) -> Iterator[None]:
    module: Any = importlib.import_module("ray._private.node")
    whole: Any = module.Node

    class LeanNode(whole):  # type: ignore[misc]  # Ray is untyped
        def start_monitor(self) -> None:
            pass

        def start_api_server(self, **_: Any) -> None:
            pass

        def start_ray_processes(self) -> None:
            super().start_ray_processes()
            self._wait_for_raylet()

        def start_raylet(self, *args: Any, **options: Any) -> None:
            with _without_agents(unneeded, self._session_dir, self._node_id):
                super().start_raylet(*args, **options)

        def _wait_for_raylet(self) -> None:
            deadline = time.monotonic() + _RAYLET_WITHIN_S
            (raylet,) = self.all_processes["raylet"]
            while raylet.process.poll() is None and time.monotonic() < deadline:
                if self.get_gcs_client().get_all_node_info(timeout=_RAYLET_WITHIN_S):
                    return
                time.sleep(_LOOK_EVERY_S)

    module.Node = LeanNode
    try:
        yield
    finally:
        module.Node = whole


@contextlib.contextmanager
def _without_agents(unneeded: Mapping[str, Sequence[str]], session_dir: str, node_id: str) -> Iterator[None]:
    """Let Ray start raylets some of whose agents are nothing, and which need not wait for what those would tell."""
    services: Any = importlib.import_module("ray._private.services")
    raylet: Any = importlib.import_module("ray._raylet")
    start = services.start_ray_process
    for ports in unneeded.values():
        for port in ports:
            raylet.persist_port(session_dir, node_id, getattr(raylet, f"{port}_PORT_NAME"), _NO_PORT)
    bare = {f"--{agent}_command": f"--{agent}_command={_NO_AGENT}" for agent in unneeded}

    def start_bare(command: Sequence[str], *args: Any, **options: Any) -> Any:
        return start([bare.get(argument.partition("=")[0], argument) for argument in command], *args, **options)

    services.start_ray_process = start_bare
    try:
        yield
    finally:
        services.start_ray_process = start
