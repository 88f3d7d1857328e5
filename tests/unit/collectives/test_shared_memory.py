"""The shared-memory communicator between real processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest
import tvm_ffi

from tpserve.collectives.cpu import SharedMemoryCommunicator, all_gather_reference, all_reduce_reference

SIZES = (1, 3, 16, 576, 1023, 1024, 1025, 4608, 40_001)
SHAPES = ((1, 1), (3, 5), (8, 576), (2, 5000), (70, 300))
CAPACITY = 16 * 1024
PRELOADED = ["numpy", "pytest", "tvm_ffi", "tpserve.collectives.cpu"]
"""Imported once, by the process that ranks are forked from: it takes each most of a second."""

Body = Callable[[SharedMemoryCommunicator, Connection], object]


def part_of(rank: int, *shape: int) -> npt.NDArray[np.float32]:
    # Exponents far apart, so that another order of the sum gives other bits.
    rng = np.random.default_rng([rank, *shape])
    return (rng.standard_normal(shape) * 10.0 ** rng.integers(-4, 4, shape)).astype(np.float32)


def process(body: Body, library: str, name: str, rank: int, world: int, timeout_s: float, pipe: Connection) -> None:
    try:
        module = tvm_ffi.load_module(library)
        pipe.send(("ready", None))
        pipe.recv()  # until all are: how long a Python takes to start is no part of a time-out
        with SharedMemoryCommunicator(
            module, name, rank, world, capacity_bytes=CAPACITY, timeout_s=timeout_s
        ) as communicator:
            pipe.send(("attached", os.getpid()))
            pipe.send(("result", body(communicator, pipe)))
            pipe.recv()  # stay attached until the test lets go
    except (RuntimeError, TimeoutError, ValueError) as error:
        pipe.send((type(error).__name__, str(error)))


class Group:
    """Spawned ranks, with a pipe to each."""

    def __init__(self, library: str, body: Body, ranks: list[int], world: int, timeout_s: float) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.name = f"tpserve-test-{uuid.uuid4().hex}"
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in ranks:
            ours, theirs = context.Pipe()
            arguments = (body, library, self.name, rank, world, timeout_s, theirs)
            started = context.Process(target=process, args=arguments, daemon=True)
            started.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(started)
        self.receive_all("ready")
        for pipe in self.pipes:
            pipe.send("go")

    def receive(self, kind: str, index: int) -> Any:
        assert self.pipes[index].poll(60), f"rank {index} is silent"
        got, value = self.pipes[index].recv()
        assert got == kind, (got, value)
        return value

    def receive_all(self, kind: str) -> list[Any]:
        return [self.receive(kind, index) for index in range(len(self.pipes))]

    def segment_exists(self) -> bool:
        return Path("/dev/shm", self.name).exists()

    def close(self) -> None:
        for pipe, started in zip(self.pipes, self.processes, strict=True):
            pipe.close()
            started.kill()
            started.join()


Start = Callable[..., Group]


@pytest.fixture
def start(library: str) -> Iterator[Start]:
    groups = []

    def make(body: Body, world: int, *, ranks: list[int] | None = None, timeout_s: float = 30.0) -> Group:
        groups.append(Group(library, body, list(range(world)) if ranks is None else ranks, world, timeout_s))
        return groups[-1]

    yield make
    for group in groups:
        group.close()


def one_reduction(communicator: SharedMemoryCommunicator, pipe: Connection) -> object:
    """Rank 0 comes when it is told to; returns the microseconds that it took."""
    x = part_of(communicator.rank, 16)
    if communicator.rank == 0:
        pipe.recv()
    else:
        pipe.send(("coming", None))
    communicator.all_reduce(x, x)
    return communicator.stats()["all_reduce"].busy_us


def wait_until_waiting(pid: int) -> None:
    """Return once the process, which had nothing left to do but to wait, sleeps or has run for 50 ms."""
    process, deadline = psutil.Process(pid), time.monotonic() + 30

    def ran_s() -> float:
        times = process.cpu_times()
        return times.user + times.system

    at_first = ran_s()
    while process.status() != psutil.STATUS_SLEEPING and ran_s() < at_first + 0.05:
        assert time.monotonic() < deadline, f"process {pid} does not run"
        time.sleep(0.01)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_the_time_that_a_rank_was_stopped_is_no_waiting_for_others(start: Start, is_stopped: bool) -> None:
    """Or two ranks of which one was stopped while it waited had waited alike, and neither came last."""
    group = start(one_reduction, 2)
    pids = group.receive_all("attached")
    group.receive("coming", 1)
    wait_until_waiting(pids[1])
    if is_stopped:
        os.kill(pids[1], signal.SIGSTOP)
    time.sleep(3.0)
    group.pipes[0].send("come")
    group.receive("result", 0)
    if is_stopped:
        os.kill(pids[1], signal.SIGCONT)
    waited_s = group.receive("result", 1) / 1e6
    assert waited_s < 1.2 if is_stopped else waited_s > 1.5


def reduce_and_gather(communicator: SharedMemoryCommunicator, _: Connection) -> object:
    reduced, gathered = [], []
    for size in SIZES:
        x, out = part_of(communicator.rank, size), np.full(size, np.nan, np.float32)
        communicator.all_reduce(x, out)
        communicator.all_reduce(x, x)  # in place
        np.testing.assert_array_equal(x, out)
        reduced.append(out)
    for rows, columns in SHAPES:
        out = np.full((rows, columns * communicator.world_size), np.nan, np.float32)
        communicator.all_gather(part_of(communicator.rank, rows, columns), out)
        gathered.append(out)
    stats = communicator.stats()
    return reduced, gathered, {kind: (one.num_calls, one.num_bytes, one.busy_us > 0) for kind, one in stats.items()}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_rank_gets_the_sum_in_rank_order(start: Start, world: int) -> None:
    group = start(reduce_and_gather, world)
    group.receive_all("attached")
    assert not group.segment_exists()
    totals = {
        "all_reduce": (2 * len(SIZES), 8 * sum(SIZES), True),
        "all_gather": (len(SHAPES), 4 * sum(rows * columns for rows, columns in SHAPES), True),
    }
    for reduced, gathered, stats in group.receive_all("result"):
        assert stats == totals
        for size, out in zip(SIZES, reduced, strict=True):
            np.testing.assert_array_equal(out, all_reduce_reference([part_of(r, size) for r in range(world)]))
        for shape, out in zip(SHAPES, gathered, strict=True):
            np.testing.assert_array_equal(out, all_gather_reference([part_of(r, *shape) for r in range(world)]))


def many_small(communicator: SharedMemoryCommunicator, _: Connection) -> object:
    """Feed each sum into the next call, so that one wrong bit anywhere spreads to the end."""
    x, out = part_of(communicator.rank, 64), np.zeros(64, np.float32)
    own = x.copy()
    for _call in range(10_000):
        communicator.all_reduce(x, out)
        np.tanh(out, out=out)
        np.add(out, own, out=x)
    return out


@pytest.mark.parametrize("world", [2, 4])
def test_ten_thousand_small_sums_are_equal_on_all_ranks(start: Start, world: int) -> None:
    group = start(many_small, world)
    group.receive_all("attached")
    results = group.receive_all("result")
    own = [part_of(rank, 64) for rank in range(world)]
    parts = [part.copy() for part in own]
    for _call in range(10_000):
        expected = np.tanh(all_reduce_reference(parts))
        parts = [expected + part for part in own]
    for out in results:
        np.testing.assert_array_equal(out, expected)


def reduce_when_told(communicator: SharedMemoryCommunicator, pipe: Connection) -> object:
    x = np.ones(8, np.float32)
    communicator.all_reduce(x, x)
    pipe.recv()
    communicator.all_reduce(x, x)
    return x[0]


def test_a_killed_rank_is_named_by_the_survivors(start: Start) -> None:
    group = start(reduce_when_told, 4, timeout_s=1.5)
    pids = group.receive_all("attached")
    os.kill(pids[2], signal.SIGKILL)
    begin = time.monotonic()
    survivors = (0, 1, 3)
    for index in survivors:
        group.pipes[index].send("go")
    for index in survivors:
        message = group.receive("TimeoutError", index)
        assert message.endswith("for rank 2"), message
        assert "all_reduce, call " in message
    assert time.monotonic() - begin < 30
    assert not group.segment_exists()


def abort_while_waiting(communicator: SharedMemoryCommunicator, pipe: Connection) -> object:
    x = np.ones(8, np.float32)
    if communicator.rank == 1:
        pipe.recv()
        communicator.abort()
        return None
    communicator.all_reduce(x, x)
    return x


def test_abort_ends_every_wait(start: Start) -> None:
    group = start(abort_while_waiting, 3)
    group.receive_all("attached")
    group.pipes[1].send("go")
    for index in (0, 2):
        assert group.receive("RuntimeError", index).endswith("was aborted by rank 1")


def close_instead(communicator: SharedMemoryCommunicator, _: Connection) -> object:
    x = np.ones(8, np.float32)
    if communicator.rank == 0:
        communicator.close()
        with pytest.raises(RuntimeError, match="communicator of rank 0 is closed"):
            communicator.all_reduce(x, x)
        return None
    with pytest.raises(RuntimeError, match="rank 0 has closed its communicator"):
        communicator.all_reduce(x, x)
    communicator.all_reduce(x, x)
    return None


def test_a_closed_rank_is_named_and_a_failed_communicator_stays_failed(start: Start) -> None:
    group = start(close_instead, 2)
    group.receive_all("attached")
    group.receive("result", 0)
    assert "failed in call 1 and cannot be used again" in group.receive("RuntimeError", 1)


def disagree(communicator: SharedMemoryCommunicator, _: Connection) -> object:
    x = np.ones((1, 4 + communicator.rank), np.float32)
    communicator.all_reduce(x, x)
    return None


def test_ranks_that_disagree_are_told(start: Start) -> None:
    group = start(disagree, 2)
    group.receive_all("attached")
    assert "all_reduce of 16 bytes on rank 0 and all_reduce of 20 bytes on rank 1" in group.receive("ValueError", 0)
    assert "all_reduce of 20 bytes on rank 1 and all_reduce of 16 bytes on rank 0" in group.receive("ValueError", 1)


@pytest.mark.parametrize(("ranks", "missing"), [([0, 2], "for rank 1 to attach"), ([1, 2], "for rank 0 to create")])
def test_a_rank_that_never_comes_is_named_and_leaves_no_segment(start: Start, ranks: list[int], missing: str) -> None:
    group = start(reduce_when_told, 3, ranks=ranks, timeout_s=2.0)
    for message in group.receive_all("TimeoutError"):
        assert missing in message
    assert not group.segment_exists()


def test_close_from_another_thread_ends_a_wait(start: Start) -> None:
    group = start(close_from_thread, 2)
    group.receive_all("attached")
    assert group.receive("RuntimeError", 0).endswith("rank 0 has closed its communicator")


def close_from_thread(communicator: SharedMemoryCommunicator, pipe: Connection) -> object:
    if communicator.rank == 1:
        return pipe.recv()  # never calls
    x = np.ones(8, np.float32)
    timer = threading.Timer(0.1, communicator.close)
    timer.start()
    communicator.all_reduce(x, x)
    return None


def test_bad_arguments_are_refused(library: str) -> None:
    module = tvm_ffi.load_module(library)
    with pytest.raises(ValueError, match="rank is 2, expected 0 to 1"):
        SharedMemoryCommunicator(module, "x", 2, 2)
    with pytest.raises(ValueError, match="capacity_bytes is 100, expected a positive multiple of 64"):
        SharedMemoryCommunicator(module, "x", 0, 1, capacity_bytes=100)


def test_shapes_and_types_are_checked(library: str) -> None:
    module = tvm_ffi.load_module(library)
    x = np.ones((2, 3), np.float32)
    with SharedMemoryCommunicator(module, f"tpserve-test-{uuid.uuid4().hex}", 0, 1) as communicator:
        with pytest.raises(ValueError, match="x has 6 elements and out 5"):
            communicator.all_reduce(x, np.ones(5, np.float32))
        with pytest.raises(TypeError, match="x has dtype code 2 with 64 bits, expected float32"):
            communicator.all_reduce(x.astype(np.float64), x)
        with pytest.raises(ValueError, match="expected \\(rows, columns\\)"):
            communicator.all_gather(x, np.ones((2, 4), np.float32))
        communicator.register()
        out = np.zeros_like(x)
        tvm_ffi.get_global_func("tpserve.all_reduce")(x, out)
        np.testing.assert_array_equal(out, x)
