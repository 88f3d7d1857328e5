"""The memory that a rank may count on, wherever in a cluster it is put."""

from __future__ import annotations

import pytest

from server import environment
from tpserve.coordinator.errors import ClusterError
from tpserve.coordinator.node_memory import NodeMemory, bytes_of_rank, read_nodes

GIB = 1 << 30
HEAD = NodeMemory("head", num_cpus=4, num_gpus=0, host_bytes=8 * GIB, device_bytes=[])
SMALL = NodeMemory("small", num_cpus=8, num_gpus=2, host_bytes=64 * GIB, device_bytes=[40 * GIB, 39 * GIB])
LARGE = NodeMemory("large", num_cpus=64, num_gpus=4, host_bytes=512 * GIB, device_bytes=[80 * GIB] * 4)
HIDDEN = NodeMemory("hidden", num_cpus=8, num_gpus=0, host_bytes=64 * GIB, device_bytes=[80 * GIB] * 8)


@pytest.mark.parametrize(
    ("nodes", "tp_size", "one_node", "on_gpus", "expected"),
    [
        # The head has no GPU, and the group goes where there are enough.
        ([HEAD, LARGE], 4, True, True, 80 * GIB),
        ([HEAD, SMALL, LARGE], 4, True, True, 80 * GIB),
        ([HEAD, SMALL, LARGE], 2, True, True, 39 * GIB),
        ([HEAD, SMALL], 4, True, True, None),
        ([HEAD, SMALL, LARGE], 6, False, True, 39 * GIB),
        ([HEAD, SMALL, LARGE], 8, False, True, None),
        ([HEAD, HIDDEN], 1, True, True, None),  # Ray may not give them away
        # On CPUs ranks of one node share its memory.
        ([HEAD], 2, True, False, 4 * GIB),
        ([HEAD, SMALL], 4, True, False, 2 * GIB),
        ([HEAD, SMALL], 8, True, False, 8 * GIB),
        ([HEAD, SMALL], 8, False, False, 2 * GIB),
        ([HEAD], 8, False, False, None),
        ([], 1, True, False, None),
    ],
)
def test_memory_of_a_rank(
    nodes: list[NodeMemory], tp_size: int, one_node: bool, on_gpus: bool, expected: int | None
) -> None:
    assert bytes_of_rank(nodes, tp_size, one_node=one_node, on_gpus=on_gpus) == expected


def test_a_cluster_that_is_not_there_is_told() -> None:
    with pytest.raises(ClusterError, match=r"^Ray at 127\.0\.0\.1:1 cannot be joined: .*Connection refused"):
        read_nodes("127.0.0.1:1", environment("test"))
