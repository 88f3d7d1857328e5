"""Checks of Python, of the libraries that were tested together, of the compiler, and of a Ray cluster to join."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from tpserve.coordinator.children import ray_environment
from tpserve.coordinator.doctor.findings import Finding, Wanted
from tpserve.coordinator.errors import ClusterError
from tpserve.coordinator.node_memory import NodeMemory, bytes_of_rank, read_nodes

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
    """See that a cluster that was named can be joined from here, and has a place for every rank."""
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
        try:
            nodes = read_nodes(wanted.ray_address, os.environ | ray_environment(wanted.ray_address))
        except ClusterError as error:
            yield Finding("ray-places", "fail", str(error), "see by `ray status` that all nodes are well")
        else:
            yield check_places(wanted, nodes)


def check_places(wanted: Wanted, nodes: list[NodeMemory]) -> Finding:
    """See that Ray has a GPU or a CPU to give to every rank, in use now or not."""
    count = wanted.num_ranks
    for kind in {"auto": ("GPU", "CPU"), "cuda": ("GPU",), "cpu": ("CPU",)}[wanted.device]:
        on_gpus = kind == "GPU"
        must_be_near = on_gpus and wanted.num_draft_ranks > 0  # a model and its draft write each other's memory
        one_node = must_be_near or wanted.tp_across_nodes is None
        where = "on one node" if one_node else "on all nodes together"
        if bytes_of_rank(nodes, count, one_node=one_node, on_gpus=on_gpus) is not None:
            return Finding("ray-places", "ok", f"Ray has {count} {kind}s {where}")
    places = sorted((node.name, node.num_gpus if on_gpus else node.num_cpus) for node in nodes)
    has = ", ".join(f"{name} has {num}" for name, num in places)
    found = f"{wanted.flags} takes {count} {kind}s {where}: {has or 'no node is alive'}"
    across = ", allow --tp-across-nodes" if one_node and not must_be_near else ""
    return Finding("ray-places", "fail", found, f"{wanted.fewer}{across}, or add a node with more {kind}s")


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
