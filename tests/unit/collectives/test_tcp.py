"""Collectives over TCP give what shared memory gives, bit for bit, and fail as it fails; plain and within TLS."""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tvm_ffi

from group_certificates import group_of
from tpserve.collectives.base import Communicator
from tpserve.collectives.cpu import SharedMemoryCommunicator, all_reduce_reference
from tpserve.collectives.rendezvous import Rendezvous, listen
from tpserve.collectives.tcp import TcpCommunicator
from tpserve.collectives.tls import GroupTls

HOST = "127.0.0.1"
SIZES = (1, 3, 16, 576, 1025, 40_001)
LARGE = 3_000_000
"""Elements; more than the sockets hold, so that ranks must send and receive at once."""
SHAPES = ((1, 1), (3, 5), (8, 576), (2, 5000), (70, 300))

Work = Callable[[TcpCommunicator], Any]
MOST_RANKS = 4
tls_of: Sequence[GroupTls | None] = [None] * MOST_RANKS
"""By rank, in the test that runs."""


@pytest.fixture(params=["plain", "tls"], autouse=True)
def connections(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    kind: str = request.param
    if kind == "tls":
        monkeypatch.setitem(globals(), "tls_of", group_of(MOST_RANKS))
    return kind


def part_of(rank: int, *shape: int) -> npt.NDArray[np.float32]:
    # Exponents far apart, so that another order of the sum gives other bits.
    rng = np.random.default_rng([rank, *shape])
    return (rng.standard_normal(shape) * 10.0 ** rng.integers(-4, 4, shape)).astype(np.float32)


def run(world: int, work: Work, *, timeout_s: float = 20.0) -> list[Any]:
    """Let each rank of a group work, each in a thread; return what they gave."""
    door = listen(HOST)
    address = f"{HOST}:{door.getsockname()[1]}"

    def rank_of(rank: int) -> Any:
        own = door if rank == 0 else None
        with (
            Rendezvous(rank, world, address, "secret", timeout_s=10, door=own, tls=tls_of[rank]) as place,
            TcpCommunicator(
                place,
                HOST,
                rank,
                world,
                secret="secret",
                timeout_s=timeout_s,
                attach_timeout_s=10,
                tls=tls_of[rank],
            ) as communicator,
        ):
            return work(communicator)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(rank_of, range(world)))


def reduce_and_gather(communicator: Communicator) -> list[npt.NDArray[np.float32]]:
    results = []
    for size in (*SIZES, LARGE):
        x, out = part_of(communicator.rank, size), np.full(size, np.nan, np.float32)
        communicator.all_reduce(x, out)
        communicator.all_reduce(x, x)  # in place
        np.testing.assert_array_equal(x, out)
        results.append(out)
    for rows, columns in SHAPES:
        out = np.full((rows, columns * communicator.world_size), np.nan, np.float32)
        communicator.all_gather(part_of(communicator.rank, rows, columns), out)
        results.append(out)
    return results


@pytest.mark.parametrize("world", [2, 4])
def test_bits_are_those_of_shared_memory(library: str, world: int) -> None:
    shared_memory = tvm_ffi.load_module(library)
    name = f"tpserve-test-{uuid.uuid4().hex}"

    def by_memory(rank: int) -> list[npt.NDArray[np.float32]]:
        with SharedMemoryCommunicator(shared_memory, name, rank, world, timeout_s=20) as communicator:
            return reduce_and_gather(communicator)

    with ThreadPoolExecutor(world) as pool:
        expected = list(pool.map(by_memory, range(world)))
    for rank, results in enumerate(run(world, reduce_and_gather)):
        for result, same in zip(results, expected[rank], strict=True):
            np.testing.assert_array_equal(result.view(np.uint32), same.view(np.uint32))


def test_calls_that_feed_each_other_stay_in_step() -> None:
    """Ranks run ahead of each other by at most one call; a message taken for another shows in the end."""
    world = 4

    def work(communicator: TcpCommunicator) -> Any:
        x, out = part_of(communicator.rank, 64), np.zeros(64, np.float32)
        own = x.copy()
        for _ in range(300):
            communicator.all_reduce(x, out)
            np.tanh(out, out=out)
            np.add(out, own, out=x)
        stats = communicator.stats()["all_reduce"]
        assert (stats.num_calls, stats.num_bytes) == (300, 300 * 256)
        assert stats.busy_us > 0
        return out

    own = [part_of(rank, 64) for rank in range(world)]
    parts = [part.copy() for part in own]
    for _ in range(300):
        expected = np.tanh(all_reduce_reference(parts))
        parts = [expected + part for part in own]
    for out in run(world, work):
        np.testing.assert_array_equal(out, expected)


def test_a_late_rank_is_named() -> None:
    over = threading.Barrier(3)

    def work(communicator: TcpCommunicator) -> str:
        x = np.ones(8, np.float32)
        communicator.all_reduce(x, x)
        if communicator.rank == 2:
            over.wait(20)
            return ""
        with pytest.raises(TimeoutError) as raised:
            communicator.all_reduce(x, x)
        over.wait(20)
        with pytest.raises(RuntimeError, match="failed in call 2 and cannot be used again"):
            communicator.all_reduce(x, x)
        return str(raised.value)

    words = run(3, work, timeout_s=1.5)
    assert words[:2] == [f"rank {rank} waited 1.5 s in all_reduce, call 2, for rank 2" for rank in range(2)]


