"""A draft with ranks of its own, of another number than the model's: the same text, soon again when one is killed.

What the text says is not the subject: the model is a small one of random weights, and the draft the same.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from patience import patient
from server import Server, chat_request, until

REQUESTS = [
    chat_request("Repeat: red, green, blue, red, green, blue, red,", max_tokens=200),
    chat_request("Write a long story about a dragon.", temperature=0.8, seed=3, max_tokens=200),
    chat_request("What is the capital of France?", temperature=0.7, seed=5, frequency_penalty=0.8, max_tokens=150),
    chat_request("How does a bicycle stay upright?", max_tokens=150),
]
PROMISED_S = 45.0
"""The default of --replay-timeout."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("dedicated")
    return path


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path, folder: Path) -> list[str | None]:
    """What a server without speculation answers."""
    with Server.running(tiny_checkpoint, "--max-num-seqs", "4", folder=folder) as plain:
        return asyncio.run(answers(plain))


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, folder: Path) -> Iterator[Server]:
    flags = ["--max-num-seqs", "4", "--draft-model", str(tiny_checkpoint), "--num-speculative-tokens", "3"]
    flags += ["--draft-placement", "dedicated", "--draft-tp", "2", "--enable-debug"]
    with Server.running(tiny_checkpoint, *flags, folder=folder) as running:
        yield running


async def answers(server: Server, *, stream_kill: int | None = None) -> list[str | None]:
    """Send every request at once; return the texts.

    Parameters
    ----------
    stream_kill
        A process that is killed once every stream has begun.
    """
    num_begun = 0

    async def text_of(body: dict[str, object]) -> str:
        nonlocal num_begun
        text, finish = "", None
        async for chunk in await client.chat.completions.create(**body, stream=True):  # type: ignore[call-overload]
            for choice in chunk.choices:
                num_begun += not text and bool(choice.delta.content)
                text += choice.delta.content or ""
                finish = choice.finish_reason or finish
            if stream_kill is not None and num_begun == len(REQUESTS):
                num_begun = 0
                os.kill(stream_kill, signal.SIGKILL)
        assert finish is not None
        return text

    async with server.async_client() as client:
        return list(await asyncio.gather(*map(text_of, REQUESTS)))


def draft_pids(server: Server) -> list[int]:
    """The pids of the latest group's draft ranks."""
    found = re.findall(r"rank draft (\d): pid (\d+) on", server.log)
    return [int(pid) for _, pid in sorted(dict(found).items())]


def test_answers_are_those_of_plain_decoding(server: Server, expected: list[str | None]) -> None:
    assert asyncio.run(answers(server)) == expected
    metrics = server.metrics()
    drafted = metrics["tpserve_spec_decode_num_draft_tokens_total"]
    assert drafted > 50
    assert metrics["tpserve_spec_decode_num_accepted_tokens_total"] > 0.9 * drafted, "it draws as the model does"
    for rank in ("0", "draft 0", "draft 1"):
        assert metrics[f"tpserve_rank_step_seconds_count{{rank={rank}}}"] > 10
    assert metrics["tpserve_collective_calls_total{kind=all_reduce,rank=draft 1}"] > 0
    until(lambda: len(set(last_steps(server))) == 1, within_s=5, what="all ranks have ended the same step")


def last_steps(server: Server) -> list[float]:
    metrics = server.metrics()
    return [metrics[f"tpserve_rank_last_step{{rank={rank}}}"] for rank in ("0", "draft 0", "draft 1")]


def test_a_step_trace_has_a_track_for_each_of_its_ranks(server: Server) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(
            httpx.get, f"{server.url}/debug/trace", params={"steps": 5, "timeout": 20}, timeout=40, trust_env=False
        )
        asyncio.run(answers(server))
        reply = asked.result()
    assert reply.status_code == 200
    events = reply.json()["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    steps = Counter(names[event["pid"]] for event in events if event.get("cat") == "step")
    assert steps == {"rank 0": 5, "rank draft 0": 5, "rank draft 1": 5}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_draft_rank_costs_no_answer(server: Server, expected: list[str | None], rank: int) -> None:
    """The first, which sends draft tokens, and one that only helps it."""
    before, log_begin = draft_pids(server), len(server.log)
    assert len(before) == 2
    asked_at = time.monotonic()
    assert asyncio.run(answers(server, stream_kill=before[rank])) == expected
    assert time.monotonic() - asked_at < patient(PROMISED_S), "every client has its text by then, or an error"
    (lost,) = re.findall(r"coordinator: lost rank (.*); rebuilding the TP group", server.log[log_begin:])
    assert lost.startswith(f"draft {rank}: connection lost")
    until(lambda: server.health()[0] == 200, within_s=10, what="ready")
    assert not set(before) & set(draft_pids(server)), "the group is rebuilt whole"
    assert server.metrics()[f"tpserve_ranks_lost_total{{rank=draft {rank}}}"] == 1
