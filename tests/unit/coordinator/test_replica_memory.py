"""Whose memory the ranks of a server on CPUs share, by its flags."""

from __future__ import annotations

import argparse

import pytest

from tpserve.coordinator import replica_memory
from tpserve.coordinator.node_memory import NodeMemory
from tpserve.coordinator.replica_memory import memory_of_ranks
from tpserve.coordinator.serve_arguments import add_arguments

GIB = 1 << 30
HOST_BYTES = 48 * GIB
NODES = [
    NodeMemory("here", num_cpus=2, num_gpus=0, host_bytes=HOST_BYTES, device_bytes=[]),
    NodeMemory("there", num_cpus=4, num_gpus=0, host_bytes=64 * GIB, device_bytes=[]),
]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--tp 2", HOST_BYTES // 2),
        ("--tp 2 --replica 0/3 --ray-address a:1 --ray-of-replicas", HOST_BYTES // 6),
        # Each of the model's ranks has a share of the draft's, see `plan_memory`.
        ("--tp 2 --draft-model d --draft-placement dedicated --draft-tp 2", HOST_BYTES // 2),
        ("--tp 2 --ray-address a:1", HOST_BYTES // 2),
        ("--tp 4 --ray-address a:1", 64 * GIB // 4),
        ("--tp 2 --ray-address a:1 --draft-model d --draft-placement dedicated", 64 * GIB // 2),
        ("--tp 2 --ray-address a:1 --draft-model d --draft-placement dedicated --draft-tp 4", HOST_BYTES // 2),
        (
            "--tp 4 --ray-address a:1 --tp-across-nodes pack --draft-model d --draft-placement dedicated",
            HOST_BYTES // 4,
        ),
        # Two replicas of a cluster may both be there, and one of them here.
        ("--tp 2 --replica 0/2 --ray-address a:1", 64 * GIB // 4),
    ],
)
def test_ranks_on_cpus(flags: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_memory, "available_host_bytes", lambda: HOST_BYTES)
    monkeypatch.setattr(replica_memory, "read_nodes", lambda *arguments: NODES)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert memory_of_ranks(parser.parse_args(["m", "--device", "cpu", *flags.split()])) == (False, expected)
