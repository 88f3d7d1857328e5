"""Any process of a replica is killed: what clients see, how the server ends, and that nothing is left."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from patience import Patience, patient
from server import MODEL_NAME, Server, chat_request, processes_of
from tpserve import AsyncMLCEngine

DUMMY = ("--load-format", "dummy", "--max-num-seqs", "12", "--max-num-batched-tokens", "64")
"""Random weights, and room for all that a test streams at once."""
ENDED_WITHIN_S = 60.0
GONE_WITHIN_S = 10.0
"""Once `serve` has ended: what it has killed is as good as gone."""
MODULES = {"coordinator": "tpserve.coordinator", "gateway": "tpserve.coordinator.gateway"}
GATEWAY_BACK_WITHIN_S = 40.0
"""It loads a tokenizer and joins the coordinator."""
REASONS = {
    "coordinator": "the coordinator ended with status -9",
    "gcs_server": "Ray has lost its gcs_server: start the server again",
    "raylet": "Ray has lost its raylet: start the server again",
}


def pid_of(server: Server, victim: str) -> int:
    if victim == "launcher":
        return server.process.pid
    if victim in MODULES:
        return server.process_pid(MODULES[victim])
    (pid,) = (process.pid for process in processes_of(server.mark) if process.name() == victim)
    return pid


async def one_stream(server: Server, on_text: Callable[[], None], num_logprobs: int | None = None) -> str:
    """Stream as much as the tiny model can; return how it ended."""
    request = chat_request("Count.", max_tokens=400, n=4, temperature=1, seed=3, logit_bias={"2": -100}, stream=True)
    if num_logprobs is not None:
        request |= {"logprobs": True, "top_logprobs": num_logprobs}
    num_finished = 0
    try:
        async with server.async_client() as client:
            async for chunk in await client.chat.completions.create(**request):
                on_text()
                num_finished += sum(choice.finish_reason is not None for choice in chunk.choices)
    except openai.APIStatusError as error:
        return f"{error.status_code}, retry after {error.response.headers.get('retry-after')} s"
    except (openai.APIConnectionError, httpx.TransportError):
        return "connection refused or cut"
    except openai.APIError as error:
        return f"error event: {error.message}"
    return "complete" if num_finished == 4 else "cut without a word"


@pytest.mark.parametrize("victim", ["launcher", "coordinator", "gcs_server", "raylet"])
async def test_killed_process_ends_the_replica(tiny_folder: Path, tmp_path: Path, victim: str) -> None:
    """kill -9 amid streams: each ends with its text or an error, and `serve` fails naming the culprit."""
    server = Server(tiny_folder, *DUMMY, "--tp", "2", folder=tmp_path)
    try:
        await asyncio.to_thread(server.wait_ready)
        server.footprint.look()
        pid = pid_of(server, victim)
        num_chunks, is_killed = 0, asyncio.Event()

        def kill_amid() -> None:  # at once: the whole stream takes less than a second
            nonlocal num_chunks
            num_chunks += 1
            if num_chunks == 9:
                os.kill(pid, signal.SIGKILL)
                is_killed.set()

        running = asyncio.create_task(one_stream(server, kill_amid))
        await asyncio.wait_for(is_killed.wait(), patient(20))
        patience = Patience(ENDED_WITHIN_S)
        later = []
        while server.process.poll() is None and not patience.is_over():
            later.append(await one_stream(server, lambda: None))
            await asyncio.sleep(0.02)
        seen = await asyncio.wait_for(running, patient(ENDED_WITHIN_S))
        print(f"{victim}: the running stream: {seen}; later ones: {sorted(set(later))}")
        if victim == "launcher":
            await asyncio.to_thread(server.footprint.assert_gone, ENDED_WITHIN_S)
            return
        assert server.process.wait(patient(10)) == 1
        await asyncio.to_thread(server.footprint.assert_gone, GONE_WITHIN_S)
        assert f"tpserve serve: error: {REASONS[victim]}" in server.log, server.log[-3000:]
        assert "Traceback" not in server.log, server.log[-6000:]
        if victim == "gcs_server":
            assert seen == "complete"  # the ranks still live
        elif victim == "coordinator":
            assert seen == "error event: The session with the engine was lost"
        else:  # ranks that miss their raylet end, sooner or later; the coordinator may be gone before it has told
            lost = ("error event: The session with the engine was lost", "complete")
            assert seen in lost or "lost rank" in seen, seen
        # Nobody hangs, and nobody is told that all is well.
        allowed = ("connection refused or cut", "503, retry after 1 s", "error event: ", "complete")
        assert all(outcome.startswith(allowed) for outcome in later), later
    finally:
        server.kill_all()


@pytest.mark.parametrize("num_gateways", [1, 2])
async def test_a_killed_gateway_is_started_again(tiny_folder: Path, tmp_path: Path, num_gateways: int) -> None:
    """kill -9 amid streams: only what went through it is cut, new clients wait, and other doors see nothing."""
    flags = ("--gateway-processes", str(num_gateways))
    server = Server(tiny_folder, *DUMMY, *flags, folder=tmp_path)
    try:
        await asyncio.to_thread(server.wait_ready)
        victim = min(process.pid for process in gateways(server))
        (address,) = re.findall(r"The engine listens at (\S+)", server.log)
        async with AsyncMLCEngine(MODEL_NAME, address=address) as engine:
            beside = asyncio.create_task(other_door(engine))
            # A stream that has no text yet may not be with the victim: it would wait, and be served by the next one.
            num_chunks = [0, 0]
            is_killed = asyncio.Event()

            def kill_amid(stream: int) -> None:
                num_chunks[stream] += 1
                if min(num_chunks) > 4 and not is_killed.is_set():
                    os.kill(victim, signal.SIGKILL)
                    is_killed.set()

            # Sockets hold less than all of their log-probabilities. Of text alone one of the streams may have been sent
            # whole before the other's first chunks are looked at.
            running = [
                asyncio.create_task(one_stream(server, partial(kill_amid, i), num_logprobs=20)) for i in range(2)
            ]
            await asyncio.wait_for(is_killed.wait(), patient(20))
            killed_at = time.monotonic()
            assert not any(stream.done() for stream in running)
            # Nobody is refused: who comes now waits for the next gateway.
            later = await asyncio.wait_for(one_stream(server, lambda: None), patient(GATEWAY_BACK_WITHIN_S))
            print(f"a client that came then was served after {time.monotonic() - killed_at:.1f} s")
            seen = await asyncio.wait_for(asyncio.gather(*running), patient(ENDED_WITHIN_S))
            assert await asyncio.wait_for(beside, patient(ENDED_WITHIN_S)) > 100
        assert later == "complete"
        assert set(seen) <= {"complete", "connection refused or cut"}
        if num_gateways == 1:
            assert set(seen) == {"connection refused or cut"}
        assert "the gateway ended with status -9 and is started again in 0.1 s" in server.log
        assert len(gateways(server)) == num_gateways
        assert victim not in [process.pid for process in gateways(server)]
        code, _ = await asyncio.to_thread(server.health)
        assert code == 200
        assert server.process.poll() is None
        if num_gateways == 1:
            await asyncio.to_thread(kill_until_given_up, server)
    finally:
        server.kill_all()


def kill_until_given_up(server: Server) -> None:
    """Kill each gateway that comes: the server gives up, with the reason."""
    patience = Patience(40)
    while server.process.poll() is None and not patience.is_over():
        for process in gateways(server):
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)
    assert server.process.wait(patient(10)) == 1, server.report("gateways are started for ever")
    assert "tpserve serve: error: the gateway ended with status -9, for the 6th time within 60 s" in server.log
    server.footprint.assert_gone(ENDED_WITHIN_S)


def gateways(server: Server) -> list[psutil.Process]:
    found = []
    for process in processes_of(server.mark):
        with suppress(psutil.Error):
            if process.cmdline()[1:3] == ["-m", MODULES["gateway"]]:
                found.append(process)
    return found


async def other_door(engine: AsyncMLCEngine) -> int:
    """Stream by the engine's own door; return the number of tokens."""
    request = chat_request("Count.", max_tokens=200, temperature=1, seed=3, logit_bias={"2": -100}, stream=True)
    count = 0
    async for _ in await engine.chat.completions.create(**request):
        count += 1
    return count
