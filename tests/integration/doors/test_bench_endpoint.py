"""`bench-tp` against a server that runs already."""

from __future__ import annotations

import json
from pathlib import Path

from server import Server, run_cli


def test_a_running_endpoint(server: Server, tmp_path: Path) -> None:
    results = tmp_path / "results"
    counted = server.metric("request_time_per_output_token_seconds_count")
    arguments = ["--base-url", server.url, "--request-rate", "4", "--num-gpus", "2", "--no-chart"]
    arguments += ["--dataset", "fixed", "--input-len", "16", "--output-len", "12", "--num-requests", "3"]
    outcome = run_cli("bench", *arguments, "--output-dir", results, folder=tmp_path)
    assert outcome.code == 0, outcome.stdout + outcome.stderr
    (point,) = json.loads((results / "results.json").read_text())["points"]
    assert point["metrics"]["num_succeeded"] == 3
    assert server.metric("request_time_per_output_token_seconds_count") >= counted + 3
    assert (point["configuration"]["num_gpus"], point["request_rate"]) == (2, 4.0)
    assert not (results / "chart.png").exists()
