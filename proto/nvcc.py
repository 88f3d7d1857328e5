"""Where CUDA's compiler is on this host: in the toolkit's folder, on PATH, or among Python's packages."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path


def find_nvcc() -> Path | None:
    """Return nvcc of `CUDA_HOME`, if that is set, or else of PATH, or of NVIDIA's packages on PyPI, or None."""
    if home := os.environ.get("CUDA_HOME"):
        found = shutil.which("nvcc", path=str(Path(home) / "bin"))
        return None if found is None else Path(found)
    if found := shutil.which("nvcc"):
        return Path(found)
    return next((nvcc for folder in _packaged_toolkits() if (nvcc := folder / "bin" / "nvcc").is_file()), None)


def _packaged_toolkits() -> list[Path]:
    """Return the folders `nvidia/cu13` and the like, the newest first."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    return [folder for place in places for folder in sorted(Path(place).glob("cu[0-9]*"), reverse=True)]
