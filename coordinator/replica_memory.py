"""Where a replica's ranks go, GPUs or CPUs, and the memory that each may count on, before anything is started."""

from __future__ import annotations

import argparse
import os

from tpserve.coordinator.children import ServeError, ray_environment
from tpserve.coordinator.memory import available_device_bytes, available_host_bytes
from tpserve.coordinator.node_memory import NodeMemory, bytes_of_rank, read_nodes
from tpserve.coordinator.speculation import num_own_draft_ranks


def num_ranks(args: argparse.Namespace) -> int:
    """Return how many ranks a replica has by its flags: the model's, and those of a draft that has its own."""
    return int(args.tp) + num_own_draft_ranks(args)


def memory_of_ranks(args: argparse.Namespace) -> tuple[bool, int]:
    """Return whether ranks are on GPUs, and the bytes that each may count on.

    Raises
    ------
    ServeError
        If there are fewer GPUs than ranks, with what to do.
    """
    return _of_host(args) if args.ray_address is None or args.replica[1] > 1 else _of_nodes(args)


def _of_host(args: argparse.Namespace) -> tuple[bool, int]:
    """Replicas get GPUs of their own, of this host; on CPUs they share it, or the nodes of a cluster that is named."""
    gpus = available_device_bytes() if args.device != "cpu" else []
    needed = num_ranks(args)
    if (gpus or args.device == "cuda") and len(gpus) < needed:
        device = "--device cuda " if args.device == "cuda" else ""
        raise ServeError(
            f"{device}{_ranks_wanted(args)}: this host has {len(gpus)} GPUs; lower --tp"
            f"{', give --draft-placement colocated,' if needed > args.tp else ''} or use --device cpu"
        )
    if not gpus:
        is_alone = args.ray_address is None or args.ray_of_replicas
        return False, _of_cpus(args, [] if is_alone else _read_nodes(args))
    return True, min((gpus if args.replica[1] == 1 else sorted(gpus, reverse=True))[:needed])


def _of_nodes(args: argparse.Namespace) -> tuple[bool, int]:
    """Of a cluster's nodes this host may be one without a GPU."""
    nodes = _read_nodes(args)
    one_node = args.tp_across_nodes is None
    if args.device != "cpu":
        own = num_own_draft_ranks(args)
        free = bytes_of_rank(nodes, args.tp, one_node=one_node, on_gpus=True, num_draft_ranks=own)
        if free is not None:
            return True, free
        if args.device == "cuda":
            counts = ", ".join(f"{node.name} has {node.num_gpus}" for node in nodes)
            where = "on one node" if one_node else "on all nodes together"
            raise ServeError(
                f"--device cuda {_ranks_wanted(args)}: Ray has not so many GPUs {where} ({counts}); lower --tp, "
                "allow --tp-across-nodes, or use --device cpu"
            )
    return False, _of_cpus(args, nodes)


def _read_nodes(args: argparse.Namespace) -> list[NodeMemory]:
    return read_nodes(args.ray_address, os.environ | ray_environment(args.ray_address))


def _of_cpus(args: argparse.Namespace, nodes: list[NodeMemory]) -> int:
    """Return what each rank of the model may count on; without `nodes` all ranks share the memory of this host."""
    num_replicas: int = args.replica[1]
    free = bytes_of_rank(
        nodes,
        args.tp,
        one_node=args.tp_across_nodes is None,
        on_gpus=False,
        num_draft_ranks=num_own_draft_ranks(args),
        num_replicas=num_replicas,
    )
    # Without a place there is nothing else to plan by; the coordinator waits for one, and says what is missing.
    return available_host_bytes() // (args.tp * num_replicas) if free is None else free


def _ranks_wanted(args: argparse.Namespace) -> str:
    """Return the flags that say how many GPUs a replica takes."""
    own = num_own_draft_ranks(args)
    return f"--tp {args.tp}" + (f" --draft-placement dedicated --draft-tp {own}" if own else "")
