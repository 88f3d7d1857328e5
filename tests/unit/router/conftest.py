from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from tpserve.coordinator.gateway.tokenizer import Tokenizer
from tpserve.coordinator.process import bind
from tpserve.coordinator.router.__main__ import Server
from tpserve.coordinator.router.app import Router
from tpserve.coordinator.router.config import RouterConfig
from unit.gateway.conftest import Stack, StackFactory, make_stack, model_dir, tokenizer
from unit.gateway.scripted_engine import Script, ScriptedEngine, seeded_script

__all__ = ["make_stack", "model_dir", "tokenizer"]

SECRET = "s3cret"
FAST = {"health_interval_s": 0.05, "queue_timeout_s": 10.0}


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
    for _ in range(1000):
        if probe():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not within 10 s")


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
    config = RouterConfig(**{"backends": backends, "router_token": SECRET, **FAST, **changes})  # type: ignore[arg-type]
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
            openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=20) as client,
            httpx.AsyncClient(base_url=url, timeout=20) as http,
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
    # Who has told of a state keeps it: nobody asks again before the test is over.
    settings: dict[str, Any] = {"router_token": SECRET, "rpc_timeout_s": 600.0}
    async with make_stack(engines[0], **settings) as one, make_stack(engines[1], **settings) as other:
        yield one, other


def make_engine(tokenizer: Tokenizer, script: Script | None = None, **changes: object) -> ScriptedEngine:
    return ScriptedEngine(script or seeded_script(tokenizer.vocab_size), tokenizer.vocab_size, **changes)  # type: ignore[arg-type]
