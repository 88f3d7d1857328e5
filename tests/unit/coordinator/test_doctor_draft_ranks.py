"""`tpserve doctor` counts the ranks that a draft has to itself, with the model's, on this host and in a cluster."""

from __future__ import annotations

import os

import pytest

from tpserve.coordinator.doctor.__main__ import main
from tpserve.coordinator.doctor.findings import Wanted
from tpserve.coordinator.doctor.gpus import check_gpus
from tpserve.coordinator.doctor.nvml import Gpus
from tpserve.coordinator.doctor.software import check_places
from tpserve.coordinator.node_memory import NodeMemory
from unit.coordinator.test_doctor import GIB, doctor, gpus, of


@pytest.mark.parametrize(
    ("host", "check", "status"),
    [
        (gpus(4), "gpu", "ok"),
        (gpus(3), "gpu", "fail"),
        (gpus(4, used=70 * GIB), "gpu-memory", "warn"),
        (gpus(4), "gpu-peers", "ok"),
        (gpus(5, unreachable=((3, 4),)), "gpu-peers", "ok"),
        (gpus(4, unreachable=((1, 2),)), "gpu-peers", "fail"),  # by which tokens go
    ],
)
def test_gpus_of_a_draft_are_judged_too(host: Gpus, check: str, status: str) -> None:
    wanted = Wanted(device="cuda", tp_size=2, num_draft_ranks=2)
    assert of(check_gpus(wanted, lambda: host))[check] == status


def test_what_a_drafts_ranks_lack_is_named() -> None:
    wanted = Wanted(device="cuda", tp_size=2, num_draft_ranks=2)
    first = next(check_gpus(wanted, lambda: gpus(3)))
    assert first.found.endswith("; --tp 2 --draft-placement dedicated --draft-tp 2 takes 4")
    fewer = "lower --tp or --draft-tp, give --draft-placement colocated"
    assert first.remedy == f"{fewer}, or give this host or container 4 GPUs"
    busy = next(found for found in check_gpus(wanted, lambda: gpus(8, used=70 * GIB)) if found.check == "gpu-memory")
    assert [f"GPU {index} has" in busy.found for index in range(5)] == [True, True, True, True, False]
    draft = ("--tp", "1", "--draft-model", "d", "--draft-placement", "dedicated")
    one = str(min(os.sched_getaffinity(0)))
    found = doctor(*draft, "--draft-tp", "2", "--device", "cpu", prefix=("taskset", "-c", one))[1]
    assert found["cpus"]["status"] == "warn"
    assert found["cpus"]["found"].endswith("; --tp 1 --draft-placement dedicated --draft-tp 2 has 3 ranks")
    assert found["cpus"]["remedy"].startswith(fewer)
    assert found["shm"]["found"].endswith(", 84 MiB are needed"), "the draft's ranks are a group"
    assert doctor(*draft, "--device", "cpu")[1]["shm"]["found"].endswith(", 80 MiB are needed")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--draft-placement dedicated", "--draft-placement dedicated without a proposer: give --draft-model"),
        ("--draft-model d --draft-tp 3 --draft-placement dedicated", "--draft-tp 3 is not one of 1, 2, 4, 8"),
        ("--device cuda --tp 4 --draft-model d --draft-tp 2", "give --draft-tp 1 or 4, or --draft-placement dedicated"),
    ],
)
def test_flags_that_a_server_would_refuse(flags: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags.split())
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


SMALL = NodeMemory("small", num_cpus=2, num_gpus=2, host_bytes=64 * GIB, device_bytes=[80 * GIB] * 2)
LARGE = NodeMemory("large", num_cpus=3, num_gpus=3, host_bytes=64 * GIB, device_bytes=[80 * GIB] * 3)
HEAD = NodeMemory("head", num_cpus=8, num_gpus=0, host_bytes=64 * GIB, device_bytes=[])


@pytest.mark.parametrize(
    ("wanted", "nodes", "status", "found", "remedy"),
    [
        (Wanted("cuda", 2), [SMALL], "ok", "Ray has 2 GPUs on one node", ""),
        (Wanted("cuda", 2, 1), [SMALL, LARGE], "ok", "Ray has 3 GPUs on one node", ""),
        (
            Wanted("cuda", 2, 2, "pack"),  # they write each other's memory
            [SMALL, LARGE],
            "fail",
            "--tp 2 --draft-placement dedicated --draft-tp 2 takes 4 GPUs on one node: large has 3, small has 2",
            "lower --tp or --draft-tp, give --draft-placement colocated, or add a node with more GPUs",
        ),
        (
            Wanted("cuda", 4),
            [SMALL, LARGE],
            "fail",
            "--tp 4 takes 4 GPUs on one node: large has 3, small has 2",
            "lower --tp, allow --tp-across-nodes, or add a node with more GPUs",
        ),
        (Wanted("cuda", 4, 0, "pack"), [SMALL, LARGE], "ok", "Ray has 4 GPUs on all nodes together", ""),
        (Wanted("cpu", 2, 2, "pack"), [SMALL, LARGE], "ok", "Ray has 4 CPUs on all nodes together", ""),
        (
            Wanted("cpu", 2, 2),
            [SMALL, LARGE],
            "fail",
            "--tp 2 --draft-placement dedicated --draft-tp 2 takes 4 CPUs on one node: large has 3, small has 2",
            "lower --tp or --draft-tp, give --draft-placement colocated, allow --tp-across-nodes, or add a node with "
            "more CPUs",
        ),
        (Wanted("auto", 2, 2), [SMALL, HEAD], "ok", "Ray has 4 CPUs on one node", ""),
        (
            Wanted("cpu", tp_across_nodes="spread"),
            [],
            "fail",
            "--tp 1 takes 1 CPUs on all nodes together: no node is alive",
            "lower --tp, or add a node with more CPUs",
        ),
    ],
)
def test_places_for_ranks_in_a_cluster(
    wanted: Wanted, nodes: list[NodeMemory], status: str, found: str, remedy: str
) -> None:
    finding = check_places(wanted, nodes)
    assert (finding.check, finding.status, finding.found, finding.remedy) == ("ray-places", status, found, remedy)
