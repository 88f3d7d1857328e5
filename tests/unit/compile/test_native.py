"""Building native libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
import tvm_ffi

from tpserve.compile import native
from tpserve.proto.host import cpu_features

ANSWER = """
#include <tvm/ffi/function.h>
#include "number.h"
static int64_t answer() { return kNumber; }
TVM_FFI_DLL_EXPORT_TYPED_FUNC(answer, answer);
"""


def write(folder: Path, number: str = "42") -> Path:
    (folder / "number.h").write_text(f"constexpr long kNumber = {number};\n")
    source = folder / "answer.cc"
    source.write_text(ANSWER)
    return source


def test_a_library_is_built_and_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "answer.so"
    native.build_library([write(tmp_path)], out)
    assert tvm_ffi.load_module(str(out))["answer"]() == 42
    before = out.read_bytes()
    with pytest.raises(native.NativeBuildError, match=r"on answer.cc:\n(.|\n)*number.h"):
        native.build_library([write(tmp_path, "not a number")], out)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answer.cc", "answer.so", "number.h"]


def test_a_missing_compiler_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(native.NativeBuildError, match=r"g\+\+ was not found on PATH: install it"):
        native.build_library([write(tmp_path)], tmp_path / "answer.so")
    with pytest.raises(native.NativeBuildError, match="was not found"):
        native.compiler_version()


def test_the_hash_covers_sources_headers_and_flags(tmp_path: Path) -> None:
    source = write(tmp_path)
    first = native.source_hash([source])
    assert native.source_hash([source]) == first
    assert native.source_hash([source], extra_flags=["-g"]) != first
    write(tmp_path, "43")
    assert native.source_hash([source]) != first


def test_the_machine_is_described_the_same_each_time() -> None:
    features = cpu_features()
    assert features == cpu_features()
    assert "\n" not in features


def test_all_kernel_sources_are_found() -> None:
    assert {"attention.cc", "elementwise.cc", "gemm.cc", "rope.cc", "sample.cc", "shm.cc"} <= {
        path.name for path in native.CPU_KERNEL_SOURCES
    }
