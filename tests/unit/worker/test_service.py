"""A rank's door: plans are taken of the coordinator that knows the token, and its leaving is told.

On a network, the coordinator must have a certificate besides, and so must the rank.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest

from tpserve.coordinator.client import WorkerGroup
from tpserve.coordinator.errors import RankLost
from tpserve.coordinator.group_authority import GroupAuthority
from tpserve.proto.messages import StepPlan, StepResult
from tpserve.proto.pb import worker_pb2
from tpserve.proto.rank import COORDINATOR_TLS_NAME, TlsIdentity, rank_tls_name
from tpserve.worker.service import DoneStep, PlanRunner, serve

DEADLINE_S = 30.0
"""Of any wait; only a hang meets it."""


class Idle:
    """Does nothing at once."""

    def submit(self, plan: StepPlan) -> DoneStep:
        return DoneStep(StepResult(plan.step_id, 0))


class Breaks:
    """Does nothing at once, up to a step in which it fails."""

    def __init__(self, at: int) -> None:
        self._at = at

    def submit(self, plan: StepPlan) -> DoneStep:
        if plan.step_id == self._at:
            raise ValueError("broken")
        return DoneStep(StepResult(plan.step_id, 1, step_us=plan.step_id))


class AllAtOnce:
    """Has done nothing until it has the last plan."""

    def __init__(self, last: int) -> None:
        self._last, self._has_come = last, threading.Event()

    def submit(self, plan: StepPlan) -> Pending:
        if plan.step_id == self._last:
            self._has_come.set()
        return Pending(plan.step_id, self._has_come)


@dataclass(frozen=True, slots=True)
class Pending:
    """A step that is done when something has happened."""

    step_id: int
    event: threading.Event

    def wait(self) -> StepResult:
        assert self.event.wait(DEADLINE_S)
        return StepResult(self.step_id, 1)


@contextmanager
def door(
    token: str | None, tls: TlsIdentity | None = None, runner: PlanRunner | None = None, rank: int = 0
) -> Iterator[tuple[str, threading.Event]]:
    """Open a rank's door; give its address, and what is set when a stream has ended."""
    ended = threading.Event()
    server, port = serve(runner or Idle(), rank, "127.0.0.1", token, ended.set, tls)
    try:
        yield f"127.0.0.1:{port}", ended
    finally:
        server.stop(None).wait(5)


@pytest.mark.parametrize("token", [None, "secret"])
async def test_the_coordinator_is_let_in(token: str | None) -> None:
    with door(token) as (address, ended):
        group = WorkerGroup([address], DEADLINE_S, on_lost=lambda: None, token=token)
        await group.send(StepPlan(1))
        assert (await group.next_result()).step_id == 1
        assert not ended.is_set()
        await group.close()
        assert ended.wait(DEADLINE_S), "that the coordinator has left"


async def read_all(group: WorkerGroup) -> None:
    """Read until the group is lost; between the streams of two ranks there is no order."""
    while True:
        await group.next_result()


async def test_results_of_another_rank_than_the_first_travel_together() -> None:
    """All of them, in order, and with the error that ends them."""
    with door(None) as (first, _), door(None, runner=Breaks(at=300), rank=1) as (second, _):
        seen: list[StepResult] = []
        group = WorkerGroup([first, second], DEADLINE_S, on_lost=lambda: None, on_result=seen.append)
        for step in range(1, 300):
            await group.send(StepPlan(step))
            assert (await group.next_result()).step_id == step
        await group.send(StepPlan(300))
        with pytest.raises(RankLost, match="rank 1: failed in step 300: ValueError: broken"):
            await read_all(group)
        assert [result.step_us for result in seen if result.rank == 1] == list(range(1, 300))
        assert group.ranks[1].last_step == 299
        await group.close()


def test_a_message_holds_what_has_come_meanwhile() -> None:
    with door(None, runner=AllAtOnce(100), rank=1) as (address, _), grpc.insecure_channel(address) as channel:
        untyped: Any = channel
        plans = iter([StepPlan(step).to_pb().SerializeToString() for step in range(1, 101)])
        call = untyped.stream_stream("/tpserve.Worker/Execute")(plans, timeout=DEADLINE_S)
        messages = [worker_pb2.StepResults.FromString(message).results for message in call]
    assert [result.step_id for message in messages for result in message] == list(range(1, 101))
    assert len(messages) < 50


