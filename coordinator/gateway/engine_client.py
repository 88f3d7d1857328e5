"""The gateway's one session with the coordinator: requests out, token events in, state watched.

Owns the gRPC channel and which request each event belongs to. Knows nothing of text.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence

import grpc
import grpc.aio

from tpserve.coordinator.engine_channel import explain, open_channel
from tpserve.coordinator.engine_door import EngineDoor
from tpserve.coordinator.gateway.engine_types import (
    EngineInfo,
    EngineRequest,
    EngineState,
    EngineStatus,
    Mailbox,
    TokenEvent,
)
from tpserve.coordinator.gateway.errors import ApiError, EngineUnavailable, InvalidRequest, QueueFull
from tpserve.proto.messages import FinishReason, TokenLogprobs
from tpserve.proto.pb import engine_pb2, engine_pb2_grpc

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # The coordinator is a neighbour, never behind a proxy; and a fresh channel shall not inherit an old one's back-off.
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
]


class EngineClient:
    """Keeps one session with the coordinator open for as long as the gateway runs.

    Parameters
    ----------
    address
        `host:port`.
    rpc_timeout_s
        Deadline of unary calls; the coordinator is asked for its state this often.
    session_timeout_s
        Silence after which the session is given up.
    traceparent
        Returns the W3C trace context of the request being submitted; None: requests are not traced.
    door
        How the coordinator is met over a network; None: without TLS.
    """

    def __init__(
        self,
        address: str,
        *,
        rpc_timeout_s: float,
        session_timeout_s: float,
        traceparent: Callable[[], str] | None = None,
        door: EngineDoor | None = None,
    ) -> None:
        self._address = address
        self._door = door
        self._traceparent = traceparent
        self._rpc_timeout_s = rpc_timeout_s
        self._session_timeout_s = session_timeout_s
        self._disconnected = EngineState(EngineStatus.DISCONNECTED, f"no session with the coordinator at {address}")
        self._state = self._disconnected
        self._responsive = True
        self.was_ready = False
        """Whether the engine has ever been ready, as far as this side knows."""
        self._info: EngineInfo | None = None
        self._mailboxes: dict[int, Mailbox] = {}
        self._next_request_id = 1
        self._outbox: asyncio.Queue[engine_pb2.GatewayMessage] | None = None
        self._stub: engine_pb2_grpc.EngineStub | None = None
        self._connected = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def state(self) -> EngineState:
        """What the engine is doing, as far as this side can tell."""
        if self._outbox is not None and not self._responsive:
            return EngineState(
                EngineStatus.UNRESPONSIVE, f"the coordinator has not answered for {self._rpc_timeout_s:g} s or longer"
            )
        return self._state

    @property
    def info(self) -> EngineInfo:
        """Limits of the engine.

        Raises
        ------
        EngineUnavailable
            If no session was ever open.
        """
        if self._info is None:
            raise self._unavailable()
        return self._info

    @property
    def num_live_requests(self) -> int:
        """Engine requests submitted and not yet released."""
        return len(self._mailboxes)

    def start(self) -> None:
        """Begin to connect, in the background."""
        self._task = asyncio.create_task(self._run(), name="engine-session")

    def stop_waiting(self) -> None:
        """End `wait_connected` although there is no session: the gateway is to end."""
        self._connected.set()

    async def wait_connected(self, timeout_s: float) -> None:
        """Wait for a session, or for the time to pass."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._connected.wait()

    async def close(self) -> None:
        """End the session; the coordinator aborts what is left of its requests."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def submit(self, request: EngineRequest, mailbox: Mailbox) -> int:
        """Send a request; the answer and all events go to `mailbox`.

        Returns
        -------
        int
            The request id, to be given to `release` in the end, whatever happens.

        Raises
        ------
        EngineUnavailable
            If there is no session.
        """
        if self._outbox is None:
            raise self._unavailable()
        request_id = self._next_request_id
        self._next_request_id += 1
        self._mailboxes[request_id] = mailbox
        submit = engine_pb2.Submit(
            request_id=request_id,
            prompt_token_ids=request.prompt_token_ids,
            n=request.n,
            sampling=request.sampling.to_pb(),
            max_tokens=request.max_tokens,
            stop_token_ids=request.stop_token_ids,
            name=request.name,
            traceparent="" if self._traceparent is None else self._traceparent(),
            grammar=None if request.grammar is None else request.grammar.to_pb(),
            emitted=[engine_pb2.Emitted(token_ids=token_ids) for token_ids in request.emitted],
        )
        self._outbox.put_nowait(engine_pb2.GatewayMessage(submit=submit))
        return request_id

    def abort(self, request_id: int, choice: int | None = None) -> None:
        """Tell the coordinator that nobody waits for a choice (or all of them) any more."""
        if self._outbox is not None and request_id in self._mailboxes:
            abort = engine_pb2.Abort(request_id=request_id, choice=choice)
            self._outbox.put_nowait(engine_pb2.GatewayMessage(abort=abort))

    def release(self, request_id: int) -> None:
        """Forget a request; later events for it are dropped."""
        self._mailboxes.pop(request_id, None)

    def fail_all(self, error: ApiError) -> None:
        """End every live request with an error."""
        for mailbox in self._mailboxes.values():
            mailbox.fail(error)

    async def metrics(self) -> str:
        """Return the coordinator's metrics, in Prometheus text format.

        Raises
        ------
        EngineUnavailable
            If it does not answer within the deadline.
        """
        if self._stub is None:
            raise self._unavailable()
        try:
            reply: engine_pb2.MetricsText = await self._stub.Metrics(
                engine_pb2.MetricsRequest(), timeout=self._rpc_timeout_s
            )
        except grpc.aio.AioRpcError as error:
            raise EngineUnavailable(f"the coordinator gave no metrics: {error.details()}") from None
        return reply.text

    async def trace(self, num_steps: int, timeout_s: float) -> str:
        """Return a trace of the next steps, in Chrome's trace event format.

        Raises
        ------
        InvalidRequest
            If the coordinator does not take the numbers, or records a trace for somebody else.
        EngineUnavailable
            If it does not answer.
        """
        if self._stub is None:
            raise self._unavailable()
        try:
            reply: engine_pb2.StepTrace = await self._stub.Trace(
                engine_pb2.TraceRequest(num_steps=num_steps, timeout_s=timeout_s),
                timeout=timeout_s + self._rpc_timeout_s,
            )
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION):
                raise InvalidRequest(error.details() or "", param="steps") from None
            raise EngineUnavailable(f"the coordinator gave no trace: {error.details()}") from None
        return reply.json

    def _unavailable(self) -> EngineUnavailable:
        state = self.state
        return EngineUnavailable(
            f"The engine is {state.status.value}{': ' + state.detail if state.detail else ''}", retry_after_s=1
        )

    async def _run(self) -> None:
        """Hold a session; after its end, try again."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                channel = open_channel(self._address, self._door, CHANNEL_OPTIONS)
            except OSError as error:  # files that are just being replaced
                reason = f"the files of --engine-ssl-* cannot be read: {error}"
            else:
                async with channel:
                    stub = engine_pb2_grpc.EngineStub(channel)  # type: ignore[no-untyped-call]  # generated code
                    try:
                        info = await stub.Describe(
                            engine_pb2.DescribeRequest(), timeout=self._rpc_timeout_s, wait_for_ready=True
                        )
                        self._info = EngineInfo(info.max_model_len, info.vocab_size, info.version)
                        self._set_state(EngineState.from_pb(info.state))
                        backoff_s = FIRST_BACKOFF_S
                        logger.info("session with the coordinator at %s: %s", self._address, self._state.status.value)
                        await self._session(stub)
                        reason = "the coordinator ended the session"
                    except grpc.aio.AioRpcError as error:
                        reason = f"{error.code().name}: {error.details()}"
                        if why := await explain(self._address, self._door):
                            reason = f"{why} ({reason})"
                    except _SessionSilent as error:
                        reason = str(error)
                    except Exception as fault:  # no message may keep the gateway from a new session
                        logger.exception("the session with the coordinator failed")
                        reason = repr(fault)
                    finally:
                        self._lose_session()
            logger.warning("no session with the coordinator at %s (%s)", self._address, reason)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def _session(self, stub: engine_pb2_grpc.EngineStub) -> None:
        """Run one session to its end: three tasks, and the first to end ends them all."""
        call = stub.Session()
        self._stub = stub
        self._outbox = asyncio.Queue()
        self._connected.set()
        self._responsive = True
        tasks = [
            asyncio.create_task(self._write(call, self._outbox), name="engine-write"),
            asyncio.create_task(self._read(call), name="engine-read"),
            asyncio.create_task(self._watch(stub), name="engine-watch"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            call.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    async def _write(
        self,
        call: grpc.aio.StreamStreamCall[engine_pb2.GatewayMessage, engine_pb2.EngineMessage],
        outbox: asyncio.Queue[engine_pb2.GatewayMessage],
    ) -> None:
        while True:
            message = await outbox.get()
            try:
                # Not `wait_for`: before Python 3.12 it drops a cancellation that comes with the end of the write.
                async with asyncio.timeout(self._session_timeout_s):
                    await call.write(message)
            except TimeoutError:
                raise _SessionSilent(f"a write took longer than {self._session_timeout_s:g} s") from None
            except asyncio.InvalidStateError:
                return  # the call has ended; the reader says why

    async def _read(self, call: grpc.aio.StreamStreamCall[engine_pb2.GatewayMessage, engine_pb2.EngineMessage]) -> None:
        async for message in call:
            match message.WhichOneof("message"):
                case "tokens":
                    self._deliver(message.tokens.events)
                case "accepted":
                    if mailbox := self._mailboxes.get(message.accepted.request_id):
                        mailbox.accept()
                case "rejected":
                    if mailbox := self._mailboxes.get(message.rejected.request_id):
                        mailbox.fail(_rejection(message.rejected))
                case "state":
                    self._set_state(EngineState.from_pb(message.state))

    async def _watch(self, stub: engine_pb2_grpc.EngineStub) -> None:
        """Ask for the state every `rpc_timeout_s`, so that a coordinator that hangs is seen without any request."""
        loop = asyncio.get_running_loop()
        last_answer = loop.time()
        while True:
            await asyncio.sleep(self._rpc_timeout_s)
            try:
                info = await stub.Describe(engine_pb2.DescribeRequest(), timeout=self._rpc_timeout_s)
            except grpc.aio.AioRpcError as error:
                # A lost connection is the reader's to see; here it is only that no good answer came.
                self._responsive = False
                silent_s = loop.time() - last_answer
                logger.warning("the coordinator has not answered for %.1f s (%s)", silent_s, error.code().name)
                if silent_s > self._session_timeout_s:
                    raise _SessionSilent(f"the coordinator has not answered for {silent_s:.1f} s") from None
            else:
                last_answer = loop.time()
                self._responsive = True
                self._set_state(EngineState.from_pb(info.state))

    def _deliver(self, events: Sequence[engine_pb2.TokenEvent]) -> None:
        mailboxes = self._mailboxes
        for pb in events:
            mailbox = mailboxes.get(pb.request_id)
            if mailbox is not None:
                mailbox.put(
                    TokenEvent(
                        pb.request_id,
                        pb.choice,
                        list(pb.token_ids),
                        [TokenLogprobs.from_pb(item) for item in pb.logprobs],
                        FinishReason(pb.finish) if pb.finish else None,
                        pb.detail,
                        pb.num_cached_tokens,
                    )
                )

    def _set_state(self, state: EngineState) -> None:
        if state != self._state:
            logger.info("the engine is %s%s", state.status.value, f": {state.detail}" if state.detail else "")
        self._state = state
        self.was_ready |= state.status is EngineStatus.READY

    def _lose_session(self) -> None:
        """Fail every request: with the session, the coordinator has forgotten them."""
        self._stub = None
        self._outbox = None
        self._connected.clear()
        self._state = self._disconnected
        self.fail_all(EngineUnavailable("The session with the engine was lost", retry_after_s=1))
        self._mailboxes.clear()


class _SessionSilent(Exception):
    """The coordinator holds the connection and does not answer."""


def _rejection(pb: engine_pb2.Rejected) -> ApiError:
    match pb.code:
        case engine_pb2.Rejected.INVALID:
            return InvalidRequest(pb.message)
        case engine_pb2.Rejected.QUEUE_FULL:
            return QueueFull(pb.message, retry_after_s=max(1, pb.retry_after_s))
        case _:
            return EngineUnavailable(pb.message, retry_after_s=max(1, pb.retry_after_s))
