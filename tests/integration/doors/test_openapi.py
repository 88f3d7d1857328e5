"""Requests made from the OpenAPI document, good and bad ones, against the real server: answers are as it says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from patience import patient
from server import Server

CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
CONFIG = """
[[operations]]
include-path = "/v1/models/{name}"
parameters = { name = "demo" }
"""


@pytest.fixture(scope="module")
def short_server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A small model of random weights, whose answers end soon."""
    flags = ("--load-format", "dummy", "--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--max-model-len", "64")
    with Server.running(tiny_folder, *flags, folder=tmp_path_factory.mktemp("openapi")) as running:
        yield running


def test_answers_are_as_the_document_says(short_server: Server, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{short_server.url}/openapi.json"]
    command += ["--max-examples", "10", "--seed", "1", "--phases", "coverage,fuzzing", "--checks", ",".join(CHECKS)]
    command += ["--request-timeout", "60", "--no-color"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=patient(300))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Traceback" not in short_server.log
    assert short_server.metric("num_requests_running") == 0
