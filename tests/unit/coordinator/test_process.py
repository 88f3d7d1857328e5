"""Processes that start, hold ports and end: nothing else is touched, and what was cut off says so."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tpserve.coordinator.process import bind, kill_session

LEADER = """
import subprocess, sys, time
left, other = (subprocess.Popen(["sleep", "60"], start_new_session=own).pid for own in (False, True))
print(left, other, flush=True)
time.sleep(60)
"""


def runs(pid: int) -> bool:
    """Whether a process is there that has not ended: an orphan may wait to be buried."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_what_a_killed_leader_left_is_killed_and_other_sessions_are_not() -> None:
    leader = subprocess.Popen([sys.executable, "-c", LEADER], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert leader.stdout is not None
    with leader.stdout:
        left, other = map(int, leader.stdout.readline().split())
    try:
        leader.kill()
        leader.wait(10)
        assert runs(left)
        kill_session(leader.pid)
        deadline = time.monotonic() + 10
        while runs(left):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert runs(other)
    finally:
        os.kill(other, signal.SIGKILL)


def test_the_caller_is_spared() -> None:
    code = "import os; from tpserve.coordinator.process import kill_session; kill_session(os.getpid()); print('here')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True, timeout=30
    )
    assert done.stdout == "here\n", done.stderr


def test_a_coordinator_whose_parent_was_killed_while_it_wrote_ends_with_a_line() -> None:
    command = [sys.executable, "-m", "tpserve.coordinator", "-"]
    done = subprocess.run(command, input='{"host": "127.0', capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the configuration of the coordinator is cut off or no JSON: ")
    assert done.stderr.count("\n") == 1


def test_who_holds_a_port_lets_another_listen_there() -> None:
    with bind("127.0.0.1", 0) as held, bind("127.0.0.1", held.getsockname()[1]) as listening:
        listening.listen()
        with socket.create_connection(held.getsockname(), timeout=10) as client, listening.accept()[0] as served:
            served.sendall(b"here")
            assert client.recv(4) == b"here"
