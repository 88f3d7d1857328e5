"""The memory that a rank may count on, wherever in a cluster it is put."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

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


@pytest.mark.parametrize(
    ("nodes", "num_draft_ranks", "num_replicas", "one_node", "expected"),
    [
        # A node must have room for the draft's ranks too.
        ([HEAD, SMALL], 0, 1, True, 2 * GIB),
        ([HEAD, SMALL], 1, 1, True, 16 * GIB),
        ([HEAD, SMALL], 8, 1, True, None),
        ([HEAD, SMALL], 8, 1, False, 2 * GIB),
        ([HEAD, SMALL], 16, 1, False, None),
        # The node that has the whole draft keeps room for all of it, however few of the model's ranks are there.
        ([replace(HEAD, num_cpus=2), SMALL], 0, 1, False, 4 * GIB),
        ([replace(HEAD, num_cpus=2), SMALL], 2, 1, False, 2 * GIB),
        ([replace(HEAD, num_cpus=2), SMALL], 4, 1, False, 4 * GIB),
        # Replicas share a node as far as it has places for them.
        ([HEAD, SMALL], 0, 3, True, 2 * GIB),
        ([SMALL], 0, 3, True, 8 * GIB),
        ([SMALL], 0, 3, False, 8 * GIB),
        ([SMALL], 1, 3, True, 16 * GIB),
        ([LARGE], 1, 3, True, 512 * GIB // 12),
    ],
)
def test_memory_of_four_ranks_that_share_nodes_with_others(
    nodes: list[NodeMemory], num_draft_ranks: int, num_replicas: int, one_node: bool, expected: int | None
) -> None:
    found = bytes_of_rank(
        nodes,
        4,
        one_node=one_node,
        on_gpus=False,
        num_draft_ranks=num_draft_ranks,
        num_replicas=num_replicas,
    )
    assert found == expected


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("num_draft_ranks", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_whatever_ray_puts_on_a_node_fits_there(tp_size: int, num_draft_ranks: int, num_replicas: int) -> None:
    """Each of the model's ranks leaves the draft its share: that many ranks' shares must be as much as is there."""
    own = num_draft_ranks
    for num_places, one_node in product(range(1, 60), (True, False)):
        node = replace(LARGE, num_cpus=num_places)
        others = [replace(LARGE, name="others", num_cpus=100, host_bytes=1 << 60)]
        found = bytes_of_rank(
            [node, *others], tp_size, one_node=one_node, on_gpus=False, num_draft_ranks=own, num_replicas=num_replicas
        )
        assert found is not None
        for num_drafts in range(num_replicas + 1):
            if one_node:
                num_ours = num_drafts * tp_size
            else:
                num_ours = min(num_replicas * tp_size, num_places - num_drafts * own)
            if num_drafts * own + num_ours > num_places or num_ours < 0:
                continue  # no room for so many
            assert num_ours * found <= node.host_bytes
            if own:
                assert num_drafts * tp_size * found <= node.host_bytes


def test_a_cluster_that_is_not_there_is_told() -> None:
    with pytest.raises(ClusterError, match=r"^Ray at 127\.0\.0\.1:1 cannot be joined: .*Connection refused"):
        read_nodes("127.0.0.1:1", environment("test"))
