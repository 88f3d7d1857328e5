"""Load a compiled artifact: check it against this host and configuration, register its externs, make the VM."""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tvm_ffi

from tpserve.proto.host import cpu_features
from tpserve.proto.manifest import Manifest, ManifestError, sha256_file
from tpserve.proto.tvm_import import asked_once
from tpserve.worker.errors import LibraryError

KERNEL_PREFIXES = ("tpserve.cpu.", "tpserve.cuda.")
"""Externs of these names are in the artifact's kernel library, under the rest of the name."""


def _import_tvm_runtime() -> Any:
    """Import TVM without its compiler, which is not needed to serve and takes seconds to load.

    TVM reads the choice from the environment when it is imported; it is taken back, so that a process started from here
    may compile.
    """
    name = "TVM_USE_RUNTIME_LIB"
    given = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with asked_once():
            importlib.import_module("tvm.runtime.vm")
            return importlib.import_module("tvm")
    finally:
        if given is None:
            os.environ.pop(name, None)


tvm = _import_tvm_runtime()


def check_manifest(artifact_dir: Path, model_dir: Path, tp_size: int, max_num_seqs: int) -> Manifest:
    """Read an artifact's manifest and compare it with this host and what the rank was started with.

    Raises
    ------
    LibraryError
        Naming each difference with both values.
    """
    try:
        manifest = Manifest.load(artifact_dir)
        manifest.require(tp_size=tp_size, model_config_sha256=sha256_file(model_dir / "config.json"))
    except (ManifestError, OSError) as error:
        raise LibraryError(str(error)) from None
    if max_num_seqs > manifest.max_num_seqs:
        raise LibraryError(
            f"max_num_seqs {max_num_seqs} is more than the library's {manifest.max_num_seqs}: compile again"
        )
    here = cpu_features()
    built = manifest.target.get("cpu_features", here)
    if built != here:
        raise LibraryError(
            f"{artifact_dir} was compiled for a CPU with [{built}], this one has [{here}]: compile again"
        )
    return manifest


class Library:
    """A loaded artifact.

    Attributes
    ----------
    manifest : Manifest
    step : callable
        The compiled graph (`LlamaForCausalLM.step`), parameters last.
    """

    def __init__(self, artifact_dir: Path, manifest: Manifest, kernels: Any, device: Any = None) -> None:
        """Load the graph.

        Parameters
        ----------
        kernels
            The artifact's kernel library, see `load_kernels`. Externs that are not in it (collectives) must have been
            registered before.
        device
            TVM device of the graph; the host if not given.

        Raises
        ------
        LibraryError
            If the graph needs an extern that nobody gives.
        """
        self.manifest = manifest
        # Names are resolved when the VM is made, so all must be there before.
        for name in manifest.externs:
            if name.startswith(KERNEL_PREFIXES):
                tvm_ffi.register_global_func(name, kernels[name.rpartition(".")[2]], override=True)
            elif tvm_ffi.get_global_func(name, allow_missing=True) is None:
                raise LibraryError(f"the library needs {name}, which no backend has registered")
        model = tvm.runtime.load_module(str(artifact_dir / "model.so"))
        self._vm = tvm.runtime.vm.VirtualMachine(model, device or tvm.cpu())
        self.step = self.function("step")

    def function(self, name: str) -> Callable[..., Any]:
        """Return a compiled function, parameters last."""
        function: Callable[..., Any] = self._vm[name]
        return function


def load_cuda_runtime() -> None:
    """Make TVM's CUDA devices known; CuPy must have loaded the CUDA runtime before."""
    ctypes.CDLL(str(Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"), ctypes.RTLD_GLOBAL)


def load_kernels(artifact_dir: Path) -> Any:
    """Return the artifact's kernel library: functions by bare name."""
    return tvm_ffi.load_module(str(artifact_dir / "kernels.so"))
