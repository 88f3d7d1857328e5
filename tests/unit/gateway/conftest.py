from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import httpx
import openai
import pytest
import tokenizers
import uvicorn
from tokenizers import decoders, models, pre_tokenizers, trainers

from patience import Patience
from tpserve.coordinator.gateway.__main__ import Server
from tpserve.coordinator.gateway.app import create_app
from tpserve.coordinator.gateway.config import GatewayConfig
from tpserve.coordinator.gateway.guard import connection_limit, guarded_protocol
from tpserve.coordinator.gateway.service import Service
from tpserve.coordinator.gateway.tls import TlsFiles, url_of
from tpserve.coordinator.gateway.tokenizer import Tokenizer
from tpserve.coordinator.process import bind
from unit.gateway.scripted_engine import ScriptedEngine, seeded_script

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.get('name') == 'nobody' %}{{ raise_exception('nobody cannot speak') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "Hello there, how are you today? The quick brown fox jumps over the lazy dog.",
    "def main():\n    return {'key': [1, 2, 3]}\n",
    "Grüße aus Köln, 你好世界, こんにちは, 👩‍👩‍👧 family, e\u0301 combining.",
    "the the the and and user assistant system stop STOP end END",
]


def make_backend() -> tokenizers.Tokenizer:
    """Train a small byte-level BPE, of the kind that llama 3, qwen and smollm use."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([tokenizers.AddedToken("<tool>", special=False), tokenizers.AddedToken("größe☃", special=False)])
    return backend


def write_model(folder: Path) -> Path:
    """Write the text side of a model."""
    make_backend().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.load(model_dir)


class ReadyServer(Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config, service: Service, tls: TlsFiles | None = None) -> None:
        super().__init__(config, service, tls)
        self.ready = asyncio.Event()
        self.draining = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    def _drain(self, signum: int) -> None:
        super()._drain(signum)
        self.draining.set()


@dataclass
class Stack:
    """A gateway on loopback in front of a scripted engine."""

    engine: ScriptedEngine
    engine_server: grpc.aio.Server
    service: Service
    server: ReadyServer
    serving: asyncio.Task[None]
    url: str
    client: openai.AsyncOpenAI
    http: httpx.AsyncClient

    async def until_state(self, status: str) -> dict[str, str]:
        """Poll /health until it says `status`."""
        patience = Patience(20)
        while True:
            body: dict[str, str] = (await self.http.get("/health")).json()
            if body["status"] == status:
                return body
            assert not patience.is_over(), f"not {status} in time but {body}"


StackFactory = Callable[..., contextlib.AbstractAsyncContextManager[Stack]]


@pytest.fixture
def make_stack(model_dir: Path, tokenizer: Tokenizer) -> StackFactory:
    @contextlib.asynccontextmanager
    async def make(
        engine: ScriptedEngine | None = None, verify: ssl.SSLContext | bool = True, **changes: object
    ) -> AsyncIterator[Stack]:
        engine = engine or ScriptedEngine(seeded_script(tokenizer.vocab_size), tokenizer.vocab_size)
        engine_server, address = await engine.start()
        config = GatewayConfig(
            engine_address=address,
            model_dir=str(model_dir),
            served_model_names=("tiny", "gpt-4"),
            port=0,
        )
        config = dataclasses.replace(config, **changes)  # type: ignore[arg-type]  # each test knows its fields
        service = Service.load(config)
        bound = bind(config.host, 0)
        uvicorn_config = uvicorn.Config(
            create_app(service),
            loop="none",
            http=guarded_protocol(
                config.header_timeout_s, config.write_timeout_s, connection_limit(config.max_connections)
            ),
            log_config=None,
            timeout_graceful_shutdown=1,
        )
        server = ReadyServer(uvicorn_config, service, config.tls_files())
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        await server.ready.wait()
        url = url_of(bound, server.tls)
        try:
            async with (
                openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=20) as client,
                httpx.AsyncClient(base_url=url, timeout=20, verify=verify) as http,
            ):
                stack = Stack(engine, engine_server, service, server, serving, url, client, http)
                await stack.until_state(EXPECTED_STATES[engine.status])
                yield stack
        finally:
            server.should_exit = True
            await serving
            await stack.engine_server.stop(None)

    return make


EXPECTED_STATES = ["starting", "ready", "rebuilding", "draining", "stalled", "dead"]
