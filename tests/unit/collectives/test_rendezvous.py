"""Where ranks on GPUs meet: everybody gets what everybody brought, the late are named, strangers are turned away."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from group_certificates import group_of, identities_of, impostor, loaded
from tpserve.collectives import rendezvous
from tpserve.collectives.rendezvous import Rendezvous, listen
from tpserve.coordinator.group_authority import GroupAuthority
from tpserve.proto.rank import COORDINATOR_TLS_NAME, rank_tls_name

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


def test_others_than_the_first_ranks_may_meet_at_the_door_of_another() -> None:
    ranks, door = (5, 6, 2), listen(HOST)

    def run(rank: int) -> list[bytes]:
        own = door if rank == 5 else None
        with Rendezvous(rank, 3, address_of(door), "secret", timeout_s=10.0, door=own, ranks=ranks) as place:
            return place.exchange(str(rank).encode())

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, ranks)) == [[b"5", b"6", b"2"]] * 3


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
        other = pool.submit(Rendezvous, 1, 4, address_of(door), "secret", timeout_s=2)
        with pytest.raises(TimeoutError, match=r"rank 0 waited 2 s for rank 2, 3 to come"):
            Rendezvous(0, 4, address_of(door), "secret", timeout_s=2, door=door)
        other.result().close()


def test_a_rank_that_is_late_in_an_exchange_is_named() -> None:
    told = threading.Event()

    def work(place: Rendezvous, rank: int) -> object:
        if rank == 1:
            told.wait(20)
            return None
        with pytest.raises(TimeoutError, match=r"rank 0 waited 0\.4 s for rank 1 to exchange"):
            place.exchange(b"")
        told.set()
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


def turned_away(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = caplog.records
    return record.getMessage()


def test_within_tls_ranks_meet_and_bring_the_same() -> None:
    door, tls = listen(HOST), group_of(4)

    def run(rank: int) -> list[bytes]:
        with Rendezvous(
            rank, 4, address_of(door), "secret", timeout_s=10, door=door if rank == 0 else None, tls=tls[rank]
        ) as place:
            place.exchange(b"")
            return place.exchange(bytes([rank]) * 100_000)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))) == [[bytes([rank]) * 100_000 for rank in range(4)]] * 4


def test_who_speaks_no_tls_is_turned_away_and_told_of(caplog: pytest.LogCaptureFixture) -> None:
    door, (tls, _) = listen(HOST), group_of(2)
    with ThreadPoolExecutor(2) as pool:
        with socket.create_connection(door.getsockname()) as stranger:  # the first that is met
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            plain = pool.submit(Rendezvous, 1, 2, address_of(door), "secret", timeout_s=0.5)  # waits for a first word
            with pytest.raises(TimeoutError, match="for rank 1 to come"):
                Rendezvous(0, 2, address_of(door), "secret", timeout_s=1.0, door=door, tls=tls)
        with pytest.raises(TimeoutError, match="to answer"):
            plain.result()
    assert (
        "the door of rank 0 has turned away who came from 127.0.0.1: it speaks no TLS, and this door takes nothing else"
        in [record.getMessage() for record in caplog.records]
    )


def test_a_rank_that_comes_with_tls_to_a_plain_door_says_so() -> None:
    door, (_, tls) = listen(HOST), group_of(2)
    with ThreadPoolExecutor(1) as pool:
        comes = pool.submit(Rendezvous, 1, 2, address_of(door), "secret", timeout_s=1.0, tls=tls)
        with pytest.raises(TimeoutError, match="for rank 1 to come"):
            Rendezvous(0, 2, address_of(door), "secret", timeout_s=0.5, door=door)
        with pytest.raises(TimeoutError, match=r"for rank 0 at 127\.0\.0\.1:[0-9]+ to answer"):
            comes.result()


def test_without_a_certificate_nobody_comes_in(caplog: pytest.LogCaptureFixture) -> None:
    door, (tls, other) = listen(HOST), group_of(2)
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
    with ThreadPoolExecutor(1) as pool:
        rank_0 = pool.submit(Rendezvous, 0, 2, address_of(door), "secret", timeout_s=10.0, door=door, tls=tls)
        with socket.create_connection(door.getsockname()) as raw, bare.wrap_socket(raw) as stranger:
            stranger.settimeout(5)
            with pytest.raises(ssl.SSLError, match="certificate required"):
                stranger.recv(1)
        # The door is still open for who belongs there.
        Rendezvous(1, 2, address_of(door), "secret", timeout_s=5.0, tls=other).close()
        rank_0.result(5).close()
    assert turned_away(caplog).endswith("from 127.0.0.1: it shows no certificate")


WRONG = {
    "another authority's": "its certificate is not of this group",
    "another rank's": "it says that it is rank 1, its certificate is rank-2.tpserve's",
    "the coordinator's": "it says that it is rank 1, its certificate is coordinator.tpserve's",
    "the right one, without the secret": "it does not know the group's secret",
}
"""Certificates that are shown, and what is said of each."""


def come_with(who: str) -> None:
    authority = GroupAuthority()
    own, right, another = (authority.issue(rank_tls_name(rank)) for rank in range(3))
    shown = {
        "another authority's": impostor(own, rank_tls_name(1)),
        "another rank's": another,
        "the coordinator's": authority.issue(COORDINATOR_TLS_NAME),
        "the right one, without the secret": right,
    }[who]
    secret = "guess" if "without" in who else "secret"
    door = listen(HOST)
    with ThreadPoolExecutor(2, who) as pool:
        rank_0 = pool.submit(Rendezvous, 0, 2, address_of(door), "secret", timeout_s=2.0, door=door, tls=loaded(own))
        stranger = pool.submit(Rendezvous, 1, 2, address_of(door), secret, timeout_s=2.0, tls=loaded(shown))
        with pytest.raises(TimeoutError, match="for rank 1 to come"):
            rank_0.result()
        with pytest.raises((ConnectionError, TimeoutError, ssl.SSLError)):
            with stranger.result() as place:  # in TLS 1.3 who comes hears of a refusal when it reads
                place.exchange(b"")


def test_the_wrong_certificate_or_secret_lets_nobody_in(caplog: pytest.LogCaptureFixture) -> None:
    """All at once, each at a door of its own: most of the time is spent waiting for a rank that may not come."""
    with ThreadPoolExecutor(len(WRONG)) as pool:
        list(pool.map(come_with, WRONG))
    for who, why in WRONG.items():
        first = next(record for record in caplog.records if (record.threadName or "").startswith(who))
        assert why in first.getMessage()


def test_a_door_of_another_group_is_not_believed() -> None:
    """Who listens at a rank's address and is not that rank is told nothing, not even a proof of the secret."""
    door, (other, _), (_, tls) = listen(HOST), group_of(2), group_of(2)
    with ThreadPoolExecutor(1) as pool:
        listens = pool.submit(Rendezvous, 0, 2, address_of(door), "secret", timeout_s=1.0, door=door, tls=other)
        with pytest.raises(TimeoutError, match=r"to answer \(its certificate is not of this group"):
            Rendezvous(1, 2, address_of(door), "secret", timeout_s=0.5, tls=tls)
        with pytest.raises(TimeoutError):
            listens.result()


def test_keys_that_do_not_fit_are_refused() -> None:
    first, second = identities_of(2)
    with pytest.raises(ssl.SSLError, match="mismatch"):
        loaded(replace(first, key=second.key))
