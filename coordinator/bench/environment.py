"""Where and with what something was measured: commit, device, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

_PACKAGES = ("tpserve", "apache-tvm", "apache-tvm-ffi", "ray", "httpx", "numpy", "uvloop")
_COMMAND_TIMEOUT_S = 10


def commit() -> str | None:
    """Return the commit of the checkout that this file is part of, `+` added if it was changed; None without one."""
    folder = Path(__file__).resolve().parent
    revision = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    if revision is None:
        return None
    return revision + ("+" if _output("git", "-C", str(folder), "status", "--porcelain", "-uno") else "")


def device() -> str:
    """Return the devices of this machine in words: its GPUs, or else its CPU."""
    gpus = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    if gpus:
        lines = gpus.splitlines()
        return f"{len(lines)} x {lines[0]}"
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return f"{os.cpu_count()} x {found[1] if found else platform.machine()}"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter here, as far as they are installed."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _output(*command: str) -> str | None:
    """Return what a command prints; None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
