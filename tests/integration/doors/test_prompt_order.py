"""A short prompt does not wait behind a long one that has begun, and changes nothing of its text."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from server import MODEL_NAME, Server, until

LONG = " ".join(f"word{i}" for i in range(200))
SHORT = "The capital of France is"


@pytest.fixture(scope="module")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Steps of 32 tokens, so that the long prompt takes many."""
    flags = ("--tp", "1", "--max-num-seqs", "4", "--max-num-batched-tokens", "32", "--no-prefix-cache")
    started = Server(demo_model, *flags, folder=tmp_path_factory.mktemp("prompt_order"))
    try:
        started.wait_ready()
        yield started
    finally:
        started.kill_all()


async def complete(client: openai.AsyncOpenAI, prompt: str, began: list[str]) -> str:
    """Stream a greedy answer; note its prompt when its first token comes."""
    text = ""
    stream = await client.completions.create(model=MODEL_NAME, prompt=prompt, max_tokens=4, temperature=0, stream=True)
    async for chunk in stream:
        if not text:
            began.append(prompt)
        text += chunk.choices[0].text
    return text


async def test_a_short_prompt_passes_a_long_one(server: Server) -> None:
    async with server.async_client() as client:
        alone = [await complete(client, prompt, []) for prompt in (LONG, SHORT)]
        began: list[str] = []
        long = asyncio.create_task(complete(client, LONG, began))
        running = "tpserve_num_requests_running"
        await asyncio.to_thread(until, lambda: server.metrics()[running] == 1, within_s=10, what="the long prompt runs")
        short = await complete(client, SHORT, began)
        assert [await long, short] == alone
    assert began == [SHORT, LONG]
