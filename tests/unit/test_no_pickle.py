"""Nothing of ours reads pickles, so that no port of ours can be made to run what it is sent; and Ray has no dashboard.

Ray itself pickles between its own processes, behind its token; that is why its ports are on loopback, or on a network
of one's own.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path
    for folder in ("coordinator", "worker", "collectives", "proto", "compile", "deploy/python/tpserve", "deploy")
    for path in (ROOT / folder).glob("**/*.py" if folder != "deploy" else "*.py")
)
READERS = {"pickle", "cloudpickle", "marshal", "shelve", "dill", "joblib", "torch", "_pickle", "jsonpickle"}
"""Modules whose loading runs what it is given; `numpy.load` does with allow_pickle alone."""


def findings(tree: ast.AST) -> list[str]:
    """Say what in a module reads pickles, or runs text."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found += [f"imports {alias.name}" for alias in names if alias.name.split(".")[0] in READERS]
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in READERS or module.endswith(
                "cloudpickle"
            ):
                found.append(f"imports from {module}")
            case ast.Call(func=ast.Name(id="eval" | "exec" | "__import__")):
                found.append(f"calls {node.func.id}")  # type: ignore[attr-defined]  # as the pattern says
            case ast.Attribute(attr="cloudpickle" | "read_pickle"):
                found.append(f"uses {node.attr}")
            case ast.keyword(arg="allow_pickle", value=value) if not _is_false(value):
                found.append("sets allow_pickle")
            case ast.keyword(arg="include_dashboard", value=value) if not _is_false(value):
                found.append("starts Ray's dashboard")
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "include_dashboard" and not _is_false(value):
                        found.append("starts Ray's dashboard")
            case _:
                pass
    return found


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def test_no_source_reads_pickles() -> None:
    assert len(SOURCES) > 150
    found = {str(path.relative_to(ROOT)): said for path in SOURCES if (said := findings(ast.parse(path.read_text())))}
    assert found == {}


def test_every_start_of_ray_leaves_the_dashboard_out() -> None:
    starts = [path for path in SOURCES if "ray.init(" in path.read_text()]
    assert len(starts) >= 2
    for path in starts:
        assert "include_dashboard" in path.read_text() or "address=" in path.read_text(), path
    assert "--include-dashboard=false" in (ROOT / "deploy/ray/cluster.yaml").read_text()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from ray import cloudpickle\nray.cloudpickle.loads(b'')",
        "from ray.cloudpickle import loads",
        "import numpy\nnumpy.load('f', allow_pickle=True)",
        "eval('1')",
        "ray.init(include_dashboard=True)",
        "ray.init(**{'include_dashboard': flag})",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert findings(ast.parse(source))
