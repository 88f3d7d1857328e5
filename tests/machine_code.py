"""Looks for a hazard in machine code that no run and no sanitizer is sure to show.

An arrival at a barrier in shared memory may let a bulk copy overwrite what the warp has asked for and not yet got: it
waits for no load (see `await_loaded`). In machine code a load names one of six counters, and the instruction that needs
what it loads waits for that counter. So an arrival is safe if something before it waits for the counters of all loads.

Source: bits 105 to 125 of an instruction since Volta: 4 of delay, 1, 3 counter of what is written, 3 of what is read,
6 waited for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_FUNCTION = re.compile(r"\s+Function : (\S+)")
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(.*?);?\s+/\* 0x[0-9a-f]{16} \*/")
_SECOND_HALF = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
_LOAD = re.compile(r"\bLDSM?\b")
ARRIVAL = "SYNCS.ARRIVE.TRANS64.A1T0"
_NO_COUNTER = 7


def overtaken_loads(listing: Iterable[str]) -> Iterator[str]:
    """Read what `cuobjdump -sass` prints; name each arrival before which loads from shared memory are not waited for.

    Instructions are taken in the order of their addresses, whatever branches there are.
    """
    function, text = "", ""
    pending: dict[int, str] = {}
    for line in listing:
        if found := _FUNCTION.match(line):
            function, text = found[1], ""
            pending.clear()
        elif found := _INSTRUCTION.match(line):
            text = f"{found[1]}: {found[2].strip()}"
        elif text and (found := _SECOND_HALF.match(line)):
            control = int(found[1], 16) >> 41
            written, waited = control >> 5 & 7, control >> 11 & 63
            pending = {counter: load for counter, load in pending.items() if not waited >> counter & 1}
            if ARRIVAL in text and pending:
                yield f"{function} at {text} before {'; '.join(pending.values())}"
            if _LOAD.search(text) and written != _NO_COUNTER:
                pending[written] = text
            text = ""
