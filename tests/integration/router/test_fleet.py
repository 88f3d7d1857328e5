"""What `tpserve serve --replicas` does when parts of itself end, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import psutil

from patience import patient
from server import Server, chat_text, processes_of, run_cli, until

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


def test_a_model_that_is_not_there_is_told_once(tmp_path: Path) -> None:
    outcome = run_cli("serve", tmp_path / "nothing", "--replicas", "2", "--port", "0", folder=tmp_path)
    assert "nothing" in outcome.only_error()
