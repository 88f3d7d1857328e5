"""The session between a gateway and the engine, on a real scheduler without ranks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

from builders import make_config
from tpserve.coordinator.active_requests import OutputEvent
from tpserve.coordinator.cluster import Cluster, ClusterConfig
from tpserve.coordinator.engine import Engine, EngineConfig
from tpserve.coordinator.metrics import Metrics
from tpserve.coordinator.request import TokenEvent
from tpserve.coordinator.scheduler import Scheduler
from tpserve.coordinator.service import Session
from tpserve.proto.messages import FinishReason
from tpserve.proto.pb import common_pb2, engine_pb2
from tpserve.proto.rank import RankConfig


def make_engine() -> tuple[Engine, Scheduler]:
    rank = RankConfig(0, 1, Path(), Path(), "auto", 8, 4, 1, "", 1.0)
    scheduler = Scheduler(make_config())
    return Engine(EngineConfig(), scheduler, Cluster(ClusterConfig(rank, 1.0)), Metrics("m")), scheduler


def submit(request_id: int, n: int = 1) -> engine_pb2.GatewayMessage:
    return engine_pb2.GatewayMessage(
        submit=engine_pb2.Submit(
            request_id=request_id,
            prompt_token_ids=[1, 2, 3],
            n=n,
            sampling=common_pb2.SamplingParams(top_p=1.0),
            max_tokens=4,
        )
    )


def abort(request_id: int, choice: int | None = None) -> engine_pb2.GatewayMessage:
    return engine_pb2.GatewayMessage(abort=engine_pb2.Abort(request_id=request_id, choice=choice))


async def stream(*messages: engine_pb2.GatewayMessage) -> AsyncIterator[engine_pb2.GatewayMessage]:
    for message in messages:
        yield message


async def test_an_abort_that_crosses_the_end_of_its_choice_leaves_the_others() -> None:
    engine, scheduler = make_engine()
    session = Session(engine)
    await session.read(stream(submit(7, n=2)))
    session.deliver([OutputEvent(7, TokenEvent(1, 0, (5,), finish=FinishReason.LENGTH))])
    await session.read(stream(abort(7, choice=0)))
    session.deliver([OutputEvent(7, TokenEvent(1, 1, (5,)))])
    assert scheduler.has_unfinished
    await session.read(stream(abort(7)))
    assert not scheduler.has_unfinished


async def test_what_a_session_asked_for_ends_with_it() -> None:
    engine, scheduler = make_engine()
    session = Session(engine)
    await session.read(stream(submit(1), submit(2, n=3), abort(9)))
    assert scheduler.num_waiting == 4
    session.close()
    assert not scheduler.has_unfinished


async def test_a_request_that_cannot_run_is_rejected_with_its_code() -> None:
    engine, _ = make_engine()
    session = Session(engine)
    message = submit(3)
    message.submit.max_tokens = 0
    await session.read(stream(message))
    reply = session.outbox.get_nowait()
    assert reply is not None
    assert reply.rejected.code == engine_pb2.Rejected.INVALID
    assert "max_tokens is 0" in reply.rejected.message
