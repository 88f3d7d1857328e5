"""Where ranks on GPUs meet: everybody gets what everybody brought, the late are named, strangers are turned away."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tpserve.collectives import rendezvous
from tpserve.collectives.rendezvous import Rendezvous, listen

HOST = "127.0.0.1"


def address_of(door: socket.socket) -> str:
    return f"{HOST}:{door.getsockname()[1]}"


def meet(world_size: int, work: Callable[[Rendezvous, int], object], timeout_s: float = 10.0) -> list[object]:
    door = listen(HOST)

    def run(rank: int) -> object:
        with Rendezvous(
            rank, world_size, address_of(door), "secret", timeout_s=timeout_s, door=door if rank == 0 else None
        ) as place:
            return work(place, rank)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_rank_gets_what_all_ranks_brought(world_size: int) -> None:
    def work(place: Rendezvous, rank: int) -> object:
        return [place.exchange(f"{i} of {rank}".encode() * 1000) for i in range(3)]

    expected = [[f"{i} of {rank}".encode() * 1000 for rank in range(world_size)] for i in range(3)]
    assert meet(world_size, work) == [expected] * world_size


def test_an_exchange_waits_for_the_slowest() -> None:
    started = time.monotonic()

    def work(place: Rendezvous, rank: int) -> object:
        if rank == 1:
            threading.Event().wait(0.3)
        place.exchange(b"")
        return time.monotonic() - started > 0.3

    assert meet(2, work) == [True, True]


def test_ranks_that_do_not_come_are_named() -> None:
    door = listen(HOST)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(Rendezvous, 1, 4, address_of(door), "secret", timeout_s=0.5)
        with pytest.raises(TimeoutError, match=r"rank 0 waited 0\.5 s for rank 2, 3 to come"):
            Rendezvous(0, 4, address_of(door), "secret", timeout_s=0.5, door=door)
        other.result().close()


def test_a_rank_that_is_late_in_an_exchange_is_named() -> None:
    def work(place: Rendezvous, rank: int) -> object:
        if rank == 1:
            threading.Event().wait(0.8)
            return None
        with pytest.raises(TimeoutError, match=r"rank 0 waited 0\.4 s for rank 1 to exchange"):
            place.exchange(b"")
        return None

    meet(2, work, timeout_s=0.4)


def test_a_rank_that_has_left_is_named() -> None:
    def work(place: Rendezvous, rank: int) -> object:
        if rank == 1:
            place.close()
            return None
        with pytest.raises(ConnectionError, match="rank 1 left the rendezvous"):
            place.exchange(b"")
        return None

    meet(2, work)


def test_strangers_are_turned_away() -> None:
    door = listen(HOST)
    with ThreadPoolExecutor(2) as pool:
        stranger = pool.submit(Rendezvous, 1, 2, address_of(door), "guess", timeout_s=1.0)
        rank_0 = pool.submit(Rendezvous, 0, 2, address_of(door), "secret", timeout_s=1.0, door=door)
        with pytest.raises(TimeoutError, match="for rank 1 to come"):
            rank_0.result()
        with stranger.result() as place, pytest.raises((ConnectionError, TimeoutError)):
            place.exchange(b"")


def test_rank_0_needs_its_door() -> None:
    with pytest.raises(ValueError, match="the door that it opened"):
        Rendezvous(0, 2, "127.0.0.1:1", "secret", timeout_s=0.1)


def test_a_stranger_that_says_nothing_does_not_keep_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_HANDSHAKE_S", 0.2)
    door = listen(HOST)
    with socket.create_connection(door.getsockname()), ThreadPoolExecutor(2) as pool:
        rank_0 = pool.submit(Rendezvous, 0, 2, address_of(door), "secret", timeout_s=10.0, door=door)
        rank_1 = pool.submit(Rendezvous, 1, 2, address_of(door), "secret", timeout_s=10.0)
        rank_1.result(5).close()
        rank_0.result(5).close()
