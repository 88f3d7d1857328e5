from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rank_group import Artifacts, RankProcesses
from tpserve.compile.gguf import convert_gguf

GOLDENS = Path(__file__).parents[2] / "goldens"


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return Artifacts(tmp_path_factory.getbasetemp() / "artifacts")


@pytest.fixture(scope="session")
def rank_processes() -> Iterator[RankProcesses]:
    processes = RankProcesses()
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def demo_golden() -> dict[str, Any]:
    golden: dict[str, Any] = json.loads((GOLDENS / "smollm2.json").read_text())
    return golden


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as our converter writes it."""
    source = os.environ.get("TPSERVE_DEMO_MODEL")
    assert source, "TPSERVE_DEMO_MODEL is not set: `make integration` sets it to the demo model's GGUF file"
    folder = tmp_path_factory.mktemp("demo")
    convert_gguf(Path(source), folder, lambda done, total: None)
    return folder
