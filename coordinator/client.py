"""The wire to the ranks of one TP group: one gRPC stream each, every plan to all, with a deadline on each step."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from tpserve.coordinator.errors import RankLost
from tpserve.proto.messages import StepPlan, StepResult
from tpserve.proto.pb import worker_pb2
from tpserve.proto.rank import LET_IN, TlsIdentity, rank_tls_name

logger = logging.getLogger(__name__)

_METHOD = "/tpserve.Worker/Execute"
_ALL_REPORT_WITHIN_S = 0.25
"""Ranks that wait in the same collective give up at nearly the same time, and a process that ends ends its stream."""
_WITNESSES = ("TimeoutError", "ConnectionError")
"""Errors of a rank that waited for another."""
_OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    # A lost rank must show at once, not after a name is resolved again.
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]


@dataclass(slots=True)
class RankState:
    """What is known of one rank."""

    rank: int
    last_step: int = 0
    """Latest step that it has finished."""
    node: str = ""
    """Where it is, if that is another node than the coordinator's."""
    name: str = ""
    """What it is called in messages and metrics."""


class WorkerGroup:
    """Sends plans to all ranks and gives back rank 0's results, in order.

    A rank whose stream ends, that reports an error, or that is later than `step_timeout_s` ends the group:
    `next_result` raises `RankLost` naming it.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        step_timeout_s: float,
        on_lost: Callable[[], None],
        on_result: Callable[[StepResult], None] = lambda _: None,
        *,
        stall_after_s: float = 5.0,
        on_stall: Callable[[], None] = lambda: None,
        token: str | None = None,
        tls: TlsIdentity | None = None,
        nodes: Sequence[str] = (),
        names: Sequence[str] = (),
        num_draft_ranks: int = 0,
    ) -> None:
        """Open the streams.

        Parameters
        ----------
        addresses
            `host:port` by rank.
        on_lost
            Called once when a rank is lost.
        on_result
            Called with every rank's result of every step, rank 0's included; the others' come a little later.
        stall_after_s
            Age at which a step without a result is a stall.
        on_stall
            Called when a stall begins, and again when it ends with a result.
        token
            Shown to every rank.
        tls
            By which the ranks know this process, and it them; None: plain connections.
        nodes
            By rank: where it is, empty on the coordinator's own node.
        names
            By rank: what it is called; empty: by its number.
        num_draft_ranks
            Of the ranks the last ones, which are a draft's own.
        """
        self._lost: RankLost | None = None
        self._on_lost = on_lost
        self._on_result = on_result
        self.ranks = [
            RankState(rank, node=nodes[rank] if nodes else "", name=names[rank] if names else str(rank))
            for rank in range(len(addresses))
        ]
        self._num_model_ranks = len(addresses) - num_draft_ranks
        self._step_timeout_s = step_timeout_s
        self._stall_after_s = stall_after_s
        self._on_stall = on_stall
        self._sent_at: dict[int, float] = {}
        self._results: asyncio.Queue[StepResult | RankLost] = asyncio.Queue()
        self._channels = [_open_channel(address, rank, tls) for rank, address in enumerate(addresses)]
        # Plans are serialised once and sent as bytes to every rank.
        self._calls: list[Any] = [_open_stream(channel, token) for channel in self._channels]
        self._let_in = [False] * len(addresses)
        self._readers = [asyncio.create_task(self._read(rank)) for rank in range(len(addresses))]
        self._watchdog = asyncio.create_task(self._watch())
        self._gave_up: dict[int, str] = {}
        """Ranks whose wait in a collective timed out, with what they said."""
        self._blame: asyncio.TimerHandle | None = None

    async def send(self, plan: StepPlan) -> None:
        """Send a plan to every rank."""
        data = plan.to_pb().SerializeToString()
        self._sent_at[plan.step_id] = time.monotonic()
        for rank in range(len(self._calls)):
            if not self._let_in[rank] and not await self._wait_to_be_let_in(rank):
                return
        if len(self._calls) == 1:  # a task of its own would cost more than it saves
            await _write(self._calls[0], data)
            return
        # All at once: one behind the other, each rank waited for the writes to those before it, some 60 us each.
        await asyncio.gather(*(_write(call, data) for call in self._calls))

    async def _wait_to_be_let_in(self, rank: int) -> bool:
        """Wait for a rank's first word; False: it refuses the stream or is late, which the group's tasks tell.

        A write to a rank that refuses would put "Internal error from Core" in the place of its reason
        (grpc/grpc#36066).
        """
        try:
            async with asyncio.timeout(self._step_timeout_s):
                self._let_in[rank] = LET_IN in await self._calls[rank].initial_metadata()
        except TimeoutError:
            logger.warning("rank %s has not let the coordinator in", self.ranks[rank].name)
        return self._let_in[rank]

    async def next_result(self) -> StepResult:
        """Wait for rank 0's next result.

        Raises
        ------
        RankLost
            If the group has lost a rank.
        """
        result = await self._results.get()
        if isinstance(result, RankLost):
            raise result
        return result

    async def result_within(self, within_s: float) -> StepResult | None:
        """Wait as `next_result`, but for no longer than that; None if nothing has come."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                return await self.next_result()
        return None

    def raise_if_lost(self) -> None:
        """Raise the RankLost that the group suffered, if it did."""
        if self._lost is not None:
            raise self._lost

    def oldest_step_age_s(self) -> float:
        """Return for how long the oldest step without a result has waited; 0 if there is none."""
        return time.monotonic() - min(self._sent_at.values()) if self._sent_at else 0.0

    def least_advanced(self) -> RankState:
        """Return the rank that is the suspect while a step is late: in a collective the others wait for it.

        If all stand at the same step, rank 0 stands for the group, or the first that has not let the coordinator in.
        """
        return min(self.ranks, key=lambda state: (self._let_in[state.rank], state.last_step))

    async def close(self) -> None:
        """End the streams."""
        if self._blame is not None:
            self._blame.cancel()
        for task in (self._watchdog, *self._readers):
            task.cancel()
        for call in self._calls:
            call.cancel()
        await asyncio.gather(self._watchdog, *self._readers, return_exceptions=True)
        await asyncio.gather(*(channel.close(None) for channel in self._channels), return_exceptions=True)

    def _lose(self, lost: RankLost) -> None:
        """Remember the first loss; those that follow from it (others waiting in a collective) say less."""
        if self._lost is None:
            self._lost = lost
            self._results.put_nowait(lost)
            self._on_lost()

    def _loss(self, rank: int, cause: str) -> RankLost:
        return RankLost(rank, cause, self.ranks[rank].node, self.ranks[rank].name)

    async def _read(self, rank: int) -> None:
        call, state = self._calls[rank], self.ranks[rank]
        lost: RankLost
        try:
            while True:
                data = await call.read()
                if not isinstance(data, bytes):  # grpc.aio.EOF
                    lost = self._loss(rank, "ended its stream")
                    break
                for pb in worker_pb2.StepResults.FromString(data).results:
                    result = StepResult.from_pb(pb)
                    if result.error.startswith(_WITNESSES):
                        self._give_up(rank, f"step {result.step_id}: {result.error}")
                        return
                    if result.error:
                        self._lose(self._loss(rank, f"failed in step {result.step_id}: {result.error}"))
                        return
                    state.last_step = result.step_id
                    self._on_result(result)
                    if rank == 0:
                        self._sent_at.pop(result.step_id, None)
                        self._results.put_nowait(result)
        except grpc.aio.AioRpcError as error:
            lost = self._loss(rank, f"connection lost: {error.code().name} {error.details()}")
        self._lose(lost)

    def _give_up(self, rank: int, words: str) -> None:
        """Note that a rank waited in vain. Not it is lost, but the one waited for, which says nothing or ends."""
        self._gave_up[rank] = words
        if self._blame is None:
            self._blame = asyncio.get_running_loop().call_later(_ALL_REPORT_WITHIN_S, self._lose_silent)

    def _lose_silent(self) -> None:
        witness, words = next(iter(self._gave_up.items()))
        silent = [state.rank for state in self.ranks if state.rank not in self._gave_up]
        if max(self._gave_up) >= self._num_model_ranks:
            # A draft's ranks wait so long for each other alone; the model's wait for them, and may not have given up.
            silent.sort(key=lambda rank: rank < self._num_model_ranks)
        self._lose(
            self._loss(
                silent[0] if silent else witness,
                f"waited for in vain; rank {self.ranks[witness].name} says of {words}",
            )
        )

    async def _watch(self) -> None:
        """Tell of stalls, and name the late rank when a step has missed its deadline."""
        stalled = False
        while True:
            await asyncio.sleep(min(self._stall_after_s / 4, self._step_timeout_s / 8))
            age_s = self.oldest_step_age_s()
            if age_s > self._step_timeout_s:
                cause = f"missed the {self._step_timeout_s:g} s deadline (--step-timeout) of step {min(self._sent_at)}"
                self._lose(self._loss(self.least_advanced().rank, cause))
                return
            if stalled is not (age_s > self._stall_after_s):
                stalled = not stalled
                self._on_stall()


def _open_channel(address: str, rank: int, tls: TlsIdentity | None) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(address, options=_OPTIONS)
    credentials = grpc.ssl_channel_credentials(tls.authority, tls.key, tls.certificate)
    # Ranks are known by their number, wherever they are.
    options = [*_OPTIONS, ("grpc.ssl_target_name_override", rank_tls_name(rank))]
    return grpc.aio.secure_channel(address, credentials, options=options)


async def _write(call: Any, data: bytes) -> None:
    # If the stream has ended, its reader says why.
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await call.write(data)


def _open_stream(channel: grpc.aio.Channel, token: str | None) -> Any:
    # Without serialisers gRPC carries bytes as they are; its stubs do not know that, nor the reading and writing calls.
    untyped: Any = channel
    return untyped.stream_stream(_METHOD)(metadata=() if token is None else (("authorization", f"Bearer {token}"),))
