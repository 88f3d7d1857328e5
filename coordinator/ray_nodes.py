"""The nodes of a Ray cluster that was joined: what they have left, and whether the cluster still answers."""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Iterable
from typing import Any

import ray
from ray._private.state import available_resources_per_node

HEAD_LOST_AFTER_S = 15.0
"""Longer than a network's hiccup, and less than the minute after which Ray ends every process that belongs to it."""
_ASK_EVERY_S = 2.0


def describe(resources: Iterable[str]) -> str:
    """Return one line on what each living node has free of the resources, for an error."""
    free = available_resources_per_node()
    nodes = []
    for node in ray.nodes():
        if node["Alive"]:
            left, whole = free.get(node["NodeID"], {}), node["Resources"]
            facts = ", ".join(f"{left.get(name, 0):g} of {whole.get(name, 0):g} {name}s free" for name in resources)
            nodes.append(f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}) has {facts}")
    return "; ".join(nodes) or "no node is alive"


async def wait_head_lost() -> str:
    """Wait until the cluster's head has not answered for `HEAD_LOST_AFTER_S`, or this node is none of its any more.

    Returns
    -------
    str
        What was lost.
    """
    context = ray.get_runtime_context()
    raylet: Any = importlib.import_module("ray._raylet")  # what `ray health-check` asks by
    client = raylet.GcsClient(address=context.gcs_address)
    own = ray.NodeID.from_hex(context.get_node_id())
    answered_at = time.monotonic()
    while True:
        try:
            (is_alive,) = await asyncio.to_thread(client.check_alive, [own], timeout=_ASK_EVERY_S)
        except Exception:  # of several kinds, for no answer as for a refused connection
            if time.monotonic() - answered_at > HEAD_LOST_AFTER_S:
                return f"head at {context.gcs_address}, which has not answered for {HEAD_LOST_AFTER_S:g} s"
        else:
            answered_at = time.monotonic()
            if not is_alive:
                return "node on this host, which the cluster has given up"
        await asyncio.sleep(_ASK_EVERY_S)
