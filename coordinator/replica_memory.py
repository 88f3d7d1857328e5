"""Where a replica's ranks go, GPUs or CPUs, and the memory that each may count on, before anything is started."""

from __future__ import annotations

import argparse
import os

from tpserve.coordinator.children import ServeError, ray_environment
from tpserve.coordinator.memory import available_device_bytes, available_host_bytes
from tpserve.coordinator.node_memory import bytes_of_rank, read_nodes
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
    is_ours = args.ray_address is None or args.replica[1] > 1  # all its ranks are on this host
    return _of_host(args) if is_ours else _of_nodes(args)


def _of_host(args: argparse.Namespace) -> tuple[bool, int]:
    """Replicas get GPUs of their own from Ray, and share a host."""
    gpus = available_device_bytes() if args.device != "cpu" else []
    num_replicas: int = args.replica[1]
    needed = num_ranks(args)
    if (gpus or args.device == "cuda") and len(gpus) < needed:
        device = "--device cuda " if args.device == "cuda" else ""
        raise ServeError(
            f"{device}{_ranks_wanted(args)}: this host has {len(gpus)} GPUs; lower --tp"
            f"{', give --draft-placement colocated,' if needed > args.tp else ''} or use --device cpu"
        )
    if not gpus:
        return False, available_host_bytes() // (args.tp * num_replicas)
    return True, min((gpus if num_replicas == 1 else sorted(gpus, reverse=True))[:needed])


def _of_nodes(args: argparse.Namespace) -> tuple[bool, int]:
    """Of a cluster's nodes this host may be one without a GPU."""
    nodes = read_nodes(args.ray_address, os.environ | ray_environment(args.ray_address))
    one_node = args.tp_across_nodes is None
    if args.device != "cpu":
        free = bytes_of_rank(nodes, num_ranks(args), one_node=one_node, on_gpus=True)
        if free is not None:
            return True, free
        if args.device == "cuda":
            counts = ", ".join(f"{node.name} has {node.num_gpus}" for node in nodes)
            where = "on one node" if one_node else "on all nodes together"
            raise ServeError(
                f"--device cuda {_ranks_wanted(args)}: Ray has not so many GPUs {where} ({counts}); lower --tp, "
                "allow --tp-across-nodes, or use --device cpu"
            )
    free = bytes_of_rank(nodes, args.tp, one_node=one_node, on_gpus=False)
    # Without a place there is nothing to plan by; the coordinator waits for one, and says what is missing.
    return False, available_host_bytes() // args.tp if free is None else free


def _ranks_wanted(args: argparse.Namespace) -> str:
    """Return the flags that say how many GPUs a replica takes."""
    own = num_own_draft_ranks(args)
    return f"--tp {args.tp}" + (f" --draft-placement dedicated --draft-tp {own}" if own else "")
