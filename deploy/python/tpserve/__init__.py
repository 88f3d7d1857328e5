"""Tensor-parallel LLM serving: the coordinator, workers, collectives and compiler live in the sub-packages.

`MLCEngine` and `AsyncMLCEngine` are loaded when first asked for: importing this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpserve.coordinator.gateway.errors import ApiError
    from tpserve.coordinator.python_engine.async_engine import AsyncMLCEngine
    from tpserve.coordinator.python_engine.engine import MLCEngine
    from tpserve.coordinator.python_engine.errors import EngineError, RequestAborted

__all__ = ["ApiError", "AsyncMLCEngine", "EngineError", "MLCEngine", "RequestAborted"]

_HOMES = {
    "ApiError": "tpserve.coordinator.gateway.errors",
    "AsyncMLCEngine": "tpserve.coordinator.python_engine.async_engine",
    "EngineError": "tpserve.coordinator.python_engine.errors",
    "MLCEngine": "tpserve.coordinator.python_engine.engine",
    "RequestAborted": "tpserve.coordinator.python_engine.errors",
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tpserve' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
