"""What the fuzz tests share: how many examples, values that break things, and how valid input is mutated."""

from __future__ import annotations

import copy
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

_TIMES = int(os.environ.get("TPSERVE_FUZZ_TIMES", "1"))
"""So many times the examples, for a long run; each run finds the same without it."""


def fuzz(num_examples: int) -> settings:
    """Return the settings of a test; an example that takes longer than a minute is a hang."""
    return settings(
        max_examples=num_examples * _TIMES,
        deadline=60_000,
        derandomize=_TIMES == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, -(2**63), 2**64, 10**30, 0.5, 1e308, -1e308]),
    st.integers(-(2**65), 2**65),
    st.floats(allow_nan=False, allow_infinity=False),
)
STRINGS = st.one_of(
    st.sampled_from(["", "\x00", "text", "json_object", "auto", "<|im_end|>", "{{ 1/0 }}", "\U0010ffff", "a" * 3000]),
    st.text(max_size=30),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, STRINGS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(st.sampled_from(["type", "content", "role", "text", "schema", "$ref", "anyOf"]), STRINGS),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)
"""Any JSON."""


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Return where something stands in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


@st.composite
def mutated_json(draw: st.DrawFn, whole: Any) -> Any:
    """Return a copy with one to three of its parts replaced, removed or added."""
    value = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value)))
        if not path:
            if isinstance(value, dict):
                value[draw(STRINGS)] = draw(VALUES)
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        if draw(st.booleans()) or not isinstance(parent, dict):
            parent[path[-1]] = draw(VALUES)
        else:
            del parent[path[-1]]
    return value


@st.composite
def mutated_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """Return a copy that is cut off, has bytes replaced, or has a part doubled or filled."""
    value = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(value) - 1)))
        match draw(st.sampled_from(["set", "huge", "cut", "insert", "double", "remove"])):
            case "set":
                value[place : place + 1] = bytes([draw(st.integers(0, 255))])
            case "huge":
                value[place : place + 8] = draw(st.sampled_from([b"\xff" * 8, b"\x00" * 8, b"\xff" * 7 + b"\x7f"]))
            case "cut":
                del value[place:]
            case "insert":
                value[place:place] = draw(st.binary(max_size=16))
            case "double":
                value[place:place] = value[place : place + 64]
            case "remove":
                del value[place : place + draw(st.integers(1, 64))]
    return bytes(value)