def test_a_rank_that_has_left_is_named() -> None:
    def work(communicator: TcpCommunicator) -> None:
        x = np.ones(8, np.float32)
        if communicator.rank == 1:
            communicator.close()
            with pytest.raises(RuntimeError, match="communicator of rank 1 is closed"):
                communicator.all_reduce(x, x)
            return
        # Not a RuntimeError: whoever waited for another is not at fault.
        with pytest.raises(ConnectionError, match="call 1 on rank 0: rank 1 has closed its communicator or died"):
            communicator.all_reduce(x, x)

    run(2, work)


@pytest.mark.parametrize("error", [ConnectionError("rank 1 has died"), TimeoutError("rank 1 is late")])
def test_errors_of_who_waited_keep_their_type_on_the_way_through_the_library(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        tvm_ffi.convert(fail)()


def test_close_from_another_thread_ends_a_wait() -> None:
    over = threading.Event()

    def work(communicator: TcpCommunicator) -> None:
        if communicator.rank == 1:
            over.wait(10)
            return
        threading.Timer(0.1, communicator.close).start()
        x = np.ones(8, np.float32)
        with pytest.raises(RuntimeError, match="rank 0 has closed its communicator"):
            communicator.all_reduce(x, x)
        over.set()

    run(2, work)


def test_ranks_that_disagree_are_told() -> None:
    def work(communicator: TcpCommunicator) -> str:
        x = np.ones(4 + communicator.rank, np.float32)
        with pytest.raises(ValueError, match="call 1 is") as raised:
            communicator.all_reduce(x, x)
        return str(raised.value)

    words = run(2, work)
    assert words[0] == "call 1 is all_reduce of 16 bytes on rank 0 and all_reduce of 20 bytes on rank 1, its call 1"
    assert words[1] == "call 1 is all_reduce of 20 bytes on rank 1 and all_reduce of 16 bytes on rank 0, its call 1"


def test_tls_is_what_goes_over_the_wire(connections: str) -> None:
    """The activations' bytes are seen by who looks at the sockets, or not."""
    pattern = np.full(2000, 1234.5, np.float32)
    seen: list[bytes] = []

    def work(communicator: TcpCommunicator) -> None:
        if communicator.rank == 1:
            peer = communicator._peers[0]
            over.wait(10)  # until the message has come
            with socket.socket(fileno=peer.detach()) as raw:
                raw.settimeout(10)
                seen.append(raw.recv(4096))
            return
        threading.Timer(0.2, over.set).start()
        with pytest.raises((ConnectionError, TimeoutError)):
            communicator.all_reduce(pattern, pattern)

    over = threading.Event()
    run(2, work, timeout_s=1.0)
    (wire,) = seen
    assert len(wire) > 1000
    assert (pattern[:2].tobytes() in wire) is (connections == "plain")


def test_a_stranger_is_no_rank() -> None:
    """Somebody who finds a rank's door without the secret takes nobody's place."""
    doors: list[str] = []

    class Spied(Rendezvous):
        def exchange(self, payload: bytes) -> list[bytes]:
            told = super().exchange(payload)
            host, _, port = told[0].decode().rpartition(":")
            with socket.create_connection((host, int(port)), timeout=5) as stranger:
                stranger.sendall(b"\0" * 40)
            doors.append(told[0].decode())
            return told

    door = listen(HOST)
    address = f"{HOST}:{door.getsockname()[1]}"

    def rank_of(rank: int) -> Any:
        with (
            Spied(
                rank, 2, address, "secret", timeout_s=10, door=door if rank == 0 else None, tls=tls_of[rank]
            ) as place,
            TcpCommunicator(
                place, HOST, rank, 2, secret="secret", timeout_s=5, attach_timeout_s=10, tls=tls_of[rank]
            ) as communicator,
        ):
            x = np.full(3, rank + 1, np.float32)
            communicator.all_reduce(x, x)
            return x[0]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(rank_of, range(2))) == [3, 3]
    assert len(set(doors)) == 1


def test_graphs_call_it_and_get_its_errors() -> None:
    over = threading.Barrier(2)

    def work(communicator: TcpCommunicator) -> None:
        x, out = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
        if communicator.rank == 1:
            communicator.all_reduce(x, x)
            over.wait(20)
            return
        communicator.register()
        tvm_ffi.get_global_func("tpserve.all_reduce")(x, out)
        np.testing.assert_array_equal(out, 2 * x)
        with pytest.raises(TimeoutError, match=r"rank 0 waited 1\.5 s in all_gather, call 2, for rank 1"):
            tvm_ffi.get_global_func("tpserve.all_gather")(x, np.zeros((2, 6), np.float32))
        over.wait(20)

    run(2, work, timeout_s=1.5)


def test_shapes_and_types_are_checked() -> None:
    def work(communicator: TcpCommunicator) -> None:
        x = np.ones((2, 3), np.float32)
        with pytest.raises(ValueError, match="x has 6 elements and out 5"):
            communicator.all_reduce(x, np.ones(5, np.float32))
        with pytest.raises(TypeError, match="x has dtype float64, expected float32"):
            communicator.all_reduce(x.astype(np.float64), x)
        with pytest.raises(ValueError, match="x is not contiguous"):
            communicator.all_reduce(x.T, x)
        with pytest.raises(ValueError, match=r"expected \(rows, columns\) and \(rows, 2 \* columns\)"):
            communicator.all_gather(x, np.ones((2, 4), np.float32))

    run(2, work)
