"""The nodes of a Ray cluster that was joined: what they have left, and whether the cluster still answers."""

from __future__ import annotations

import asyncio
import importlib
import socket
import time
from collections.abc import Iterable
from typing import Any

import ray
from ray._private import services
from ray._private.state import available_resources_per_node

from tpserve.coordinator.errors import ClusterError

HEAD_LOST_AFTER_S = 15.0
"""Longer than a network's hiccup, and less than the minute after which Ray ends every process that belongs to it."""
_ASK_EVERY_S = 2.0
_JOIN_TIMEOUT_S = 10.0


def find_own_node(ray_address: str) -> tuple[str, str]:
    """Return the address of a cluster's head, and that of this host as a node of it.

    Asked before Ray is: it waits for minutes for a head that is not there, and then ends the process.

    Raises
    ------
    ClusterError
        If nobody answers there in time, or this host is no node of the cluster.
    """
    try:
        head = services.canonicalize_bootstrap_address_or_die(ray_address)
        host, _, port = head.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=_JOIN_TIMEOUT_S).close()
        nodes = _gcs_client(head).get_all_node_info(timeout=_JOIN_TIMEOUT_S).values()
    except Exception as error:  # of many kinds, a token that is refused among them
        raise ClusterError(
            f"Ray at {ray_address} cannot be joined: {error or type(error).__name__}; take what `ray start` printed"
        ) from error
    alive = [node.node_manager_address for node in nodes if node.state == 0]
    for address in alive:
        if _is_ours(address):
            return head, address
    raise ClusterError(
        f"this host is no node of Ray at {head}, which has {', '.join(alive) or 'none'}: run `ray start "
        f"--address={head}` here first, or `tpserve serve` there"
    )


def _is_ours(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
        return True


def _gcs_client(head: str) -> Any:
    raylet: Any = importlib.import_module("ray._raylet")  # what `ray health-check` asks by
    return raylet.GcsClient(address=head)


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
    client = _gcs_client(context.gcs_address)
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
