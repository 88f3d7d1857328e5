"""A TP group of simulated workers behind real gRPC doors, and the engine that runs them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio

from builders import make_config
from simulated_worker import SimulatedWorker
from tpserve.coordinator.active_requests import OutputEvent
from tpserve.coordinator.cluster import Cluster, ClusterConfig
from tpserve.coordinator.engine import Engine, EngineConfig, EngineStatus
from tpserve.coordinator.metrics import Metrics
from tpserve.coordinator.scheduler import Scheduler
from tpserve.coordinator.tracing import Tracing
from tpserve.proto.messages import CollectiveUse, SamplingParams, StepPlan
from tpserve.proto.pb import worker_pb2, worker_pb2_grpc
from tpserve.proto.rank import LET_IN, RankAddress, RankConfig, SizeTime

STEP_US = 2000
BUCKET_TOKENS = 16
LATE_RANK = 1
"""Comes last into collectives, so the others spend more time there."""
COLLECTIVE_US = {LATE_RANK: 100}
OTHER_COLLECTIVE_US = 900
COLLECTIVE_BYTES = 4096

PROMPT = (1, 2, 3)
NUM_TOKENS = 6
NUM_CHOICES = 2


class SimulatedRank(worker_pb2_grpc.WorkerServicer):
    """Executes plans by the letter, and says that each took STEP_US."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._worker = SimulatedWorker(make_config(), next_step=1)

    async def Execute(
        self, request_iterator: AsyncIterator[worker_pb2.StepPlan], context: Any
    ) -> AsyncIterator[worker_pb2.StepResults]:
        await context.send_initial_metadata(((LET_IN, str(self._rank)),))
        async for pb in request_iterator:
            plan = StepPlan.from_pb(pb)
            started_us = time.time_ns() // 1000
            result = self._worker.execute(plan)
            decoding = set(result.slots) - {chunk.slot for chunk in plan.chunks}
            num_tokens = sum(len(chunk.token_ids) for chunk in plan.chunks) + len(decoding)
            busy_us = COLLECTIVE_US.get(self._rank, OTHER_COLLECTIVE_US)
            await asyncio.sleep(STEP_US / 1e6)
            tokens: dict[str, Any] = {} if self._rank == 0 else {"slots": (), "token_ids": (), "logprobs": {}}
            result = replace(
                result,
                rank=self._rank,
                step_us=STEP_US,
                collective_us=busy_us,
                collectives=(CollectiveUse("all_reduce", 4, COLLECTIVE_BYTES, busy_us),),
                started_us=started_us,
                num_tokens=num_tokens,
                bucket_tokens=BUCKET_TOKENS,
                bucket_rows=BUCKET_TOKENS,
                **tokens,
            )
            yield worker_pb2.StepResults(results=[result.to_pb()])


class SimulatedCluster(Cluster):
    """Finds its ranks running."""

    size_times: tuple[SizeTime, ...] = ()
    """What each of them says of its steps."""

    def __init__(self, ports: Sequence[int]) -> None:
        rank = RankConfig(0, len(ports), Path(), Path(), "dummy", 8, 4, 1, "", 1.0)
        super().__init__(ClusterConfig(rank, 60.0))
        self._ports = ports

    async def start_ranks(self) -> Sequence[RankAddress]:
        return [
            RankAddress(rank, "127.0.0.1", port, 0, "elsewhere", size_times=self.size_times)
            for rank, port in enumerate(self._ports)
        ]


@contextlib.asynccontextmanager
async def running_engine(num_ranks: int, metrics: Metrics, tracing: Tracing | None = None) -> AsyncIterator[Engine]:
    """Run an engine over simulated ranks until it is ready, and end it."""
    servers, ports = [], []
    for rank in range(num_ranks):
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        worker_pb2_grpc.add_WorkerServicer_to_server(SimulatedRank(rank), server)  # type: ignore[no-untyped-call]
        ports.append(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        servers.append(server)
    engine = Engine(EngineConfig(), Scheduler(make_config()), SimulatedCluster(ports), metrics, tracing)
    ready = asyncio.Event()
    engine.watch_status(lambda: ready.set() if engine.status[0] is EngineStatus.READY else None)
    serving = asyncio.create_task(engine.run())
    try:
        await asyncio.wait_for(ready.wait(), 10)
        yield engine
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await asyncio.gather(*(server.stop(None) for server in servers))


async def generate(engine: Engine, traceparent: str = "") -> None:
    """Run one request of two choices to its end."""
    done = asyncio.Event()
    num_ended = 0

    def sink(outputs: Sequence[OutputEvent]) -> None:
        nonlocal num_ended
        num_ended += sum(output.event.finish is not None for output in outputs)
        if num_ended == NUM_CHOICES:
            done.set()

    arguments = (PROMPT, NUM_CHOICES, SamplingParams(), NUM_TOKENS, frozenset[int]())
    engine.submit(1, sink, *arguments, name="cmpl-1", traceparent=traceparent)
    await asyncio.wait_for(done.wait(), 20)
