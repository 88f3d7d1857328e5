"""Builds the CUDA kernels into one shared library of machine code; needs nvcc and a host compiler, but no GPU.

Owns the compiler flags. Knows tvm_ffi (headers and library to link) and no TVM.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from tpserve.compile.errors import CompileError
from tpserve.compile.progress import Progress
from tpserve.proto.nvcc import find_nvcc

_PACKAGE = Path(__file__).parent.parent
_FOLDERS = (_PACKAGE / "compile" / "kernels" / "cuda", _PACKAGE / "collectives" / "kernels")

CUDA_KERNEL_SOURCES: tuple[Path, ...] = tuple(sorted(path for folder in _FOLDERS for path in folder.glob("*.cu")))
"""Everything a CUDA artifact's `kernels.so` is made of."""

ARCH = "sm_90a"
"""Hopper with its own instructions (wgmma): the code runs on no other generation."""

_MAX_JOBS = 2  # nvcc takes about 1 GB for the larger files

_FLAGS = (
    "-std=c++20",
    # Machine code only, no PTX: nothing is compiled when the library is loaded.
    "-gencode=arch=compute_90a,code=sm_90a",
    "-lineinfo",
    "--expt-relaxed-constexpr",
    # The host's part checks arguments and launches, mostly while graphs are captured: to optimise it further takes a
    # quarter of the build's time.
    "-Xcompiler=-fPIC,-fvisibility=hidden,-O1",
    # The runtime is linked in: a library that brings its own needs only the driver.
    "-cudart=static",
)


class CudaBuildError(CompileError):
    """nvcc is missing or refused the sources."""


def build_cuda_library(
    sources: Sequence[Path],
    out: Path,
    *,
    extra_flags: Sequence[str] = (),
    progress: Progress = lambda done, total: None,
) -> str:
    """Compile CUDA sources for Hopper and link them into `out`.

    The file appears at once and whole: a build that fails or is killed leaves an older `out` as it was.

    Parameters
    ----------
    sources
        `.cu` files; headers are found beside them and in the kernels' folders.
    out
        Path of the shared library; its folder must exist.
    extra_flags
        Added after the standard flags.
    progress
        Called after each source and the link.

    Returns
    -------
    what the compiler printed (with `-Xptxas=-v` registers, shared memory and spills of each kernel)

    Raises
    ------
    CudaBuildError
        If nvcc is not found, or with its output if it fails.
    """
    import tvm_ffi.libinfo  # with numpy: who finds a library in the cache needs neither

    nvcc = _nvcc()
    library = Path(tvm_ffi.libinfo.find_libtvm_ffi())
    headers = [flag for path in tvm_ffi.libinfo.include_paths() for flag in ("-isystem", str(path))]
    headers += [f"-I{folder}" for folder in _FOLDERS]
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        objects = [Path(scratch) / f"{index}-{source.stem}.o" for index, source in enumerate(sources)]

        def compile_one(source: Path, target: Path) -> str:
            return _run([nvcc, *_FLAGS, *headers, *extra_flags, "-c", str(source), "-o", str(target)], source.name)

        with ThreadPoolExecutor(max_workers=min(_MAX_JOBS, len(os.sched_getaffinity(0)))) as pool:
            output = ""
            for done, said in enumerate(pool.map(compile_one, sources, objects), 1):
                output += said
                progress(done, len(sources) + 1)
        partial = Path(scratch) / out.name
        # Where pip's packages have the runtime, of which their nvcc does not know.
        folders = [f"-L{Path(nvcc).resolve().parents[1] / 'lib'}", f"-L{library.parent}"]
        link = [*folders, f"-Xlinker=-rpath,{library.parent}", "-ltvm_ffi", "-o", str(partial)]
        _run([nvcc, "-shared", *_FLAGS, *extra_flags, *map(str, objects), *link], out.name)
        partial.replace(out)
        progress(len(sources) + 1, len(sources) + 1)
    return output


def nvcc_version() -> str:
    """Return the release line of `nvcc --version`, for the manifest.

    Raises
    ------
    CudaBuildError
        If nvcc is not found or does not run.
    """
    lines = _run([_nvcc(), "--version"], "--version").splitlines()
    return next((line.strip() for line in lines if "release" in line), lines[-1])


def cuda_source_hash(sources: Sequence[Path], *, extra_flags: Sequence[str] = ()) -> str:
    """Return a hex digest of the sources, the headers beside them, the flags, nvcc's and tvm_ffi's versions."""
    digest = hashlib.sha256()
    folders = {*_FOLDERS, *(source.parent for source in sources)}
    headers = {header for folder in folders for header in folder.glob("*.cuh")}
    for path in sorted({*sources, *headers}, key=lambda path: (path.name, str(path))):
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    digest.update("\0".join([*_FLAGS, *extra_flags, nvcc_version(), version("apache-tvm-ffi")]).encode())
    return digest.hexdigest()


def _run(command: list[str], what: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise CudaBuildError(f"{command[0]} failed with status {done.returncode} on {what}:\n{done.stdout}")
    return done.stdout


def _nvcc() -> str:
    compiler = find_nvcc()
    if compiler is None:
        home = os.environ.get("CUDA_HOME")
        where = f"in {home}/bin (CUDA_HOME)" if home else "on PATH or among Python's packages"
        raise CudaBuildError(
            f"nvcc was not found {where}: install the CUDA toolkit (13.0 or newer), or pip install 'tpserve[nvcc]'"
        )
    return str(compiler)
