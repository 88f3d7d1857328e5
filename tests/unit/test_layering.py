"""Who may import whom: coordinator and worker meet only over proto, and the compiler stays out of the serving path."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "proto": {"proto"},
    "collectives": {"collectives"},
    "compile": {"compile", "proto"},
    "worker": {"worker", "proto", "collectives"},
    "coordinator": {"coordinator", "proto"},
}
GATEWAY_ALLOWED = (
    "tpserve.proto",
    "tpserve.coordinator.gateway",
    *(
        f"tpserve.coordinator.{name}"
        for name in (
            "engine_channel",
            "engine_door",
            "process",
            "health",
            "log",
            "metrics_catalogue",
            "relay",
            "step_log",
            "tracing",
        )
    ),
)
ROUTER_ALLOWED = (
    "tpserve.proto.garbage",
    "tpserve.coordinator.router",
    "tpserve.coordinator.gateway.errors",
    *(f"tpserve.coordinator.gateway.{name}" for name in ("guard", "limited_body", "tls")),  # of any HTTP door
    *(
        f"tpserve.coordinator.{name}"
        for name in ("own_ray", "process", "log", "metrics_catalogue", "ray_daemons", "relay")
    ),
)
FLEET_ALLOWED = (
    "tpserve.proto.manifest",
    *(
        f"tpserve.coordinator.{name}"
        for name in ("serve", "children", "engine_choice", "errors", "model_build", "replica_memory")
    ),
)
BENCH_ALLOWED = (
    "tpserve.proto",
    "tpserve.coordinator.bench",
    "tpserve.coordinator.process",
    "tpserve.coordinator.draft_counts",
)
PYTHON_ENGINE_ALLOWED = (
    *GATEWAY_ALLOWED,
    "tpserve.coordinator.serve",
    "tpserve.coordinator.serve_arguments",
    "tpserve.coordinator.python_engine",
)
PURE = (
    *("scheduler", "page_pool", "prefix_cache", "kv_pages", "slot_table", "sequence_list", "step_calendar", "request"),
    *("decode_progress", "draft_length", "adaptive_length"),
)
IMPURE_MODULES = {"asyncio", "time", "random", "grpc", "ray", "logging", "os", "socket", "threading", "numpy"}


def imports_of(path: Path) -> set[str]:
    """Return the full names of all modules that a file imports, wherever it does so."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def sources(folder: str) -> list[Path]:
    return [path for path in sorted((ROOT / folder).rglob("*.py")) if "pb" not in path.parts]


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_folder_imports_only_what_it_may(folder: str) -> None:
    assert sources(folder)
    for path in sources(folder):
        for name in imports_of(path):
            if name.startswith("tpserve."):
                assert name.split(".")[1] in ALLOWED[folder], f"{path.relative_to(ROOT)} imports {name}"


def test_the_gateway_knows_no_scheduler() -> None:
    for path in sources("coordinator/gateway"):
        for name in imports_of(path):
            if name.startswith("tpserve."):
                assert name.startswith(GATEWAY_ALLOWED), f"{path.relative_to(ROOT)} imports {name}"


def test_the_python_engine_knows_what_the_http_door_knows() -> None:
    """And how a server is started; the engine itself it meets over gRPC."""
    assert sources("coordinator/python_engine")
    for path in sources("coordinator/python_engine"):
        for name in imports_of(path):
            if name.startswith("tpserve."):
                assert name.startswith(PYTHON_ENGINE_ALLOWED), f"{path.relative_to(ROOT)} imports {name}"


def test_the_router_knows_replicas_only_from_outside() -> None:
    """Only what starts replicas knows how a server is started."""
    assert sources("coordinator/router")
    for path in sources("coordinator/router"):
        allowed = (*ROUTER_ALLOWED, *FLEET_ALLOWED) if path.name == "fleet.py" else ROUTER_ALLOWED
        for name in imports_of(path):
            if name.startswith("tpserve."):
                assert name.startswith(allowed), f"{path.relative_to(ROOT)} imports {name}"


def test_the_load_tool_knows_the_server_only_from_outside() -> None:
    assert sources("coordinator/bench")
    for path in sources("coordinator/bench"):
        for name in imports_of(path):
            if name.startswith("tpserve."):
                assert name.startswith(BENCH_ALLOWED), f"{path.relative_to(ROOT)} imports {name}"


def test_nothing_of_the_server_imports_the_load_tool() -> None:
    for folder in ALLOWED:
        for path in sources(folder):
            if "bench" not in path.relative_to(ROOT).parts:
                assert not any(name.startswith("tpserve.coordinator.bench") for name in imports_of(path)), path


@pytest.mark.parametrize("module", PURE)
def test_scheduling_is_pure(module: str) -> None:
    roots = {name.split(".")[0] for name in imports_of(ROOT / "coordinator" / f"{module}.py")}
    assert not roots & IMPURE_MODULES


def test_the_serving_path_loads_no_compiler_and_no_torch() -> None:
    for folder in ("worker", "coordinator", "collectives", "proto"):
        for path in sources(folder):
            roots = {name.split(".")[0] for name in imports_of(path)}
            assert not roots & {"torch", "transformers"}, path
            assert not any(name.startswith("tvm.relax") for name in imports_of(path)), path


def test_no_package_shadows_proto_plus() -> None:
    """A `proto/__init__.py` at the root would hide the proto-plus package from Ray's workers."""
    assert not (ROOT / "proto" / "__init__.py").exists()


def test_links_cover_every_package() -> None:
    links = {path.name for path in (ROOT / "deploy/python/tpserve").iterdir() if path.is_symlink()}
    assert links == set(ALLOWED)
