"""Many wrong forms of one header in one C++ source: to read the standard library's takes longer than all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

_INCLUDE = re.compile(r"^#include .*\n", re.MULTILINE)


def one_of_many(source: str, headers: Sequence[str], namespace: str, exported: Sequence[str]) -> Iterator[str]:
    """Yield the parts of a source that has another for each of these forms of its first header.

    Parameters
    ----------
    source
        Includes the header first, and what is right everywhere.
    headers
        The forms; each declares no macro.
    namespace
        The header's, which is another in each form, and has what the right headers declare there.
    exported
        Functions of the source with C's names; those of form i end in `_i`.
    """
    first, *others = _INCLUDE.findall(source)
    yield from sorted({*others, *(line for text in headers for line in _INCLUDE.findall(text))} - {first})
    for i, header in enumerate(headers):
        yield f"namespace form_{i} {{\nusing namespace {namespace};\n}}\n"
        body = f"namespace source_{i} {{\n{_INCLUDE.sub('', source)}}}\n"
        for name in exported:
            body = re.sub(rf"\bvoid {name}\(", f"void {name}_{i}(", body)
        yield (_INCLUDE.sub("", header).replace("#pragma once\n", "") + body).replace(
            f"namespace {namespace}", f"namespace form_{i}"
        )
