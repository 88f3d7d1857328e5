"""How TVM is imported for less of a processor."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def asked_once() -> Iterator[None]:
    """Let modules of TVM that are imported meanwhile find what their library has in lists.

    They name types that it has not, and find out by the error that each raises. For the trace in the first one the
    debugging facts of every library of the process are read, which takes a compiler 0.5 s and a rank beside Ray 0.7 s.
    And to find its own functions each of fifty modules asks for the name of every one: 5 ms.
    """
    core: Any = importlib.import_module("tvm_ffi.core")
    registry: Any = importlib.import_module("tvm_ffi.registry")
    find, list_names = core._object_type_key_to_index, registry.list_global_func_names
    names: list[str] = []

    def names_listed() -> list[str]:
        nonlocal names
        if registry.get_global_func("ffi.FunctionListGlobalNamesFunctor")()(-1) != len(names):
            names = list_names()
        return names

    core._object_type_key_to_index = lambda key: find(key) if key in registry.get_registered_type_keys() else None
    registry.list_global_func_names = names_listed
    try:
        yield
    finally:
        core._object_type_key_to_index, registry.list_global_func_names = find, list_names
