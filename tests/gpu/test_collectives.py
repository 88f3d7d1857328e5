"""Collectives between GPUs: bit for bit the sum in rank order on all ranks, alone and fused, in graphs and out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gpu_devices import NUM_DEVICES

RANKS = "gpu.collective_ranks"
GEMM_RANKS = "gpu.gemm_ranks"
DEADLINE_S = 280
ROWS = [1, 2, 3, 5, 8, 12, 16, 17, 31, 33, 64, 65, 100, 127, 128, 129, 200, 256, 511, 512, 513, 700]
two_gpus = pytest.mark.gpu(count=2)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port: int = bound.getsockname()[1]
        return port


def run_ranks(
    library: Path, world_size: int, backend: str, hidden: int, arguments: Sequence[str], module: str = RANKS
) -> list[dict[str, Any]]:
    """Run one process a rank; return what each printed. With fewer GPUs than ranks, ranks share them by turns."""
    port = free_port()
    ranks = []
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    for rank in range(world_size):
        command = [sys.executable, "-m", module, "--rank", str(rank), "--world-size", str(world_size)]
        command += ["--port", str(port), "--device", str(rank % NUM_DEVICES), "--kernels", str(library)]
        command += ["--backend", backend, "--hidden", str(hidden), *arguments]
        ranks.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)
        )
    results, failures = [], []
    try:
        for rank, process in enumerate(ranks):
            output, errors = process.communicate(timeout=DEADLINE_S)
            if process.returncode != 0:
                failures.append(f"rank {rank}: {errors[-2000:]}")
            else:
                results.append(json.loads(output.splitlines()[-1]))
    finally:
        for process in ranks:
            process.kill()
    assert not failures, "\n".join(failures)
    return results


def rows(sizes: Sequence[int]) -> list[str]:
    return ["--rows", *map(str, sizes)]


@two_gpus
@pytest.mark.parametrize("hidden", [576, 4096, 8192])
def test_sums_are_those_in_rank_order(kernel_library: Path, hidden: int) -> None:
    run_ranks(kernel_library, 2, "push", hidden, ["--checks", "sizes", "gather", *rows(ROWS)])


@two_gpus
@pytest.mark.parametrize("world_size", [4, 8])
def test_more_ranks_than_gpus_by_turns(kernel_library: Path, world_size: int) -> None:
    run_ranks(kernel_library, world_size, "push", 2048, ["--checks", "sizes", "gather", *rows([1, 8, 33, 130])])


@two_gpus
@pytest.mark.parametrize(
    ("world_size", "hidden", "sizes"), [(2, 576, ROWS), (2, 8192, ROWS), (4, 2048, [1, 33, 130, 513])]
)
def test_a_residual_stream_becomes_whole(
    kernel_library: Path, world_size: int, hidden: int, sizes: Sequence[int]
) -> None:
    run_ranks(kernel_library, world_size, "push", hidden, ["--checks", "whole", *rows(sizes)])


@two_gpus
def test_nccl_gives_the_same_within_rounding(kernel_library: Path) -> None:
    run_ranks(kernel_library, 2, "nccl", 4096, ["--checks", "sizes", "gather", "whole", "graph", *rows([1, 16, 129])])


@two_gpus
def test_ten_thousand_steps_of_ranks_out_of_step(kernel_library: Path) -> None:
    results = run_ranks(kernel_library, 2, "push", 4096, ["--checks", "soak", "--iterations", "10000"])
    assert results[0]["calls"] == 30_000


@two_gpus
@pytest.mark.parametrize("world_size", [2, 4])
def test_rows_of_several_sizes_take_turns(kernel_library: Path, world_size: int) -> None:
    """What a target and its draft do: buffers that hold rows of one are freed by calls of the other."""
    arguments = ["--checks", "soak", "--iterations", str(4000 // world_size), "--also-hidden", "576", "2048"]
    results = run_ranks(kernel_library, world_size, "push", 8192, arguments)
    assert results[0]["calls"] == 3 * (4000 // world_size)


@two_gpus
@pytest.mark.parametrize(("world_size", "backend"), [(2, "push"), (2, "nccl"), (4, "push")])
def test_a_draft_and_its_target_share_a_group_in_one_graph(kernel_library: Path, world_size: int, backend: str) -> None:
    arguments = ["--checks", "models", "--iterations", "100", "--also-hidden", "576"]
    run_ranks(kernel_library, world_size, backend, 8192, arguments)


@two_gpus
@pytest.mark.parametrize(("world_size", "backend"), [(2, "push"), (2, "nccl"), (4, "push")])
def test_logits_come_as_far_as_they_are_wanted(kernel_library: Path, world_size: int, backend: str) -> None:
    run_ranks(kernel_library, world_size, backend, 4096, ["--checks", "logits"])


@two_gpus
def test_graphs_replay(kernel_library: Path) -> None:
    run_ranks(kernel_library, 2, "push", 8192, ["--checks", "graph", "--iterations", "300"])


@two_gpus
def test_a_late_rank_is_named(kernel_library: Path) -> None:
    results = run_ranks(kernel_library, 2, "push", 4096, ["--checks", "late", "--timeout", "1"])
    assert results[0]["late"] == 1
    assert 0.9 < results[0]["waited_s"] < 10
    assert results[1]["late"] == -1


PUSHED_ROWS = [1, 2, 7, 8, 9, 16, 17, 24, 25, 63, 64, 65, 97, 128, 130, 191, 300, 512]
TWO_SHOT_HIDDEN = 16384
"""Rows of which fewer than 64 are two-shot with two ranks too."""


@two_gpus
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("hidden", "size"), [(512, 1024), (4096, 2048), (8192, 7168), (TWO_SHOT_HIDDEN, 512)])
def test_a_gemm_that_sends_its_tiles_gives_the_bits_of_one_that_does_not(
    kernel_library: Path, world_size: int, hidden: int, size: int
) -> None:
    arguments = ["--checks", "products", "--sizes", str(hidden), str(size), *rows([*PUSHED_ROWS, 513])]
    results = run_ranks(kernel_library, world_size, "push", hidden, arguments, GEMM_RANKS)
    assert results[0]["calls"] == 6 * (len(PUSHED_ROWS) + 1) * 2


@two_gpus
def test_channels_need_not_fill_tiles(kernel_library: Path) -> None:
    arguments = ["--checks", "products", "--sizes", "200", "512", "576", "768", "1000", "256"]
    arguments += rows([1, 5, 17, 64, 70, 150])
    run_ranks(kernel_library, 2, "push", 1024, arguments, GEMM_RANKS)


@two_gpus
def test_gemms_before_nccl(kernel_library: Path) -> None:
    arguments = ["--checks", "products", "--sizes", "4096", "1024", *rows([1, 16, 65, 140])]
    run_ranks(kernel_library, 2, "nccl", 4096, arguments, GEMM_RANKS)


@two_gpus
@pytest.mark.parametrize(("world_size", "hidden"), [(2, TWO_SHOT_HIDDEN), (4, 4096)])
def test_calls_with_and_without_pushing_take_turns(kernel_library: Path, world_size: int, hidden: int) -> None:
    arguments = ["--checks", "turns", "--iterations", str(6000 // world_size), "--also-hidden", "576"]
    arguments += rows([1, 3, 8, 20, 65, 97, 130, 600])
    run_ranks(kernel_library, world_size, "push", hidden, arguments, GEMM_RANKS)


@pytest.mark.parametrize(
    "world_size", [pytest.param(2, marks=two_gpus), pytest.param(4, marks=pytest.mark.gpu(count=4))]
)
def test_two_thousand_calls_of_one_graph(kernel_library: Path, world_size: int) -> None:
    """With twelve rows a stage given back before its scales are read (`await_loaded`) is wrong in every replay."""
    arguments = ["--checks", "graph", "--iterations", "2000", "--also-hidden", "1024", *rows([1, 4, 12, 40, 66, 140])]
    results = run_ranks(kernel_library, world_size, "push", TWO_SHOT_HIDDEN, arguments, GEMM_RANKS)
    assert results[0]["calls"] >= 1990


@two_gpus
@pytest.mark.parametrize("num_rows", [4, 60, 200])
def test_a_rank_that_does_not_push_is_named(kernel_library: Path, num_rows: int) -> None:
    arguments = ["--checks", "late", "--timeout", "1", *rows([num_rows])]
    results = run_ranks(kernel_library, 2, "push", TWO_SHOT_HIDDEN, arguments, GEMM_RANKS)
    assert results[0]["late"] == 1
    assert 0.9 < results[0]["waited_s"] < 10
    assert results[1]["late"] == -1
