"""What machine code of an artifact depends on: the compiler records it, the worker compares it."""

from __future__ import annotations

import platform
import re
from pathlib import Path

# Instruction sets that -march=native may let the compiler use; the kernel reports many flags that do not matter.
_ISA_FLAG = re.compile(
    r"(sse|ssse|avx|amx|bmi|sha)\w*|pni|fma|fma4|f16c|abm|popcnt|movbe|adx|gfni|aes|vaes|pclmulqdq|vpclmulqdq|cx16|"
    r"lahf_lm|rdrand|rdseed|rdpid|fsgsbase|clflushopt|clwb|cldemote|movdiri|movdir64b|serialize|tsxldtrk|xsave\w*|"
    r"asimd\w*|sve\w*|sme\w*|fp|fphp|bf16|i8mm|atomics|crc32|pmull|sha1|sha2|sha3|sha512|lrcpc|dcpop"
)


def cpu_features() -> str:
    """Return a stable text of the instruction sets of this machine.

    Code built with `-march=native` runs where this text is equal; a worker compares it with the manifest's.
    """
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            names = sorted({name for name in value.split() if _ISA_FLAG.fullmatch(name)})
            return " ".join([platform.machine(), *names])
    return platform.machine()