@pytest.mark.parametrize("shown", [None, "guess", ""])
async def test_others_are_not(shown: str | None) -> None:
    with door("secret") as (address, ended):
        with grpc.insecure_channel(address) as channel:
            metadata = () if shown is None else (("authorization", f"Bearer {shown}"),)
            untyped: Any = channel  # its stubs want serialisers
            with pytest.raises(grpc.RpcError) as raised:
                list(untyped.stream_stream("/tpserve.Worker/Execute")(iter([]), metadata=metadata, timeout=DEADLINE_S))
            assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert not ended.is_set(), "a stranger ended the rank"
        group = WorkerGroup([address], DEADLINE_S, on_lost=lambda: None, token="secret")
        await group.send(StepPlan(1))
        assert (await group.next_result()).step_id == 1
        await group.close()


async def test_a_group_whose_token_is_wrong_is_lost_with_the_reason() -> None:
    with door("secret") as (address, _):
        for _attempt in range(50):  # the refusal may come before, during or after a write
            group = WorkerGroup([address], DEADLINE_S, on_lost=lambda: None, token="other", nodes=["host-b"])
            await group.send(StepPlan(1))
            with pytest.raises(RankLost, match=r"^rank 0 on host-b: .*takes plans of its own coordinator alone"):
                await group.next_result()
            await group.close()


@dataclass(frozen=True, slots=True)
class Members:
    """Of one group of two ranks."""

    coordinator: TlsIdentity
    rank_0: TlsIdentity
    rank_1: TlsIdentity

    @classmethod
    def make(cls) -> Members:
        authority = GroupAuthority()
        return cls(*(authority.issue(name) for name in (COORDINATOR_TLS_NAME, rank_tls_name(0), rank_tls_name(1))))


async def lost_because(address: str, token: str, tls: TlsIdentity | None) -> str:
    """Return why a coordinator that comes with these loses the group."""
    group = WorkerGroup([address], DEADLINE_S, on_lost=lambda: None, token=token, tls=tls)
    await group.send(StepPlan(1))
    with pytest.raises(RankLost) as raised:
        await group.next_result()
    await group.close()
    return str(raised.value)


async def test_within_tls_the_coordinator_is_let_in() -> None:
    members = Members.make()
    with door("secret", members.rank_0) as (address, ended):
        group = WorkerGroup([address], DEADLINE_S, on_lost=lambda: None, token="secret", tls=members.coordinator)
        for step in (1, 2):
            await group.send(StepPlan(step))
            assert (await group.next_result()).step_id == step
        await group.close()
        assert ended.wait(DEADLINE_S), "that the coordinator has left"


async def test_within_tls_nobody_else_is() -> None:
    members, strangers = Members.make(), Members.make()
    with door("secret", members.rank_0) as (address, ended):
        assert "UNAVAILABLE" in await lost_because(address, "secret", None), "plain"
        # Of another authority, which trusts this one.
        stranger = replace(strangers.coordinator, authority=members.coordinator.authority)
        assert "UNAVAILABLE" in await lost_because(address, "secret", stranger)
        # It trusts another one than the rank has.
        assert "CERTIFICATE_VERIFY_FAILED" in await lost_because(address, "secret", strangers.coordinator)
        assert "of its coordinator alone, not of rank-1.tpserve" in await lost_because(
            address, "secret", members.rank_1
        )
        assert "takes plans of its own coordinator alone" in await lost_because(address, "guess", members.coordinator)
        assert not ended.is_set(), "a stranger ended the rank"
        credentials = grpc.ssl_channel_credentials(members.coordinator.authority)
        options = [("grpc.ssl_target_name_override", rank_tls_name(0))]
        with grpc.secure_channel(address, credentials, options=options) as channel:
            untyped: Any = channel
            with pytest.raises(grpc.RpcError) as raised:  # without a certificate
                list(untyped.stream_stream("/tpserve.Worker/Execute")(iter([]), timeout=DEADLINE_S))
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    with door("secret", members.rank_1) as (address, _):
        assert "Hostname Verification Check failed" in await lost_because(address, "secret", members.coordinator)
    with door("secret") as (address, _):
        assert "WRONG_VERSION_NUMBER" in await lost_because(address, "secret", members.coordinator), "a plain door"
