"""A coordinator's gRPC side whose tokens come from a script, for driving the real gateway over a real channel."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field

import grpc.aio

from tpserve.proto.pb import common_pb2, engine_pb2, engine_pb2_grpc

Script = Callable[[engine_pb2.Submit, int], Iterable[int]]


def seeded_script(vocab_size: int) -> Script:
    """Tokens are a function of seed, prompt and choice, as the real engine's are."""

    def script(submit: engine_pb2.Submit, choice: int) -> Iterable[int]:
        rng = random.Random(f"{submit.sampling.seed} {choice} {list(submit.prompt_token_ids)}")
        while True:
            yield rng.randrange(3, vocab_size)

    return script


def fixed_script(*choices: list[int]) -> Script:
    """Choice i gets `choices[i]`."""
    return lambda _, choice: choices[choice]


@dataclass
class ScriptedEngine(engine_pb2_grpc.EngineServicer):
    script: Script
    vocab_size: int
    max_model_len: int = 512
    tokens_per_event: int = 1
    rejection: engine_pb2.Rejected | None = None
    fail_after: int | None = None
    silent: bool = False
    status: engine_pb2.EngineState.Status = engine_pb2.EngineState.READY
    num_cached_tokens: int = 0
    metrics_text: str = "# TYPE tpserve_num_requests_running gauge\ntpserve_num_requests_running 0\n"
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """While clear, no tokens flow after each choice's first."""
    submits: list[engine_pb2.Submit] = field(default_factory=list)
    arrivals: asyncio.Queue[engine_pb2.Submit] = field(default_factory=asyncio.Queue)
    aborts: asyncio.Queue[engine_pb2.Abort] = field(default_factory=asyncio.Queue)
    sessions: asyncio.Queue[asyncio.Queue[engine_pb2.EngineMessage | None]] = field(default_factory=asyncio.Queue)
    """The outbox of each session opened; None ends the session."""

    answering: asyncio.Event = field(default_factory=asyncio.Event)
    """While clear, unary calls hang."""

    def __post_init__(self) -> None:
        self.gate.set()
        self.answering.set()

    @staticmethod
    def hidden(submit: engine_pb2.Submit) -> bytes:
        """A row of four numbers that tells the prompt."""
        ids = submit.prompt_token_ids
        return struct.pack("<4f", len(ids), ids[0], ids[-1], 1.0)

    async def start(self, address: str = "127.0.0.1:0") -> tuple[grpc.aio.Server, str]:
        server = grpc.aio.server()
        engine_pb2_grpc.add_EngineServicer_to_server(self, server)  # type: ignore[no-untyped-call]  # generated
        port = server.add_insecure_port(address)
        await server.start()
        return server, f"127.0.0.1:{port}"

    def state(self) -> engine_pb2.EngineState:
        return engine_pb2.EngineState(status=self.status, detail="scripted")

    async def Describe(self, _: object, context: object) -> engine_pb2.EngineInfo:
        await self.answering.wait()
        return engine_pb2.EngineInfo(
            max_model_len=self.max_model_len, vocab_size=self.vocab_size, version="1.2.3", state=self.state()
        )

    async def Metrics(self, _: object, context: object) -> engine_pb2.MetricsText:
        return engine_pb2.MetricsText(text=self.metrics_text)

    async def Session(
        self, messages: AsyncIterator[engine_pb2.GatewayMessage], context: object
    ) -> AsyncIterator[engine_pb2.EngineMessage]:
        outbox: asyncio.Queue[engine_pb2.EngineMessage | None] = asyncio.Queue()
        self.sessions.put_nowait(outbox)
        reader = asyncio.create_task(self._read(messages, outbox))
        try:
            yield engine_pb2.EngineMessage(state=self.state())
            while (message := await outbox.get()) is not None:
                yield message
        finally:
            reader.cancel()

    async def _read(
        self,
        messages: AsyncIterator[engine_pb2.GatewayMessage],
        outbox: asyncio.Queue[engine_pb2.EngineMessage | None],
    ) -> None:
        running: dict[int, asyncio.Task[None]] = {}
        try:
            async for message in messages:
                if message.HasField("abort"):
                    self.aborts.put_nowait(message.abort)
                    if not message.abort.HasField("choice"):
                        running[message.abort.request_id].cancel()
                    continue
                submit = message.submit
                self.submits.append(submit)
                self.arrivals.put_nowait(submit)
                running[submit.request_id] = asyncio.create_task(self._generate(submit, outbox))
        finally:
            for task in running.values():
                task.cancel()

    async def _generate(
        self, submit: engine_pb2.Submit, outbox: asyncio.Queue[engine_pb2.EngineMessage | None]
    ) -> None:
        if self.silent:
            return
        if self.rejection is not None:
            rejected = engine_pb2.Rejected()
            rejected.CopyFrom(self.rejection)
            rejected.request_id = submit.request_id
            outbox.put_nowait(engine_pb2.EngineMessage(rejected=rejected))
            return
        outbox.put_nowait(engine_pb2.EngineMessage(accepted=engine_pb2.Accepted(request_id=submit.request_id)))
        streams = {choice: iter(self.script(submit, choice)) for choice in range(submit.n)}
        counts = dict.fromkeys(streams, 0)
        for choice, emitted in enumerate(submit.emitted):
            counts[choice] = len(emitted.token_ids)
            assert [next(streams[choice]) for _ in emitted.token_ids] == emitted.token_ids, "emitted by no engine"
        while streams:
            batch = engine_pb2.TokenBatch()
            for choice in list(streams):
                event = self._event(submit, choice, streams, counts)
                batch.events.append(event)
                if event.finish:
                    del streams[choice]
            outbox.put_nowait(engine_pb2.EngineMessage(tokens=batch))
            await asyncio.sleep(0)
            await self.gate.wait()

    def _event(
        self, submit: engine_pb2.Submit, choice: int, streams: dict[int, Iterator[int]], counts: dict[int, int]
    ) -> engine_pb2.TokenEvent:
        event = engine_pb2.TokenEvent(request_id=submit.request_id, choice=choice)
        if counts[choice] == (len(submit.emitted[choice].token_ids) if submit.emitted else 0):
            event.num_cached_tokens = self.num_cached_tokens
        for _ in range(self.tokens_per_event):
            if counts[choice] == self.fail_after:
                event.finish = engine_pb2.FAILED
                event.detail = "rank 1 was lost"
                break
            token = next(streams[choice])
            event.token_ids.append(token)
            counts[choice] += 1
            if submit.sampling.HasField("num_logprobs"):
                others = range(3, 3 + submit.sampling.num_logprobs)
                event.logprobs.append(
                    common_pb2.TokenLogprobs(
                        logprob=-0.5,
                        top_token_ids=others,
                        top_logprobs=[-1.0 - i for i, _ in enumerate(others)],
                        hidden=self.hidden(submit) if submit.sampling.wants_hidden else b"",
                    )
                )
            if token in submit.stop_token_ids:
                event.finish = engine_pb2.STOP
            elif counts[choice] == submit.max_tokens:
                event.finish = engine_pb2.LENGTH
            if event.finish:
                break
        return event
