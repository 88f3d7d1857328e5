"""What can be said of images without building them: nothing is unpinned, nobody is root, what is copied is there."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import yaml

from scripts import ROOT
from tpserve.coordinator.serve_arguments import add_arguments

DOCKERFILES = sorted((ROOT / "deploy/docker").glob("*.Dockerfile"))
FOLDERS = {"collectives", "compile", "coordinator", "proto", "worker"}


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return (instruction, arguments) pairs, continued lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_images_are_pinned_unprivileged_and_complete(path: Path) -> None:
    steps = instructions(path)
    bases = [value.partition("=")[2] for name, value in steps if name == "ARG"]
    assert bases
    for base in bases:
        assert re.search(r":\d+\.\d+\.\d+\S*$", base), f"{base} is not a fixed version"
    copied = {
        source for name, value in steps if name == "COPY" and "--from" not in value for source in value.split()[:-1]
    }
    assert all((ROOT / source).exists() for source in copied), copied
    assert copied >= FOLDERS | {"pyproject.toml", "requirements.lock", "deploy/python"}
    installs = [part for name, value in steps if name == "RUN" for part in value.split("&&") if "pip install" in part]
    assert any("-c requirements.lock" in part for part in installs)
    # Each stage that is an image of its own ends as nobody in particular.
    stages: list[list[tuple[str, str]]] = []
    for step in steps:
        if step[0] == "FROM":
            stages.append([])
        if stages:
            stages[-1].append(step)
    images = [dict(stage) for stage in stages if any(name == "ENTRYPOINT" for name, _ in stage)]
    assert images
    for image in images:
        assert image["USER"] == "10001"
        assert image["ENTRYPOINT"] == '["tpserve"]'


def test_compose_serves_with_flags_that_exist_and_reaches_only_this_machine() -> None:
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    serve = compose["services"]["tpserve"]
    command = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", part) for part in serve["command"]]
    args = parser.parse_args(command[1:])
    assert (args.host, args.tp) == ("0.0.0.0", 1)
    assert serve["read_only"]
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert not service.get("image", "").endswith(":latest")
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert (ROOT / "deploy/prometheus" / config["rule_files"][0]).is_file()
    assert config["scrape_configs"][0]["static_configs"][0]["targets"] == [f"tpserve:{args.port}"]
