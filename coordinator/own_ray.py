"""A Ray of this host alone: started with what ranks need and nothing else, and without waiting longer than it takes.

Ray itself starts two processes more: its autoscaler, which has no nodes to add here, and a dashboard that counts usage,
which is switched off. Each costs most of a second of a processor, and Ray waits for the second; and it looks once a
second for whether its raylet is there. `ray.init` has no options for these, so its node is another class meanwhile.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Iterator
from typing import Any

import ray

_LOOK_EVERY_S = 0.02
_RAYLET_WITHIN_S = 30.0
"""As Ray gives it, which then looks once more and says what is wrong."""


def start_own_ray(num_ranks: int, **options: Any) -> None:
    """Start a Ray that ends with this process, and connect to it; see `ray.init` for the options.

    Raises
    ------
    Exception
        If a process of it does not come up.
    """
    # Ray starts an idle process for each CPU that it is told of, on a large host a hundred. Beside those that become
    # ranks, as many stand ready for the next group.
    num_cpus = max(num_ranks, min(2 * num_ranks, os.cpu_count() or 1))
    with _lean_node():
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **options)


@contextlib.contextmanager
def _lean_node() -> Iterator[None]:
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
