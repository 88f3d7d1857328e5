"""A `g++` for tests of what surrounds the build of the kernels, which takes half a minute of a processor.

It treats the sources of kernels in its own way and hands all else to the real one, also the link of a model's library.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_SCRIPT = """\
#!/bin/sh
out=
for argument in "$@"; do
  [ "$before" = -o ] && out=$argument
  before=$argument
done
case "$*" in
  *.cc\\ *) {compile} ;;
  */kernels.so) {link} ;;
esac
exec {real} "$@"
"""


def path_with_copied_kernels(folder: Path, kernels: Path) -> str:
    """Return a PATH whose compiler gives a library that was built before, where the kernels are built."""
    return _path(folder, f'cp "{kernels}" "$out"; exit', f'cp "{kernels}" "$out"; exit')


def path_with_quick_objects(folder: Path) -> str:
    """Return a PATH whose compiler makes an object file of 1 MiB of another source, and as it does the kernels'."""
    source = folder / "large.cc"
    source.write_text("char large[1 << 20] = {1};\n")
    return _path(folder, f'exec {_real()} -c "{source}" -o "$out"', ":")


def _path(folder: Path, compile_: str, link: str) -> str:
    tool = folder / "bin/g++"
    tool.parent.mkdir()
    tool.write_text(_SCRIPT.format(compile=compile_, link=link, real=_real()))
    tool.chmod(0o755)
    return f"{tool.parent}{os.pathsep}{os.environ['PATH']}"


def _real() -> str:
    found = shutil.which("g++")
    assert found is not None
    return found
