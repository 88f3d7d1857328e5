"""What machine code of an artifact depends on: the compiler records it, the worker compares it."""

from __future__ import annotations

import platform
from pathlib import Path

# Flags that change what -march=native generates; the rest of /proc/cpuinfo may differ between equal hosts.
_ISA_PREFIXES = ("avx", "amx", "sse", "fma", "f16c", "bmi", "asimd", "sve", "neon", "fp16", "bf16", "i8mm")


def cpu_features() -> str:
    """Return this host's architecture and vector instruction sets, sorted, as one line."""
    flags: set[str] = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags = {flag for flag in value.split() if flag.startswith(_ISA_PREFIXES)}
            break
    return " ".join([platform.machine(), *sorted(flags)])
