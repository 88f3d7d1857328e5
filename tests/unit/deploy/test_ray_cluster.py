"""`deploy/ray/cluster.yaml` is what Ray's cluster launcher takes, and starts Ray by flags that there are."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from scripts import ROOT

CLUSTER = ROOT / "deploy/ray/cluster.yaml"


def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(CLUSTER.read_text())
    return loaded


def test_ray_takes_it() -> None:
    prepared = prepare_config(config())
    validate_config(prepared)
    (node_type,) = prepared["available_node_types"].values()
    num_workers = len(config()["provider"]["worker_ips"])
    assert node_type["min_workers"] == node_type["max_workers"] == num_workers, "no machine leaves for being idle"


def test_the_schema_refuses_what_it_does_not_know() -> None:
    with pytest.raises(jsonschema.ValidationError, match="worker_start_commands"):
        validate_config(prepare_config(config() | {"worker_start_commands": []}))


@pytest.mark.parametrize("role", ["head", "worker"])
def test_ray_is_started_by_its_own_flags(role: str) -> None:
    stop, command = config()[f"{role}_start_ray_commands"]
    words = shlex.split(command)
    at = words.index("start")
    assert [Path(word).name for word in (stop.split()[0], words[at - 1])] == ["ray", "ray"]
    known = {name for parameter in start.params for name in (*parameter.opts, *parameter.secondary_opts)}
    flags = {word.partition("=")[0] for word in words[at + 1 :]}
    assert flags <= known, flags - known
    assert ("--head" in flags) == (role == "head")
    assert "RAY_AUTH_MODE=token" in words, "everybody else could run code on the nodes"
    assert "RAY_worker_niceness=0" in words, "ranks would come after all other processes of their node"


def test_each_machine_is_examined_by_a_command_that_there_is() -> None:
    (doctor,) = (command for command in config()["setup_commands"] if "doctor" in command)
    words = shlex.split(doctor, comments=True)
    assert Path(words[0]).name == "tpserve"
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "deploy/python")}
    done = subprocess.run(
        [sys.executable, "-m", "tpserve.cli", *words[1:], "--device", "cpu"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout
