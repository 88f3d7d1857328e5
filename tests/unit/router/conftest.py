from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import openai
import pytest
import uvicorn

from patience import Patience, patient
from tpserve.coordinator.gateway.tokenizer import Tokenizer
from tpserve.coordinator.process import bind
from tpserve.coordinator.router.__main__ import Server
from tpserve.coordinator.router.app import Router
from tpserve.coordinator.router.config import RouterConfig
from tpserve.proto.pb import engine_pb2
from unit.gateway.conftest import Stack, StackFactory, make_stack, model_dir, tokenizer
from unit.gateway.scripted_engine import Script, ScriptedEngine, seeded_script

__all__ = ["make_stack", "model_dir", "tokenizer"]

SECRET = "s3cret"
FAST = {"health_interval_s": 0.05}
PATIENT = {"health_timeout_s": 60.0, "queue_timeout_s": 60.0}
"""Of what ends by an event: on a busy machine it may come late, and no test is about that."""
STATES_STAY: dict[str, Any] = {"router_token": SECRET, "rpc_timeout_s": 600.0}
"""Who has told of a state keeps it: nobody asks again before the test is over."""
_CLIENT_TIMEOUT_S = 60.0

T = TypeVar("T")


class ReadyServer(Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config, router: Router) -> None:
        super().__init__(config, router)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


async def until(probe: Callable[[], bool]) -> None:
    """Wait until `probe` says yes."""
    patience = Patience(20)
    while not probe():
        assert not patience.is_over(), "not within 20 s"
        await asyncio.sleep(0.01)


async def soon(event: Awaitable[T]) -> T:
    """Wait for what must come."""
    return await asyncio.wait_for(event, patient(20))


@dataclass
class Routed:
    """A router before gateways, each on a scripted engine of its own."""

    router: Router
    url: str
    client: openai.AsyncOpenAI
    http: httpx.AsyncClient

    async def until_ready(self, num: int) -> None:
        """Wait until so many replicas are ready."""
        await until(lambda: self.router.replicas.num_ready == num)

    async def until_queued(self, num: int) -> None:
        """Wait until so many requests wait for a replica."""
        await until(lambda: any(f"tpserve_router_queued {num}.0" in line for line in self._metrics()))

    def _metrics(self) -> list[str]:
        return self.router.replicas.metrics.render().splitlines()


@contextlib.asynccontextmanager
async def routed(*backends: str, num_ready: int | None = None, **changes: object) -> AsyncIterator[Routed]:
    """Run a router."""
    config = RouterConfig(**{"backends": backends, "router_token": SECRET, **FAST, **PATIENT, **changes})  # type: ignore[arg-type]
    router = Router(config)
    bound = bind("127.0.0.1", 0)
    uvicorn_config = uvicorn.Config(
        router, loop="none", http="httptools", lifespan="on", log_config=None, timeout_graceful_shutdown=1
    )
    server = ReadyServer(uvicorn_config, router)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    await server.ready.wait()
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    try:
        async with (
            openai.AsyncOpenAI(
                base_url=url + "/v1", api_key="none", max_retries=0, timeout=_CLIENT_TIMEOUT_S
            ) as client,
            httpx.AsyncClient(base_url=url, timeout=_CLIENT_TIMEOUT_S) as http,
        ):
            found = Routed(router, url, client, http)
            await found.until_ready(len(backends) if num_ready is None else num_ready)
            yield found
    finally:
        server.should_exit = True
        await serving


@pytest.fixture
async def two(make_stack: StackFactory, tokenizer: Tokenizer) -> AsyncIterator[tuple[Stack, Stack]]:
    """Two gateways on engines with the same tokens."""
    engines = [make_engine(tokenizer) for _ in range(2)]
    async with make_stack(engines[0], **STATES_STAY) as one, make_stack(engines[1], **STATES_STAY) as other:
        yield one, other


def make_engine(tokenizer: Tokenizer, **changes: object) -> ScriptedEngine:
    return ScriptedEngine(wordy_script(tokenizer), tokenizer.vocab_size, **changes)  # type: ignore[arg-type]


def wordy_script(tokenizer: Tokenizer) -> Script:
    """Like `seeded_script`, but each choice begins with letters.

    A token may also be a part of a character, whose text comes with the next one: a test that lets no more come would
    wait for the stream's first comment, a quarter of a minute.
    """
    words = [
        token for token in range(3, tokenizer.vocab_size) if tokenizer.piece(token).decode(errors="replace").isalpha()
    ]
    others = seeded_script(tokenizer.vocab_size)

    def script(submit: engine_pb2.Submit, choice: int) -> Iterator[int]:
        tokens = iter(others(submit, choice))
        yield words[next(tokens) % len(words)]
        yield from tokens

    return script
