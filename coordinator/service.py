"""gRPC door of the coordinator for gateways: requests in, one batch of token events per step out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence

import grpc
import grpc.aio

from tpserve.coordinator.active_requests import OutputEvent
from tpserve.coordinator.engine import Engine, Unavailable
from tpserve.coordinator.metrics import Metrics
from tpserve.coordinator.request import QueueFull, RequestInvalid
from tpserve.coordinator.step_log import MAX_TRACE_STEPS
from tpserve.coordinator.submit_check import check_submit
from tpserve.proto.messages import Grammar, SamplingParams
from tpserve.proto.pb import engine_pb2, engine_pb2_grpc

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 1


class EngineService(engine_pb2_grpc.EngineServicer):
    """One session per gateway process; what it asked for ends with it.

    Parameters
    ----------
    info
        What `Describe` answers, without the state.
    enable_debug
        Whether `Trace` is answered.
    """

    def __init__(
        self, engine: Engine, metrics: Metrics, info: engine_pb2.EngineInfo, *, enable_debug: bool = False
    ) -> None:
        self._enable_debug = enable_debug
        self._engine = engine
        self._metrics = metrics
        self._info = info
        self._sessions: set[Session] = set()
        self._closed = False

    def close(self) -> None:
        """End every session after what it still has to send."""
        self._closed = True
        for session in self._sessions:
            session.outbox.put_nowait(None)

    async def Session(
        self,
        request_iterator: AsyncIterator[engine_pb2.GatewayMessage],
        context: grpc.aio.ServicerContext[engine_pb2.GatewayMessage, engine_pb2.EngineMessage],
    ) -> AsyncIterator[engine_pb2.EngineMessage]:
        """Serve one gateway until its stream ends."""
        session = Session(self._engine, self._info.vocab_size)
        unwatch = self._engine.watch_status(session.send_state)
        session.send_state()
        reader = asyncio.create_task(session.read(request_iterator))
        self._sessions.add(session)
        try:
            while (message := await session.outbox.get()) is not None:
                yield message
            if not self._closed:
                await reader
        finally:
            self._sessions.discard(session)
            unwatch()
            reader.cancel()
            session.close()

    async def Describe(
        self,
        request: engine_pb2.DescribeRequest,
        context: grpc.aio.ServicerContext[engine_pb2.DescribeRequest, engine_pb2.EngineInfo],
    ) -> engine_pb2.EngineInfo:
        """Say what is served and in which state."""
        info = engine_pb2.EngineInfo()
        info.CopyFrom(self._info)
        info.state.CopyFrom(_state(self._engine))
        return info

    async def Metrics(
        self,
        request: engine_pb2.MetricsRequest,
        context: grpc.aio.ServicerContext[engine_pb2.MetricsRequest, engine_pb2.MetricsText],
    ) -> engine_pb2.MetricsText:
        """Give every metric of the coordinator."""
        return engine_pb2.MetricsText(text=self._metrics.text())

    async def Trace(
        self,
        request: engine_pb2.TraceRequest,
        context: grpc.aio.ServicerContext[engine_pb2.TraceRequest, engine_pb2.StepTrace],
    ) -> engine_pb2.StepTrace:
        """Record the next steps."""
        if not self._enable_debug:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "start the server with --enable-debug")
        if not 1 <= request.num_steps <= MAX_TRACE_STEPS:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"steps is {request.num_steps}: it must be in 1..{MAX_TRACE_STEPS}"
            )
        try:
            trace = await self._engine.trace(request.num_steps, request.timeout_s)
        except RuntimeError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return engine_pb2.StepTrace(json=trace)


class Session:
    """Requests of one gateway, and what is to be sent to it.

    Parameters
    ----------
    vocab_size
        0: unknown.
    """

    def __init__(self, engine: Engine, vocab_size: int = 0) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._keys: dict[int, int] = {}  # the gateway's request id -> the engine's key
        self._open: dict[int, set[int]] = {}  # the gateway's request id -> choices without their last event
        self.outbox: asyncio.Queue[engine_pb2.EngineMessage | None] = asyncio.Queue()

    async def read(self, messages: AsyncIterator[engine_pb2.GatewayMessage]) -> None:
        """Take requests and aborts until the gateway ends the stream."""
        try:
            async for message in messages:
                kind = message.WhichOneof("message")
                if kind == "submit":
                    self._submit(message.submit)
                elif kind == "abort":
                    self._abort(message.abort)
        finally:
            self.outbox.put_nowait(None)

    def send_state(self) -> None:
        """Tell the gateway the engine's state."""
        self.outbox.put_nowait(engine_pb2.EngineMessage(state=_state(self._engine)))

    def close(self) -> None:
        """Abort whatever the gateway still waited for."""
        for key in self._keys.values():
            self._engine.abort(key)
        self._keys.clear()

    def _submit(self, submit: engine_pb2.Submit) -> None:
        try:
            if submit.request_id in self._keys:
                raise RequestInvalid(f"request id {submit.request_id} is in use")
            check_submit(submit, self._vocab_size)
            key = self._engine.submit(
                submit.request_id,
                self.deliver,
                tuple(submit.prompt_token_ids),
                submit.n,
                SamplingParams.from_pb(submit.sampling),
                submit.max_tokens,
                frozenset(submit.stop_token_ids),
                Grammar.from_pb(submit.grammar) if submit.HasField("grammar") else None,
                name=submit.name,
                traceparent=submit.traceparent,
                emitted=tuple(tuple(choice.token_ids) for choice in submit.emitted),
            )
        except RequestInvalid as error:
            self._reject(submit, engine_pb2.Rejected.INVALID, str(error))
        except QueueFull as error:
            self._reject(submit, engine_pb2.Rejected.QUEUE_FULL, str(error))
        except Unavailable as error:
            self._reject(submit, engine_pb2.Rejected.UNAVAILABLE, str(error))
        else:
            self._keys[submit.request_id] = key
            self._open[submit.request_id] = set(range(submit.n))
            accepted = engine_pb2.Accepted(request_id=submit.request_id)
            self.outbox.put_nowait(engine_pb2.EngineMessage(accepted=accepted))

    def _reject(self, submit: engine_pb2.Submit, code: engine_pb2.Rejected.Code, message: str) -> None:
        retry = 0 if code == engine_pb2.Rejected.INVALID else _RETRY_AFTER_S
        rejected = engine_pb2.Rejected(request_id=submit.request_id, code=code, message=message, retry_after_s=retry)
        self.outbox.put_nowait(engine_pb2.EngineMessage(rejected=rejected))

    def _abort(self, abort: engine_pb2.Abort) -> None:
        key = self._keys.get(abort.request_id)
        if key is None:
            return  # it ended while the message was on its way
        if abort.HasField("choice"):
            self._engine.abort(key, abort.choice)
            self._close_choice(abort.request_id, abort.choice)
        else:
            self._engine.abort(key)
            del self._open[abort.request_id], self._keys[abort.request_id]

    def deliver(self, outputs: Sequence[OutputEvent]) -> None:
        """Queue one step's events; called by the engine."""
        batch = engine_pb2.TokenBatch()
        for output in outputs:
            event = output.event
            batch.events.add(
                request_id=output.client_id,
                choice=event.choice,
                token_ids=event.token_ids,
                logprobs=[value.to_pb() for value in event.logprobs],
                finish=0 if event.finish is None else event.finish.value,
                detail=output.detail,
                num_cached_tokens=event.num_cached_tokens,
            )
            if event.finish is not None:
                self._close_choice(output.client_id, event.choice)
        self.outbox.put_nowait(engine_pb2.EngineMessage(tokens=batch))

    def _close_choice(self, request_id: int, choice: int) -> None:
        """Forget a choice; an abort of it may have crossed its own end, so it may be gone already."""
        choices = self._open[request_id]
        choices.discard(choice)
        if not choices:
            del self._open[request_id], self._keys[request_id]


def _state(engine: Engine) -> engine_pb2.EngineState:
    status, detail = engine.status
    return engine_pb2.EngineState(status=engine_pb2.EngineState.Status.Name(status.value), detail=detail)
