"""What of a model is looked at before anything is compiled."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tpserve.coordinator.children import ServeError
from tpserve.coordinator.engine_choice import EngineChoice
from tpserve.coordinator.model_build import ModelBuild
from tpserve.coordinator.serve_arguments import add_arguments

CHOICE = EngineChoice(False, 1 << 30, None, 4, 256, None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def make_build(monkeypatch: pytest.MonkeyPatch, *flags: str) -> ModelBuild:
    """Return a build whose compiler finds every folder, and no library."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    build = ModelBuild(parser.parse_args(flags), [], lambda: False)

    def run(command: str, model: str, flags: list[str]) -> dict[str, str]:
        assert command == "compile"
        assert "--dry-run" in flags, "it was compiled"
        return {"model_dir": model}

    monkeypatch.setattr(build, "_run", run)
    return build


def test_a_model_without_a_chat_template_is_served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_build(monkeypatch, str(folder)).look(CHOICE) == (CHOICE, {"model_dir": str(folder)})


def test_texts_are_looked_at_where_they_are_read_with_the_models_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "chat_template.jinja").write_text("{% if %}")
    for flags in ((), ("--no-gateway", "--parent-pid", "1")):
        with pytest.raises(ServeError, match=r"chat_template\.jinja: the chat template does not compile"):
            make_build(monkeypatch, str(folder), *flags).look(CHOICE)
    make_build(monkeypatch, str(folder), "--no-gateway").look(CHOICE)  # whose gateways may have other files


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("generation_config.json", "{", "generation_config.json cannot be read"),
        (
            "generation_config.json",
            '{"temperature": 5}',
            r"generation_config.json: temperature is 5: it must lie in \[0, 2\]",
        ),
        ("generation_config.json", '{"eos_token_id": "x"}', "generation_config.json: eos_token_id is 'x'"),
        ("config.json", '{"eos_token_id": [-1]}', r"config.json: eos_token_id is \[-1\]"),
    ],
)
def test_what_sampling_begins_and_ends_with_is_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, told: str
) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ServeError, match=told):
        make_build(monkeypatch, str(folder)).look(CHOICE)
