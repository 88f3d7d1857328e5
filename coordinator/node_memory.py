"""`python -m tpserve.coordinator.node_memory ADDRESS`: the memory that each node of a Ray cluster has free.

Prints one JSON line. A process of its own, as `tpserve serve` starts processes and so must not load Ray.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from tpserve.coordinator.errors import ClusterError
from tpserve.coordinator.memory import available_device_bytes, available_host_bytes
from tpserve.coordinator.process import keep_stdout_for_parent, tell_parent

_ANSWER_WITHIN_S = 20.0
"""The first answer of a node waits for a process to start there."""


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """One node, as it told."""

    name: str
    """Its host's."""
    num_cpus: int
    """That Ray may give away, in use or not."""
    num_gpus: int
    """Likewise."""
    host_bytes: int
    """Free."""
    device_bytes: list[int]
    """Free on each GPU."""


def read_nodes(ray_address: str, environment: dict[str, str]) -> list[NodeMemory]:
    """Ask every living node.

    Raises
    ------
    ClusterError
        If the cluster cannot be joined, or a node does not answer.
    """
    command = [sys.executable, "-m", "tpserve.coordinator.node_memory", ray_address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            output, _ = process.communicate(timeout=2 * _ANSWER_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise ClusterError(
                f"Ray at {ray_address} did not tell of its nodes within {2 * _ANSWER_WITHIN_S:g} s"
            ) from None
    answer: dict[str, Any] = json.loads(output.splitlines()[-1]) if output else {}
    if "nodes" not in answer:
        raise ClusterError(answer.get("error", f"Ray at {ray_address} did not tell of its nodes"))
    return [NodeMemory(**node) for node in json.loads(answer["nodes"])]


def bytes_of_rank(
    nodes: list[NodeMemory],
    tp_size: int,
    *,
    one_node: bool,
    on_gpus: bool,
    num_draft_ranks: int = 0,
    num_replicas: int = 1,
) -> int | None:
    """Return the memory that any rank of the model may count on, wherever Ray puts it; None without a place for all.

    On CPUs that is its part of a node's, from which it leaves the draft's own ranks their share; see `plan_memory`.

    Parameters
    ----------
    one_node
        Whether all ranks of a replica are on the same.
    num_draft_ranks
        That the draft has to itself, beside the model's.
    num_replicas
        Which share the nodes.
    """
    num_ranks = tp_size + num_draft_ranks
    places = {node.name: min(node.num_gpus, len(node.device_bytes)) if on_gpus else node.num_cpus for node in nodes}
    fit = [node for node in nodes if places[node.name] >= (num_ranks if one_node else 1)]
    if not fit or sum(places[node.name] for node in fit) < num_ranks:
        return None
    if on_gpus:
        return min(min(node.device_bytes) for node in fit)

    def num_parts(num_places: int) -> int:
        """Return how many ranks of the model a node's memory is for, at most."""
        if one_node:
            return tp_size * min(num_replicas, num_places // num_ranks)
        parts = min(tp_size * num_replicas, num_places)
        if num_draft_ranks:  # which are all on one node: there the whole draft, so the shares of all the model's ranks
            parts = max(parts, tp_size * min(num_replicas, num_places // num_draft_ranks))
        return parts

    return min(node.host_bytes // num_parts(places[node.name]) for node in fit)


def main() -> int:
    """Ask, and print what came; return the exit code."""
    parent = keep_stdout_for_parent()  # Ray prints
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from tpserve.coordinator.ray_nodes import find_own_node

    try:
        head, own = find_own_node(sys.argv[1])
        ray.init(address=head, _node_ip_address=own, logging_level=logging.WARNING, log_to_driver=False)
        alive = [node for node in ray.nodes() if node["Alive"]]
        task = ray.remote(_free)
        asked = [
            task.options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote()
            for node in alive
        ]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=_ANSWER_WITHIN_S)
        free = {ref: ray.get(ref) for ref in answered}  # one that is cut off is no place for a rank now
    except ClusterError as error:
        tell_parent(parent, error=str(error))
        return 1
    except Exception as error:  # of many kinds
        tell_parent(parent, error=f"Ray at {sys.argv[1]} did not tell of its nodes: {type(error).__name__}: {error}")
        return 1
    nodes = [
        NodeMemory(
            node["NodeManagerHostname"],
            int(node["Resources"].get("CPU", 0)),
            int(node["Resources"].get("GPU", 0)),
            *free[ref],
        )
        for node, ref in zip(alive, asked, strict=True)
        if ref in free
    ]
    tell_parent(parent, nodes=json.dumps([asdict(node) for node in nodes]))
    ray.shutdown()
    return 0


def _free() -> tuple[int, list[int]]:
    return available_host_bytes(), available_device_bytes()


if __name__ == "__main__":
    sys.exit(main())
