"""`tpserve serve --replicas 2`: a replica is killed, all are replaced, and no client can tell by its text."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from kill_load import Answer, ComparedLoad, mixed_requests, stream
from patience import Patience
from server import Server, processes_of

ADMIN = "admin-secret"
BACK_WITHIN_S = 60.0
FLAGS = ("--replicas", "2", "--max-num-seqs", "8", "--admin-token", ADMIN, "--drain-timeout", "0.5")
"""The drain is shorter than most streams: those go on elsewhere."""


@pytest.fixture(scope="module")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.running(demo_model, *FLAGS, folder=tmp_path_factory.mktemp("replicas")) as running:
        yield running


def replica_processes(server: Server, number: int) -> list[psutil.Process]:
    """Return a replica's own process and what it has started; its ranks are Ray's."""
    (own,) = (
        process
        for process in processes_of(server.mark)
        if f"{number}/2" in process.cmdline() and "tpserve.cli" in process.cmdline()
    )
    return [own, *own.children(recursive=True)]


async def ready(server: Server, *, or_stalled: bool = False) -> list[bool]:
    """Tell which replicas take requests, or would if this machine let their steps end in time."""
    async with httpx.AsyncClient(base_url=server.url, timeout=10) as http:
        replicas = (await http.get("/health")).json()["replicas"]
    return [
        each["ready"] or (or_stalled and each["detail"].startswith(("stalled", "unresponsive"))) for each in replicas
    ]


def num_generated(http: httpx.Client, number: int) -> float:
    """Return how many tokens a replica has given so far."""
    lines = http.get("/metrics").text.splitlines()
    tokens = [line for line in lines if line.startswith("tpserve_generation_tokens_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in tokens if f'replica="{number}"' in line)


def kill_in_mid_stream(server: Server, least_streams: int) -> None:
    """Kill all processes of the replica with the most streams, once it has so many and they are under way.

    By what the server says: where cores are busy, it may have ended a stream of which a client has read little. And in
    a thread of its own, so that it does not wait for that client.
    """
    processes = [replica_processes(server, number) for number in (0, 1)]
    patience = Patience(60)
    with httpx.Client(base_url=server.url, timeout=10) as http:
        before = [num_generated(http, number) for number in (0, 1)]
        while True:
            streams = [each["in_flight"] for each in http.get("/health").json()["replicas"]]
            number = streams.index(max(streams))
            if streams[number] >= least_streams:
                if num_generated(http, number) - before[number] >= 20 * streams[number]:
                    break  # those that wait for their grammars have begun by then
            assert not patience.is_over(), server.report(f"no replica has had so many streams: {streams}")
    for process in processes[number]:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


async def until_ready(server: Server) -> None:
    patience = Patience(BACK_WITHIN_S)
    while not all(await ready(server)):
        assert not patience.is_over(), server.report("not all replicas are back")
        await asyncio.sleep(0.1)


def moved(server: Server) -> float:
    return server.metrics()["tpserve_router_moves_total{outcome=moved}"]


@asynccontextmanager
async def never_fewer_than(server: Server, num: int) -> AsyncIterator[None]:
    """Ask for health all the time."""
    seen: list[int] = []

    async def watch() -> None:
        while True:
            seen.append(sum(await ready(server, or_stalled=True)))
            await asyncio.sleep(0.1)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    assert min(seen) == num, seen


async def test_streams_of_a_killed_replica_go_on_at_the_other(server: Server) -> None:
    """kill -9 of all its processes in mid-stream: greedy, sampled, constrained, forked, with log-probabilities."""
    requests = mixed_requests(max_tokens=120)
    expected = [Answer() for _ in requests]
    answers = [Answer() for _ in requests]
    async with server.async_client() as client:
        await asyncio.gather(*map(stream, [client] * len(requests), requests, expected))
        assert all(answer.error is None and answer.finishes for answer in expected), expected
        await until_ready(server)  # where cores are busy one may be stalled, and gets nothing
        kill = asyncio.to_thread(kill_in_mid_stream, server, least_streams=3)
        await asyncio.gather(kill, *map(stream, [client] * len(requests), requests, answers))
    for request, answer, undisturbed in zip(requests, answers, expected, strict=True):
        assert answer.error is None, (request["messages"], answer.error)
        assert answer.what == undisturbed.what, request["messages"]
    assert await asyncio.to_thread(moved, server) >= 2
    await until_ready(server)


async def test_a_rolling_replacement_fails_no_request(server: Server) -> None:
    """Eight clients stream all the while; `benchmarks/rolling.py` is the same with 64."""
    await until_ready(server)
    before = {process.pid for number in (0, 1) for process in replica_processes(server, number)}

    async def replace_all() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=10) as http:
            assert (await http.post("/admin/rolling-restart")).status_code == 401
            begun = await http.post("/admin/rolling-restart", headers={"authorization": f"Bearer {ADMIN}"})
            assert begun.status_code == 202, begun.text
        patience = Patience(2 * BACK_WITHIN_S)
        while "all replicas are replaced" not in await asyncio.to_thread(lambda: server.log):
            assert not patience.is_over(), server.report("the replicas are not replaced")
            await asyncio.sleep(0.2)

    async with server.async_client() as client, never_fewer_than(server, 1):
        load = ComparedLoad(client, mixed_requests(max_tokens=48), seed=1)
        await load.learn()
        moved_before = await asyncio.to_thread(moved, server)
        await load.run_while(replace_all(), num_clients=8)
    assert not load.faults, load.faults
    assert set(load.outcomes) == {"complete"}
    assert load.outcomes["complete"] >= 16
    assert await asyncio.to_thread(moved, server) > moved_before
    after = {process.pid for number in (0, 1) for process in replica_processes(server, number)}
    assert not before & after


def test_one_scrape_tells_of_all(server: Server) -> None:
    text = httpx.get(f"{server.url}/metrics", timeout=10).text
    for replica in "01":
        assert f'tpserve_num_requests_running{{replica="{replica}"' in text
    families = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families))
