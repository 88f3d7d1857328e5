"""Many clients that come, stream and hang up: nothing fails and nothing is left. A short form of the benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from patience import SlownessMeter, patient
from server import REPOSITORY, environment

MAX_CPU_US_PER_TOKEN = 250
"""Four times the target: short answers carry the cost of their connections."""


def test_nothing_fails_and_nothing_is_left(tiny_folder: Path, tmp_path: Path) -> None:
    script = REPOSITORY / "benchmarks/gateway_load.py"
    command = [sys.executable, str(script), str(tiny_folder), "--clients", "128", "--seconds", "5"]
    command += ["--gateway-processes", "2", "--long-seconds", "0"]
    with SlownessMeter() as slowness:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment("load"), capture_output=True, text=True, timeout=patient(180)
        )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = json.loads(done.stdout)["runs"]
    seen = run["mixed"]
    assert seen["finished"] >= 64
    assert seen["hung_up"] > 10
    assert min(seen["gateway_cpu_share_by_process"]) > 0  # both work
    assert seen["gateway_cpu_us_per_token"] < slowness.most * MAX_CPU_US_PER_TOKEN
