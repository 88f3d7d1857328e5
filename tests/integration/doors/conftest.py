"""One server for the tests of every door, with the address of its engine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from server import MODEL_NAME, Server

ORIGIN = "http://app.example"
ALIAS = "gpt-4"
"""A second name of the model, which programs written for another server may use."""


@pytest.fixture(scope="package")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("doors")
    flags = ("--tp", "2", "--max-num-seqs", "8", "--allow-origins", ORIGIN, "--served-model-name", MODEL_NAME, ALIAS)
    with Server.running(demo_model, *flags, folder=folder) as running:
        yield running


@pytest.fixture(scope="package")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as opened:
        yield opened


@pytest.fixture(scope="package")
def engine_address(server: Server) -> str:
    (address,) = re.findall(r"The engine listens at (\S+)", server.log)
    return str(address)
