"""Several gateway processes: whichever is asked tells the counts of all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tpserve
from tpserve.coordinator.gateway.metrics import MULTIPROCESS_DIR

PROGRAM = """
import sys
from tpserve.coordinator.gateway.metrics import HttpMetrics
metrics = HttpMetrics()
for _ in range(int(sys.argv[1])):
    metrics.begin("/v1/models")
    metrics.end("/v1/models", 200, 0.01)
metrics.begin("/v1/completions")
print("up" if sys.argv[2] == "up" else "", flush=True)
sys.stdin.readline()
print(metrics.render("engine_metric 1\\n" if sys.argv[2] == "up" else None))
"""


def test_counts_of_all_processes_are_one(tmp_path: Path) -> None:
    environ = {MULTIPROCESS_DIR: str(tmp_path), "PYTHONPATH": str(Path(tpserve.__path__[0]).parent)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, count, state],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for count, state in (("3", "down"), ("4", "up"))
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()  # both have counted
    text, _ = processes[1].communicate("\n", timeout=20)
    processes[0].communicate("\n", timeout=20)
    assert 'tpserve_http_requests_total{code="200",route="/v1/models"} 7.0' in text
    assert 'tpserve_http_request_duration_seconds_count{route="/v1/models"} 7.0' in text
    assert 'tpserve_http_requests_in_flight{route="/v1/completions"} 2.0' in text
    assert "tpserve_gateway_engine_up 1.0" in text
    assert text.startswith("engine_metric 1\n")
    assert "pid" not in text
