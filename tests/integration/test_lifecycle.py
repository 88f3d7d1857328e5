"""How a server comes and goes: what it finds in the cache, what it leaves behind, in order and by force."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from patience import patient
from server import MODEL_NAME, Server, chat_request, json_line, run_cli, until

FLAGS = ("--tp", "2", "--max-num-seqs", "8")
DUMMY = ("--load-format", "dummy", "--max-num-seqs", "4", "--max-num-batched-tokens", "64")
"""Random weights and few sequences."""


@pytest.fixture
def server(demo_model: Path, tmp_path: Path) -> Iterator[Server]:
    """A server of the demo model that the test ends in its own way."""
    compiled = run_cli("compile", demo_model, *FLAGS, "--max-num-batched-tokens", "256", folder=tmp_path)
    assert compiled.code == 0, compiled.stderr
    # A proxy that does not work: nothing between processes of one machine may go through it.
    proxy = {"http_proxy": "http://127.0.0.1:9", "grpc_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    started = Server(demo_model, *FLAGS, "--drain-timeout", "240", folder=tmp_path, environ=proxy)
    try:
        started.wait_ready()
        yield started
    finally:
        started.kill_all()


async def stream_text(
    client: openai.AsyncOpenAI, seed: int, on_chunk: Callable[[], None], max_tokens: int
) -> tuple[str, str | None]:
    """Stream an answer to its end; return the text and why it ended."""
    text, finish = "", None
    options = {"max_tokens": max_tokens, "temperature": 1, "seed": seed, "logit_bias": {"2": -100}}
    request = chat_request("Tell me a long story.", **options)
    async for chunk in await client.chat.completions.create(**request, stream=True):
        on_chunk()
        text += chunk.choices[0].delta.content or ""
        finish = chunk.choices[0].finish_reason or finish
    return text, finish


async def test_streams_that_outlast_the_grace_are_told(tiny_folder: Path, tmp_path: Path) -> None:
    server = Server(tiny_folder, *DUMMY, "--tp", "2", "--drain-timeout", "0.1", folder=tmp_path)
    try:
        await asyncio.to_thread(server.wait_ready)
        async with server.async_client() as client:
            request = chat_request("Count.", max_tokens=400, n=4, temperature=1, logit_bias={"2": -100})
            stream = await client.chat.completions.create(**request, stream=True)
            await anext(stream.__aiter__())
            server.process.terminate()
            with pytest.raises(openai.APIError, match="The server is shutting down"):
                async for _ in stream:
                    pass
        assert await asyncio.to_thread(server.process.wait, patient(20)) == 0
        server.footprint.assert_gone(within_s=1)
    finally:
        server.kill_all()


def refuses_connections(server: Server) -> bool:
    try:
        httpx.get(f"{server.url}/health")
    except httpx.TransportError:
        return True
    return False


async def test_sigterm_lets_streams_finish_and_leaves_nothing(server: Server) -> None:
    """Each stream has most of its text before it. Ctrl-C does the same: so ends every other server of these tests."""
    num_chunks, max_tokens = [0] * 4, 100

    def count(seed: int) -> None:
        num_chunks[seed] += 1

    async with server.async_client() as client:
        expected = await asyncio.gather(*(stream_text(client, seed, lambda: None, max_tokens) for seed in range(4)))
        tasks = [asyncio.create_task(stream_text(client, seed, partial(count, seed), max_tokens)) for seed in range(4)]
        await asyncio.to_thread(until, lambda: min(num_chunks) > 2, within_s=20, what="streams")
        server.footprint.look()
        server.process.terminate()
        await asyncio.to_thread(until, lambda: "draining 4 requests" in server.log, within_s=10, what="draining")
        await asyncio.to_thread(until, lambda: refuses_connections(server), within_s=10, what="a closed door")
        assert await asyncio.gather(*tasks) == expected
    assert await asyncio.to_thread(server.process.wait, patient(20)) == 0
    server.footprint.assert_gone(within_s=1)
    assert "Traceback" not in server.log
    assert "Using cached model: " in server.log
    assert "Using cached lib: " in server.log
    assert "Compiling" not in server.log


@pytest.mark.parametrize(
    ("signum", "milestone"),
    [
        (signal.SIGINT, "Compiling"),
        (signal.SIGINT, "Estimated total"),
        (signal.SIGINT, "The engine listens at"),  # and the gateway is on its way
        (signal.SIGKILL, "Compiling"),
        (signal.SIGKILL, "Estimated total"),
    ],
)
def test_stopped_while_it_starts(tiny_folder: Path, tmp_path: Path, signum: signal.Signals, milestone: str) -> None:
    policy = "REDO" if milestone == "Compiling" else "ON"
    server = Server(tiny_folder, *DUMMY, "--tp", "2", "--jit-policy", policy, folder=tmp_path)
    try:
        until(lambda: milestone in server.log, within_s=60, what=milestone)
        server.footprint.look()
        os.killpg(server.process.pid, signum)
        server.footprint.assert_gone(within_s=20)
        assert "Traceback" not in server.log
        assert "Ready at" not in server.log
    finally:
        server.kill_all()


def test_a_library_that_is_given_brings_its_sizes(tiny_folder: Path, tmp_path: Path) -> None:
    """What `tpserve compile` makes, `tpserve serve` takes, without a word about sizes; what it is told must fit."""
    dummy = ("--load-format", "dummy")
    compiled = run_cli("compile", tiny_folder, *dummy, "--max-num-seqs", "6", folder=tmp_path)
    library = ("--model-lib", json_line(compiled.stdout)["artifact_dir"])
    refused = run_cli("serve", tiny_folder, *dummy, *library, "--max-num-batched-tokens", "64", folder=tmp_path)
    assert "max_num_batched_tokens is 256 in the library and 64 in the configuration" in refused.stderr
    with Server.running(tiny_folder, *dummy, *library, folder=tmp_path) as server, server.client() as client:
        assert client.chat.completions.create(**chat_request("Count.", max_tokens=2)).choices
        assert "max batch size will be set to 6" in server.log
        assert "Compiling" not in server.log


def test_served_names_keys_and_a_folder_as_model(demo_folder: Path, tmp_path: Path) -> None:
    flags = ("--served-model-name", MODEL_NAME, "alias", "--api-key", "secret", "--mode", "interactive")
    with Server.running(demo_folder, *flags, folder=tmp_path) as server, server.client() as client:
        assert [model.id for model in client.models.list()] == [MODEL_NAME, "alias"]
        for name in (MODEL_NAME, "alias"):
            reply = client.chat.completions.create(**chat_request("What is the capital of France?") | {"model": name})
            assert reply.model == name
            assert reply.choices[0].message.content == "The capital of France is Paris."
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()
        assert "max batch size will be set to 1" in server.log


def test_random_weights_serve_without_a_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    with Server.running(tiny_folder, *DUMMY, "--tp", "4", "--host", "::1", folder=tmp_path) as server:
        assert f"Ready at http://[::1]:{server.port}" in server.log
        with openai.OpenAI(base_url=f"http://[::1]:{server.port}/v1", api_key="none", max_retries=0) as client:
            replies = [client.chat.completions.create(**chat_request("Hi", max_tokens=8)) for _ in range(2)]
        assert replies[0].choices[0].message.content == replies[1].choices[0].message.content
        assert replies[0].usage is not None
        assert replies[0].usage.completion_tokens == 8
        niceness = [psutil.Process(pid).nice() for pid in server.rank_pids().values()]
        assert niceness == [os.nice(0)] * 4, "ranks come after every other process of the host, unless Ray is told"


@pytest.fixture
def home(tiny_folder: Path, tmp_path: Path, cache_home: Path) -> Path:
    """A cache with nothing but kernels, which do not depend on the model: building them again would only take time."""
    run_cli("compile", tiny_folder, *DUMMY, folder=tmp_path)
    shutil.copytree(cache_home / "kernels", tmp_path / "home/kernels")
    return tmp_path / "home"


def test_row_26_cache_policies(tiny_folder: Path, tmp_path: Path, home: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environ = {"TPSERVE_HOME": str(home), "TMPDIR": str(scratch)}

    def compiled(policy: str) -> tuple[Path, str]:
        outcome = run_cli("compile", tiny_folder, *DUMMY, "--jit-policy", policy, folder=tmp_path, environ=environ)
        assert outcome.code == 0, outcome.stderr
        return Path(json_line(outcome.stdout)["artifact_dir"]), outcome.stderr

    refused = run_cli("serve", tiny_folder, *DUMMY, "--jit-policy", "READONLY", folder=tmp_path, environ=environ)
    assert "is not in the cache and the cache policy is READONLY" in refused.only_error()
    first, log = compiled("ON")
    assert "Compiling" in log
    written = (first / "manifest.json").stat().st_mtime_ns
    second, log = compiled("ON")
    assert second == first
    assert f"Using cached lib: {first}" in log
    assert "Compiling" not in log
    assert compiled("READONLY")[0] == first
    assert (first / "manifest.json").stat().st_mtime_ns == written
    assert compiled("REDO")[0] == first
    assert (first / "manifest.json").stat().st_mtime_ns > written
    assert sorted(path.name for path in (home / "lib").iterdir()) == [first.name]


def test_row_26_policy_off_keeps_nothing(tiny_folder: Path, tmp_path: Path, home: Path) -> None:
    """`test_artifact.py` has it without kernels."""
    before, scratch = sorted(home.rglob("*")), tmp_path / "scratch"
    scratch.mkdir()
    environ = {"TPSERVE_HOME": str(home), "TMPDIR": str(scratch)}
    with Server.running(tiny_folder, *DUMMY, "--jit-policy", "OFF", folder=tmp_path, environ=environ) as server:
        assert list(scratch.iterdir())
        assert server.health()[0] == 200
    assert not list(scratch.iterdir())
    assert sorted(home.rglob("*")) == before


def test_convert_alone(demo_folder: Path, demo_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    converted = run_cli("convert", demo_model, "--output", folder, folder=tmp_path)
    assert converted.code == 0, converted.stderr
    assert json_line(converted.stdout) == {"model_dir": str(folder)}
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert names == {path.name for path in demo_folder.iterdir()}, "what a server makes of it itself"
    assert all((folder / name).read_bytes() == (demo_folder / name).read_bytes() for name in names)
    again = run_cli("convert", demo_model, "--output", folder, folder=tmp_path)
    assert "is not an empty folder" in again.only_error()
    missing = run_cli("convert", tmp_path / "none.gguf", "--output", tmp_path / "out", folder=tmp_path)
    assert "none.gguf" in missing.only_error()


def test_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    """One line, soon: no retries for minutes."""
    environ = {"TPSERVE_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    outcome = run_cli("serve", "HF://org/name", folder=tmp_path, environ=environ, within_s=60)
    assert "cannot download org/name" in outcome.only_error()
    assert outcome.duration_s < patient(20)
    offline = run_cli("serve", "HF://org/name", "--download-cache-policy", "READONLY", folder=tmp_path, environ=environ)
    assert "the download policy is READONLY" in offline.only_error()
    assert "HF://org/name" in run_cli("serve", "HF://not a name", folder=tmp_path, environ=environ).only_error()
