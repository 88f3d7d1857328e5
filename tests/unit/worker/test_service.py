"""A rank's door: plans are taken of the coordinator that knows the token, and its leaving is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from tpserve.coordinator.client import WorkerGroup
from tpserve.coordinator.errors import RankLost
from tpserve.proto.messages import StepPlan, StepResult
from tpserve.worker.service import DoneStep, serve


class Idle:
    """Does nothing at once."""

    def submit(self, plan: StepPlan) -> DoneStep:
        return DoneStep(StepResult(plan.step_id, 0))


@contextmanager
def door(token: str | None) -> Iterator[tuple[str, threading.Event]]:
    """Open a rank's door; give its address, and what is set when a stream has ended."""
    ended = threading.Event()
    server, port = serve(Idle(), 0, "127.0.0.1", token, ended.set)
    try:
        yield f"127.0.0.1:{port}", ended
    finally:
        server.stop(None).wait(5)


@pytest.mark.parametrize("token", [None, "secret"])
async def test_the_coordinator_is_let_in(token: str | None) -> None:
    with door(token) as (address, ended):
        group = WorkerGroup([address], 5.0, on_lost=lambda: None, token=token)
        await group.send(StepPlan(1))
        assert (await group.next_result()).step_id == 1
        assert not ended.is_set()
        await group.close()
        assert ended.wait(5), "that the coordinator has left"


@pytest.mark.parametrize("shown", [None, "guess", ""])
async def test_others_are_not(shown: str | None) -> None:
    with door("secret") as (address, ended):
        with grpc.insecure_channel(address) as channel:
            metadata = () if shown is None else (("authorization", f"Bearer {shown}"),)
            untyped: Any = channel  # its stubs want serialisers
            with pytest.raises(grpc.RpcError) as raised:
                list(untyped.stream_stream("/tpserve.Worker/Execute")(iter([]), metadata=metadata, timeout=5))
            assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert not ended.is_set(), "a stranger ended the rank"
        group = WorkerGroup([address], 5.0, on_lost=lambda: None, token="secret")
        await group.send(StepPlan(1))
        assert (await group.next_result()).step_id == 1
        await group.close()


async def test_a_group_whose_token_is_wrong_is_lost_with_the_reason() -> None:
    with door("secret") as (address, _):
        group = WorkerGroup([address], 5.0, on_lost=lambda: None, token="other", nodes=["host-b"])
        await group.send(StepPlan(1))
        with pytest.raises(RankLost, match=r"^rank 0 on host-b: .*takes plans of its own coordinator alone"):
            await group.next_result()
        await group.close()
