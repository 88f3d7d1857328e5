"""What `tpserve serve --replicas` does when parts of itself end, and that nothing is left behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import httpx
import psutil
import pytest

from patience import patient
from server import Outcome, Server, chat_text, processes_of, run_cli, until

FLAGS = ("--replicas", "2", "--load-format", "dummy", "--max-num-seqs", "4", "--max-num-batched-tokens", "64")
ENDED_WITHIN_S = 60.0


def router_of(server: Server) -> psutil.Process:
    (found,) = (process for process in processes_of(server.mark) if "router" in process.cmdline()[:4])
    return found


def answers(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/health/ready", timeout=patient(5)).status_code == 200
    except httpx.TransportError:
        return False


def test_the_router_is_started_again_and_ray_is_not(tiny_folder: Path, tmp_path: Path) -> None:
    server = Server(tiny_folder, *FLAGS, folder=tmp_path)
    try:
        server.wait_ready()
        first = router_of(server)
        first.kill()
        until(lambda: answers(server), within_s=30, what="the door is open again")
        assert router_of(server).pid != first.pid
        with server.client() as client:
            assert isinstance(chat_text(client, "Hello", max_tokens=4), str)
        (raylet,) = (process for process in processes_of(server.mark) if process.name() == "raylet")
        server.footprint.look()
        (agent,) = (process for process in raylet.children() if process.name() == "ray::RuntimeEnvAgent")
        agent.suspend()  # it would leave by itself, some time
        raylet.kill()
        assert server.process.wait(patient(ENDED_WITHIN_S)) == 1, server.report("the exit code")
        assert "tpserve serve: error: Ray has lost its raylet: start the server again" in server.log
        server.footprint.assert_gone(within_s=5)
        assert not agent.is_running(), "its title has overwritten the mark by which processes are found"
    finally:
        server.kill_all()


def test_all_end_with_the_launcher(tiny_folder: Path, tmp_path: Path) -> None:
    server = Server(tiny_folder, *FLAGS, folder=tmp_path)
    try:
        server.wait_ready()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(patient(10))
        until(lambda: not processes_of(server.mark), within_s=ENDED_WITHIN_S, what="every process has ended")
    finally:
        server.kill_all()


def broken(kind: str, tiny_folder: Path, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Return a model that cannot be served, and flags."""
    model = folder / "model"
    if kind == "no model":
        return model, ()
    shutil.copytree(tiny_folder, model)
    if kind == "no tokenizer":
        (model / "tokenizer.json").unlink()
    elif kind == "another engine's":
        (model / "config.json").write_text('{"model_type": "mamba"}')
    else:
        draft = Path(shutil.copytree(tiny_folder, folder / "draft"))
        (draft / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
        return model, ("--draft-model", str(draft))
    return model, ()


@pytest.mark.parametrize("kind", ["no model", "no tokenizer", "another engine's", "another family's draft"])
def test_a_model_that_cannot_be_served_is_told_before_anything_is_started(
    tiny_folder: Path, tmp_path: Path, kind: str
) -> None:
    """In the words of a single replica."""
    model, flags = broken(kind, tiny_folder, tmp_path)

    def outcome(*more: str) -> Outcome:
        environ = {"TPSERVE_HOME": str(tmp_path / "home")}
        return run_cli(
            "serve", model, "--load-format", "dummy", "--port", "0", *flags, *more, folder=tmp_path, environ=environ
        )

    one, two = outcome(), outcome("--replicas", "2")
    told, again = (re.sub(r"^\d\S+ \S+ ", "", each.only_error()) for each in (one, two))
    assert again == told
    assert two.code == one.code == 1
    assert "replica 0" not in two.stderr, "it is started when Ray and the router are"
    assert not list((tmp_path / "home").glob("lib/[!.]*"))
