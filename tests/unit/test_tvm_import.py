"""What TVM's Python side asks its library for while it is imported."""

from __future__ import annotations

from typing import Any

import pytest
import tvm_ffi.core
import tvm_ffi.registry

from tpserve.proto.tvm_import import asked_once


def test_lists_say_what_the_library_says() -> None:
    core: Any = tvm_ffi.core
    find, list_names = core._object_type_key_to_index, tvm_ffi.registry.list_global_func_names
    before = list_names()
    with asked_once():
        assert core._object_type_key_to_index("no.such.type") is None
        assert core._object_type_key_to_index("ffi.String") == find("ffi.String")
        assert tvm_ffi.registry.list_global_func_names() == before
        tvm_ffi.register_global_func("tpserve.tests.one_more", lambda: None)
        try:
            assert set(tvm_ffi.registry.list_global_func_names()) == {*before, "tpserve.tests.one_more"}
        finally:
            tvm_ffi.registry.remove_global_func("tpserve.tests.one_more")
        assert set(tvm_ffi.registry.list_global_func_names()) == set(before)
    assert core._object_type_key_to_index is find
    assert tvm_ffi.registry.list_global_func_names is list_names


def test_it_is_undone_if_an_import_fails() -> None:
    list_names = tvm_ffi.registry.list_global_func_names
    with pytest.raises(ImportError), asked_once():
        raise ImportError("no library")
    assert tvm_ffi.registry.list_global_func_names is list_names
