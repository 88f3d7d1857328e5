from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tvm  # noqa: F401  # whole, before a test of the worker loads the runtime alone
import tvm_ffi

from rank_group import Artifacts
from scripts import ROOT
from shared_cache import as_cache
from tpserve.compile.artifact import kernel_library
from tpserve.compile.cache import CachePolicy


@pytest.fixture(scope="session")
def kernels(artifacts: Artifacts) -> Callable[[str], Any]:
    """The built kernels, by the last part of their global name."""
    with as_cache(artifacts.home):
        module = tvm_ffi.load_module(str(kernel_library("llvm", CachePolicy.ON)))
    return lambda name: module[name]


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Compiles into the cache that all tests of this session share, so that kernels are built once."""
    return Artifacts(tmp_path_factory.getbasetemp() / "artifacts")


@pytest.fixture(scope="session")
def build_tile_ends(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """Builds NAME.cpp of this folder for the host, with the kernels' own code of how a GEMM's tiles end."""

    def build(name: str) -> ctypes.CDLL:
        folder, here = tmp_path_factory.mktemp(name), Path(__file__).parent
        headers = ("norm", "silu", "wide", "tile", "plan")
        for header in (*(f"gemm_{header}" for header in headers), "token_scales", "silu", "grouped_scales"):
            shutil.copy(ROOT / f"compile/kernels/cuda/{header}.cuh", folder)
        for header in ("peer_tile", "push_stage", "push_places"):
            shutil.copy(ROOT / f"collectives/kernels/{header}.cuh", folder)
        shutil.copy(here / "gemm_parts_on_host.h", folder / "gemm_parts.cuh")
        for header in ("common", "slots", "hopper", "peer"):  # gemm_parts_on_host.h has what is needed of them
            (folder / f"{header}.cuh").touch()
        shutil.copy(here / f"{name}.cpp", folder)
        command = ["c++", "-std=c++20", "-O1", "-Wno-unknown-pragmas", "-shared", "-fPIC", "-pthread", f"{name}.cpp"]
        subprocess.run([*command, "-o", f"{name}.so"], check=True, timeout=120, cwd=folder)
        return ctypes.CDLL(str(folder / f"{name}.so"))

    return build
