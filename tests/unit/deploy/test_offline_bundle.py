"""The tree that deploy/offline/bundle.py makes of this project: what it can do, and says of what it cannot."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import ROOT


@pytest.mark.parametrize("command", ["compile", "convert"])
def test_a_bundle_without_the_compiler_says_so(tmp_path: Path, command: str) -> None:
    spec = importlib.util.spec_from_file_location("bundle", ROOT / "deploy" / "offline" / "bundle.py")
    assert spec is not None
    assert spec.loader is not None
    bundle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bundle)
    bundle.add_package(tmp_path, with_compiler=False)
    assert not (tmp_path / "tpserve" / "compile").exists()
    run = "import sys; sys.path.insert(0, sys.argv.pop(1)); from tpserve.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-S", "-c", run, str(tmp_path), command, "model"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"tpserve {command}: error: this installation only serves, the compiler is not in it: make the bundle with "
        "--with-compiler, or compile elsewhere and give serve --model-lib\n"
    )
