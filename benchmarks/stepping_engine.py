"""A coordinator's gRPC door without an engine behind it: every step, each running sequence gets a token.

For driving gateways to their limit, which no engine on a CPU does. A session that cannot take its events makes its
steps late, so nothing piles up. `python benchmarks/stepping_engine.py STEP_MS VOCAB_SIZE MAX_MODEL_LEN` prints its
address.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncIterator, Iterator

import grpc.aio

from tpserve.coordinator.process import tell_parent
from tpserve.proto.pb import engine_pb2, engine_pb2_grpc

READY = engine_pb2.EngineState(status=engine_pb2.EngineState.READY)


class SteppingEngine(engine_pb2_grpc.EngineServicer):
    """Accepts everything at once; tokens are random, and only `max_tokens` ends a sequence.

    Parameters
    ----------
    step_s
        Time from step to step.
    vocab_size, max_model_len
        Told to the gateways.
    """

    def __init__(self, step_s: float, vocab_size: int, max_model_len: int) -> None:
        self._step_s = step_s
        self._info = engine_pb2.EngineInfo(
            vocab_size=vocab_size, max_model_len=max_model_len, max_num_seqs=2**16, tp_size=1, state=READY, version="0"
        )
        self._num_tokens = 0
        self._num_running = 0
        rng = random.Random(1)
        # From the upper half: special tokens, which have no text, stand at the beginning.
        self._tokens = [rng.randrange(vocab_size // 2, vocab_size) for _ in range(4096)]

    async def Describe(self, request: object, context: object) -> engine_pb2.EngineInfo:
        """See the protocol."""
        return self._info

    async def Metrics(self, request: object, context: object) -> engine_pb2.MetricsText:
        """Tell what a benchmark asks for."""
        values = {
            "num_requests_running": self._num_running,
            "num_requests_waiting": 0,
            "kv_cache_usage_perc": 0,
            "generation_tokens": self._num_tokens,
        }
        lines = []
        for name, value in values.items():
            counter = name == "generation_tokens"
            lines.append(f"# TYPE tpserve_{name} {'counter' if counter else 'gauge'}")
            lines.append(f"tpserve_{name}{'_total' if counter else ''} {value}")
        return engine_pb2.MetricsText(text="\n".join(lines) + "\n")

    async def Session(
        self, messages: AsyncIterator[engine_pb2.GatewayMessage], context: object
    ) -> AsyncIterator[engine_pb2.EngineMessage]:
        """Step this gateway's sequences; each gateway has steps of its own."""
        left: dict[int, int] = {}  # tokens to come, by request
        arrived: list[int] = []
        reader = asyncio.create_task(self._read(messages, left, arrived))
        loop = asyncio.get_running_loop()
        next_step = loop.time()
        try:
            yield engine_pb2.EngineMessage(state=READY)
            while True:
                next_step = max(next_step + self._step_s, loop.time())
                await asyncio.sleep(next_step - loop.time())
                while arrived:
                    yield engine_pb2.EngineMessage(accepted=engine_pb2.Accepted(request_id=arrived.pop()))
                if left:
                    batch = engine_pb2.TokenBatch(events=self._step(left))
                    yield engine_pb2.EngineMessage(tokens=batch)
        finally:
            reader.cancel()
            self._num_running -= len(left)

    def _step(self, left: dict[int, int]) -> Iterator[engine_pb2.TokenEvent]:
        tokens, position = self._tokens, self._num_tokens
        for request_id, num_left in list(left.items()):
            position += 1
            finish = engine_pb2.LENGTH if num_left == 1 else engine_pb2.NOT_FINISHED
            yield engine_pb2.TokenEvent(
                request_id=request_id, token_ids=[tokens[position % len(tokens)]], finish=finish
            )
            if num_left == 1:
                del left[request_id]
                self._num_running -= 1
            else:
                left[request_id] = num_left - 1
        self._num_tokens = position

    async def _read(
        self, messages: AsyncIterator[engine_pb2.GatewayMessage], left: dict[int, int], arrived: list[int]
    ) -> None:
        async for message in messages:
            if message.HasField("submit"):
                left[message.submit.request_id] = message.submit.max_tokens
                arrived.append(message.submit.request_id)
                self._num_running += 1
            elif left.pop(message.abort.request_id, None) is not None:
                self._num_running -= 1


async def serve(step_s: float, vocab_size: int, max_model_len: int) -> None:
    """Serve until the process is ended."""
    server = grpc.aio.server()
    engine = SteppingEngine(step_s, vocab_size, max_model_len)
    engine_pb2_grpc.add_EngineServicer_to_server(engine, server)  # type: ignore[no-untyped-call]  # generated code
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    tell_parent(address=f"127.0.0.1:{port}")
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1]) / 1000, int(sys.argv[2]), int(sys.argv[3])))
