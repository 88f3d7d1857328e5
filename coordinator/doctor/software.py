"""Checks of Python, of the libraries that were tested together, of the compiler, and of a Ray cluster to join."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from tpserve.coordinator.doctor.findings import Finding, Wanted
from tpserve.coordinator.errors import ClusterError

_MIN_PYTHON = (3, 11)
_ROOT = Path(__file__).resolve().parents[2]
"""Of a source tree, which has the lock; an installed package has what it requires in its metadata."""


def check_python(wanted: Wanted) -> Iterator[Finding]:
    """See that Python is new enough, and libraries are those that a release was tested with."""
    text = platform.python_version()
    if sys.version_info < _MIN_PYTHON:
        yield Finding("python", "fail", text, f"install Python {_MIN_PYTHON[0]}.{_MIN_PYTHON[1]} or newer")
    else:
        yield Finding("python", "ok", text)
    yield from check_libraries(_required(), _ROOT / "requirements.lock")


def check_libraries(required: list[Requirement], lock: Path) -> Iterator[Finding]:
    """Compare what is installed with what is required (a difference fails) and with the lock (it warns)."""
    wrong, missing = [], []
    for requirement in required:
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            missing.append(requirement.name)
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} is {installed}, {requirement.specifier} is needed")
    if missing or wrong:
        found = "; ".join([*(f"{name} is missing" for name in missing), *wrong])
        yield Finding("libraries", "fail", found, "pip install tpserve again, in an environment of its own")
        return
    names = {requirement.name for requirement in required}
    tested = {name: tested for name, tested in _locked(lock) if name in names}
    differing = [f"{name} is {version(name)}, tested {at}" for name, at in tested.items() if version(name) != at]
    if differing:
        yield Finding("libraries", "warn", "; ".join(differing), "pip install -c requirements.lock tpserve")
    else:
        yield Finding("libraries", "ok", f"{len(required)} as required")


def check_compiler(wanted: Wanted) -> Iterator[Finding]:
    """See that libraries for this CPU can be compiled, unless they come ready."""
    if wanted.model_lib is not None or wanted.device == "cuda":
        return
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        yield Finding("compiler", "warn", "no g++", "apt-get install g++, or give --model-lib a library made elsewhere")
    else:
        yield Finding("compiler", "ok", compiler)


def check_ray(wanted: Wanted) -> Iterator[Finding]:
    """See that a cluster that was named can be joined from here."""
    if wanted.ray_address is None:
        return
    from tpserve.coordinator.ray_nodes import find_own_node  # Ray takes a second to load

    try:
        head, own = find_own_node(wanted.ray_address)
    except ClusterError as error:
        yield Finding(
            "ray", "fail", str(error), "start Ray on this host, and give it the cluster's token if it has one"
        )
    else:
        yield Finding("ray", "ok", f"{own} is a node of {head}")


def _required() -> list[Requirement]:
    try:
        lines = requires("tpserve") or []
    except PackageNotFoundError:
        return []
    found = [Requirement(line) for line in lines]
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def _locked(lock: Path) -> Iterator[tuple[str, str]]:
    if lock.is_file():
        for line in lock.read_text().splitlines():
            name, equal, tested = line.partition("==")
            if equal and not line.startswith("#"):
                yield name.strip(), tested.split(";")[0].strip()
