from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from shared_cache import new_home
from tpserve.compile.cache import CachePolicy
from tpserve.compile.source import resolve_model

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy is imported; see tests/unit/conftest.py

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
"""Shape of a model that starts fast."""


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the whole session; TPSERVE_HOME if it is set."""
    if "TPSERVE_HOME" not in os.environ:
        os.environ["TPSERVE_HOME"] = str(new_home(tmp_path_factory.mktemp("home")))
    return Path(os.environ["TPSERVE_HOME"])


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The GGUF file of the demo model."""
    value = os.environ.get("TPSERVE_DEMO_MODEL")
    assert value, "set TPSERVE_DEMO_MODEL to the file that deploy/fetch_demo_model.py prints"
    path = Path(value)
    assert path.is_file(), f"TPSERVE_DEMO_MODEL is {value}, which is not a file"
    return path.resolve()


@pytest.fixture(scope="session")
def demo_folder(demo_model: Path, cache_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a Hugging Face folder, which no other session has."""
    converted = resolve_model(str(demo_model), model_policy=CachePolicy.ON, download_policy=CachePolicy.ON)
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(converted, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model without weights: the demo model's text side on a small graph."""
    folder = tmp_path_factory.mktemp("tiny")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).symlink_to(demo_folder / name)
    config = json.loads((demo_folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | TINY))
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with random weights in a file, for whoever cannot be told to make some up."""
    from tiny_models import TinyModel  # which imports numpy

    folder = tmp_path_factory.mktemp("tiny_checkpoint")
    shutil.copytree(tiny_folder, folder, symlinks=True, dirs_exist_ok=True)
    TinyModel("tiny", json.loads((tiny_folder / "config.json").read_text())).write(folder)
    return folder
