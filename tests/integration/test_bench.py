"""`bench-tp` as a user runs it: starts the real server at two TP degrees, measures, writes, and leaves nothing."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import uuid
from pathlib import Path

import pytest

from patience import patient
from server import Footprint, command, environment, run_cli, until

SHORT = ("--dataset", "fixed", "--input-len", "16", "--output-len", "12", "--num-requests", "3")


def test_two_degrees(tiny_checkpoint: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    outcome = run_cli(
        "bench",
        tiny_checkpoint,
        "--tp",
        "1,2",
        "--concurrency",
        "1,2",
        *SHORT,
        "--output-dir",
        results,
        folder=tmp_path,
    )
    assert outcome.code == 0, outcome.stdout + outcome.stderr
    names = {"results.json", "results.csv", "report.txt", "chart.png", "chart.svg"}
    assert {path.name for path in results.iterdir()} == names | {"server-TP=1.log", "server-TP=2.log"}
    assert outcome.stdout.count("Serving Benchmark Result") == 4
    assert "Least time per output token: " in outcome.stdout

    parsed = json.loads((results / "results.json").read_text())
    assert parsed["versions"]["python"]
    assert parsed["arguments"]["tp"] == [1, 2]
    points = parsed["points"]
    assert [(point["configuration"]["tp"], point["concurrency"]) for point in points] == [
        (1, 1),
        (1, 2),
        (2, 1),
        (2, 2),
    ]
    for point in points:
        metrics = point["metrics"]
        assert (metrics["num_succeeded"], metrics["num_failed"], metrics["num_first_chunk_assumed"]) == (3, 0, 0)
        assert metrics["num_cached_tokens"] == 0
        assert 0 < metrics["tpot_s"]["mean"] < metrics["e2el_s"]["mean"] / 11
        for _, prompt_tokens, output_tokens, first, ttft_s, tpot_s, e2el_s, error in point["requests"]:
            assert (prompt_tokens, output_tokens, error) == (16, 12, None)
            assert ttft_s + tpot_s * (output_tokens - first) == pytest.approx(e2el_s, abs=1e-5)
    with (results / "results.csv").open(newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["TP=1", "TP=1", "TP=2", "TP=2"]


def test_ctrl_c_stops_the_server_that_it_started(tiny_checkpoint: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    mark = uuid.uuid4().hex
    footprint = Footprint(mark)
    many = ("--dataset", "fixed", "--input-len", "16", "--output-len", "50", "--num-requests", "1000")
    arguments = ("bench", tiny_checkpoint, "--concurrency", "1", *many, "--output-dir", results)
    with subprocess.Popen(
        command(*arguments), env=environment(mark), cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL
    ) as process:
        log = results / "server-TP=1.log"
        until(lambda: log.exists() and "Ready at" in log.read_text(), within_s=120, what="ready")
        until(lambda: log.read_text().count("POST /v1/completions") >= 4, within_s=60, what="a measured request")
        footprint.look()
        process.send_signal(signal.SIGINT)
        assert process.wait(patient(60)) == 130
    footprint.assert_gone(within_s=2)
    (point,) = json.loads((results / "results.json").read_text())["points"]
    assert not point["complete"]
    assert point["metrics"]["num_succeeded"] >= 1


def test_a_server_that_cannot_start_is_told_in_one_line(tmp_path: Path) -> None:
    outcome = run_cli("bench", "nowhere.gguf", "--output-dir", "results", "--no-chart", folder=tmp_path)
    assert outcome.code == 1
    assert "TP=1: the server ended: model 'nowhere.gguf' does not exist" in outcome.stdout
    assert "Traceback" not in outcome.stdout + outcome.stderr
