"""Builds the C++ kernels of this machine into one shared library.

Owns the compiler flags, on which exactness depends. Knows tvm_ffi (headers and library to link) and no TVM.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path

from tpserve.compile.errors import CompileError
from tpserve.compile.progress import Progress

_PACKAGE = Path(__file__).parent.parent

CPU_KERNEL_SOURCES: tuple[Path, ...] = tuple(
    sorted(path for part in ("compile/kernels/cpu", "collectives/kernels") for path in (_PACKAGE / part).glob("*.cc"))
)
"""Everything a CPU artifact's `kernels.so` is made of."""

_FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    # Newer GCC avoids chains of FMAs on some cores, loop by loop: sums would then depend on which tile a row fell in.
    "--param=avoid-fma-max-bits=0",
    "-ffp-contract=fast",
    "-pthread",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",  # vectors wider than the machine's registers stay inside inlined functions
)


class NativeBuildError(CompileError):
    """The host compiler is missing or refused the sources."""


def build_library(
    sources: Sequence[Path],
    out: Path,
    *,
    extra_flags: Sequence[str] = (),
    progress: Progress = lambda done, total: None,
) -> None:
    """Compile C++20 sources for this machine and link them into `out`.

    The file appears at once and whole: a build that fails or is killed leaves an older `out` as it was.

    Parameters
    ----------
    sources
        `.cc` files; headers are found beside them.
    out
        Path of the shared library; its folder must exist.
    extra_flags
        Added after the standard flags.
    progress
        Called after each source and the link.

    Raises
    ------
    NativeBuildError
        If g++ is not installed, or with its output if it fails.
    """
    import tvm_ffi.libinfo  # with numpy: who finds a library in the cache needs neither

    compiler = _compiler()
    library = Path(tvm_ffi.libinfo.find_libtvm_ffi())
    headers = [f"-isystem{path}" for path in tvm_ffi.libinfo.include_paths()]
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        objects = {source: Path(scratch) / f"{index}-{source.stem}.o" for index, source in enumerate(sources)}
        has_failed = threading.Event()

        def compile_one(source: Path) -> None:
            if has_failed.is_set():
                return
            try:
                command = [compiler, *_FLAGS, *headers, *extra_flags, "-c", str(source), "-o", str(objects[source])]
                _run(command, source.name)
            except BaseException:
                has_failed.set()
                raise

        with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
            # The longest first: they take about as long as they are, and no core is to wait for the last.
            longest_first = sorted(sources, key=lambda source: source.stat().st_size, reverse=True)
            compiling = [pool.submit(compile_one, source) for source in longest_first]
            for done, future in enumerate(as_completed(compiling), 1):
                future.result()
                progress(done, len(sources) + 1)
        partial = Path(scratch) / out.name
        # Never unloaded: threads of its pool run its code as long as the process lives.
        link = ["-Wl,-z,nodelete", f"-L{library.parent}", f"-Wl,-rpath,{library.parent}", "-ltvm_ffi"]
        link += ["-o", str(partial)]
        _run([compiler, "-shared", *_FLAGS, *extra_flags, *map(str, objects.values()), *link], out.name)
        partial.replace(out)
        progress(len(sources) + 1, len(sources) + 1)


def compiler_version() -> str:
    """Return the first line of `g++ --version`, for the manifest.

    Raises
    ------
    NativeBuildError
        If g++ is not installed or does not run.
    """
    done = subprocess.run([_compiler(), "--version"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NativeBuildError(f"g++ --version failed with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout.splitlines()[0]


def source_hash(sources: Sequence[Path], *, extra_flags: Sequence[str] = ()) -> str:
    """Return a hex digest of the sources, the headers beside them, the flags and the tvm_ffi version."""
    digest = hashlib.sha256()
    headers = {header for source in sources for header in source.parent.glob("*.h")}
    for path in sorted({*sources, *headers}, key=lambda path: (path.name, str(path))):
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    digest.update("\0".join([*_FLAGS, *extra_flags, version("apache-tvm-ffi")]).encode())
    return digest.hexdigest()


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise NativeBuildError(f"{command[0]} failed with status {done.returncode} on {what}:\n{done.stdout}")


def _compiler() -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        raise NativeBuildError("g++ was not found on PATH: install it (Debian: apt-get install g++)")
    return compiler
