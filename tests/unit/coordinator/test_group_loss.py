"""A rank that is lost is named, and nobody waits for its group longer than promised. Ranks are gRPC servers here."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from builders import make_config
from tpserve.coordinator.active_requests import OutputEvent
from tpserve.coordinator.client import WorkerGroup
from tpserve.coordinator.cluster import Cluster, ClusterConfig
from tpserve.coordinator.engine import Engine, EngineConfig, EngineStatus, Unavailable
from tpserve.coordinator.errors import ClusterError, RankLost
from tpserve.coordinator.metrics import Metrics
from tpserve.coordinator.scheduler import Scheduler
from tpserve.proto.messages import FinishReason, SamplingParams, StepPlan, StepResult
from tpserve.proto.pb import worker_pb2, worker_pb2_grpc
from tpserve.proto.rank import LET_IN, RankAddress, RankConfig

NAMES = ("0", "1", "draft 0")
BUSY = "with another coordinator"
TIMED_OUT = "TimeoutError: rank waited 4 s in all_reduce, call 7"


class FakeRank(worker_pb2_grpc.WorkerServicer):
    """Answers each plan with the same error, or with nothing; one whose error is `BUSY` takes no stream either."""

    def __init__(self, error: str | None) -> None:
        self._error = error

    async def Execute(
        self, request_iterator: AsyncIterator[worker_pb2.StepPlan], context: Any
    ) -> AsyncIterator[worker_pb2.StepResults]:
        if self._error == BUSY:
            await asyncio.sleep(60)
        await context.send_initial_metadata(((LET_IN, "0"),))
        async for plan in request_iterator:
            if self._error is not None:
                yield worker_pb2.StepResults(results=[StepResult(plan.step_id, 0, error=self._error).to_pb()])


@contextlib.asynccontextmanager
async def ranks(*errors: str | None) -> AsyncIterator[list[str]]:
    """Run a rank for each error; give their addresses."""
    servers, addresses = [], []
    for error in errors:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        worker_pb2_grpc.add_WorkerServicer_to_server(FakeRank(error), server)  # type: ignore[no-untyped-call]
        addresses.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        await server.start()
        servers.append(server)
    try:
        yield addresses
    finally:
        await asyncio.gather(*(server.stop(None) for server in servers))


CLOSED = "ConnectionError: rank 0 in step 1: rank draft 0 has closed its connection or died"


@pytest.mark.parametrize(
    ("errors", "lost"),
    [
        ((TIMED_OUT, None, TIMED_OUT), 1),  # who is waited for says nothing
        ((CLOSED, CLOSED, None), 2),
        ((None, TIMED_OUT, None), 0),  # the model's other rank, though the draft waits as well
        ((TIMED_OUT, TIMED_OUT, None), 2),
        ((None, "ValueError: slot 3", None), 1),
    ],
)
async def test_the_rank_at_fault_is_named(errors: tuple[str | None, ...], lost: int) -> None:
    async with ranks(*errors) as addresses:
        group = WorkerGroup(addresses, 60.0, on_lost=lambda: None, names=NAMES, num_draft_ranks=1)
        try:
            await group.send(StepPlan(1))
            with pytest.raises(RankLost) as raised:
                await asyncio.wait_for(group.next_result(), 10)
        finally:
            await group.close()
    assert raised.value.rank == lost
    assert str(raised.value).startswith(f"rank {NAMES[lost]}: ")
    assert next(filter(None, errors)) in str(raised.value)


@pytest.mark.parametrize(
    ("errors", "lost"),
    [((None, TIMED_OUT, None), "draft 1"), ((TIMED_OUT, None, None), "draft 0"), ((None, TIMED_OUT, TIMED_OUT), "0")],
)
async def test_a_draft_that_waits_waits_for_its_own(errors: tuple[str | None, ...], lost: str) -> None:
    """And not for the model, which waits for it and gives up later."""
    async with ranks(*errors) as addresses:
        names = ("0", "draft 0", "draft 1")
        group = WorkerGroup(addresses, 60.0, on_lost=lambda: None, names=names, num_draft_ranks=2)
        try:
            await group.send(StepPlan(1))
            with pytest.raises(RankLost) as raised:
                await asyncio.wait_for(group.next_result(), 10)
        finally:
            await group.close()
    assert raised.value.name == lost


async def test_a_rank_that_takes_no_stream_is_named_at_the_deadline() -> None:
    async with ranks(None, BUSY) as addresses:
        group = WorkerGroup(addresses, 1.0, on_lost=lambda: None)
        try:
            await asyncio.wait_for(group.send(StepPlan(1)), 10)
            with pytest.raises(RankLost, match=r"^rank 1: missed the 1 s deadline \(--step-timeout\) of step 1"):
                await asyncio.wait_for(group.next_result(), 10)
        finally:
            await group.close()


async def test_a_stall_is_told_when_it_begins() -> None:
    """Long before the deadline of the step, and with what each rank has done."""
    stalls: list[float] = []
    told = asyncio.Event()

    def on_stall() -> None:
        stalls.append(group.oldest_step_age_s())
        told.set()

    async with ranks(None, None) as addresses:
        group = WorkerGroup(
            addresses,
            60.0,
            on_lost=lambda: None,
            stall_after_s=0.1,
            on_stall=on_stall,
        )
        try:
            await asyncio.sleep(0.3)
            assert not stalls  # nothing to run is no stall
            await group.send(StepPlan(1))
            group.ranks[0].last_step = 1
            await asyncio.wait_for(told.wait(), 10)
            assert group.least_advanced().rank == 1
        finally:
            await group.close()
    assert len(stalls) == 1
    assert stalls[0] > 0.1


class FailingCluster(Cluster):
    """Starts one group; rebuilds fail once and then do not come to an end."""

    def __init__(self, addresses: Sequence[str]) -> None:
        rank = RankConfig(0, len(addresses), Path(), Path(), "dummy", 8, 4, 1, "", 1.0)
        super().__init__(ClusterConfig(rank, 60.0))
        self._addresses = addresses
        self.num_starts = 0
        self.last_began = asyncio.Event()

    async def start_ranks(self) -> Sequence[RankAddress]:
        self.num_starts += 1
        if self.num_starts == 2:
            raise ClusterError("no room")
        if self.num_starts > 2:
            self.last_began.set()
            await asyncio.Event().wait()
        return [
            RankAddress(rank, "127.0.0.1", int(address.rpartition(":")[2]), 0, "elsewhere")
            for rank, address in enumerate(self._addresses)
        ]


async def test_nobody_waits_longer_than_promised() -> None:
    received: asyncio.Queue[Sequence[OutputEvent]] = asyncio.Queue()
    async with ranks("ValueError: broken") as addresses:
        cluster = FailingCluster(addresses)
        engine = Engine(EngineConfig(replay_timeout_s=0.05), Scheduler(make_config()), cluster, Metrics("m"))
        arguments: Any = ((1, 2, 3), 1, SamplingParams(), 4, frozenset())
        engine.submit(7, received.put_nowait, *arguments)
        serving = asyncio.create_task(engine.run())
        try:
            (output,) = await asyncio.wait_for(received.get(), 10)
            assert (output.client_id, output.event.finish) == (7, FinishReason.FAILED)
            assert "lost rank 0: failed in step 1: ValueError: broken" in output.detail
            await asyncio.wait_for(cluster.last_began.wait(), 10)
            with pytest.raises(Unavailable, match="rebuilding"):
                engine.submit(8, received.put_nowait, *arguments)
            assert engine.scheduler_stats().num_waiting == 0
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)


class RestartingCluster(FailingCluster):
    """Every rebuild comes to an end, after so long."""

    def __init__(self, addresses: Sequence[str], rebuild_s: float) -> None:
        super().__init__(addresses)
        self._rebuild_s = rebuild_s

    async def start_ranks(self) -> Sequence[RankAddress]:
        await asyncio.sleep(self._rebuild_s)
        self.num_starts = 0
        return await super().start_ranks()


@pytest.mark.parametrize(
    ("rebuild_s", "replay_timeout_s", "why"),
    [
        (0.2, 0.5, "no step has ended within 0.5 s of the first loss"),
        (0.0, 45.0, "the request was on the last 5 groups that were lost and got nowhere"),
    ],
)
async def test_nobody_waits_for_groups_that_end_no_step(rebuild_s: float, replay_timeout_s: float, why: str) -> None:
    """A step that kills each new group, or misses its deadline in each: the requests end, and the engine lives on."""
    received: asyncio.Queue[Sequence[OutputEvent]] = asyncio.Queue()
    async with ranks("ValueError: broken") as addresses:
        metrics = Metrics("m")
        engine = Engine(
            EngineConfig(replay_timeout_s=replay_timeout_s),
            Scheduler(make_config()),
            RestartingCluster(addresses, rebuild_s),
            metrics,
        )
        ready = asyncio.Event()
        engine.watch_status(lambda: ready.set() if engine.status[0] is EngineStatus.READY else ready.clear())
        arguments: Any = ((1, 2, 3), 1, SamplingParams(), 4, frozenset())
        serving = asyncio.create_task(engine.run())
        try:
            for client_id in (7, 8):
                await asyncio.wait_for(ready.wait(), 10)
                engine.submit(client_id, received.put_nowait, *arguments)
                (output,) = await asyncio.wait_for(received.get(), 10)
                assert (output.client_id, output.event.finish) == (client_id, FinishReason.FAILED)
                assert re.match(r"lost rank 0: failed in step \d+: ValueError: broken; ", output.detail)
                assert output.detail.endswith(f"; {why}")
                assert engine.scheduler_stats().num_waiting == 0
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
