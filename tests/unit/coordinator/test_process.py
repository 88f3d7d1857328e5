"""What is left of a child's session is ended with it, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tpserve.coordinator.process import kill_session

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
