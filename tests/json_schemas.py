"""JSON schemas by the hundred: random ones of our own, and those of JSON-Schema-Test-Suite where its files are."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Schema = dict[str, Any]

DRAFTS = ("draft7", "draft2019-09", "draft2020-12")
_NAMES = ("id", "name", "tags", "Größe", "a b", "x-1", "$value", "line\nend", 'say "hi"', "nested", "kind", "when")
_PATTERNS = ("^[a-z]+$", "^\\d{3}-\\d{4}$", "[A-Z]", "^(yes|no)$", "^[^@]+@[^@]+$", "^.{2,5}$", "\\w+")
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email", "unheard-of")


def random_schema(rng: random.Random, depth: int = 3) -> Schema:
    """Return a schema that can be enforced, with whatever keywords chance brings."""
    whole = _any(rng, depth)
    if rng.random() < 0.3:
        whole = {
            "type": "object",
            "properties": {
                "one": {"$ref": "#/$defs/part"},
                "many": {"type": "array", "items": {"$ref": "#/$defs/part"}},
            },
            "required": ["one"],
            "$defs": {"part": whole},
        }
    return whole


def _any(rng: random.Random, depth: int) -> Schema:
    makers = [_string, _number, _listed, _string, _number]
    if depth:
        makers += [_object, _object, _array, _either]
    schema = rng.choice(makers)(rng, depth)
    if rng.random() < 0.2:
        schema = {**schema, "title": "T", "description": "what it is", "examples": [1]}
    return schema


def _string(rng: random.Random, depth: int) -> Schema:
    return {
        "type": "string",
        **rng.choice(
            [
                {},
                {"maxLength": rng.randint(0, 8)},
                {"minLength": rng.randint(0, 3), "maxLength": rng.randint(3, 9)},
                {"pattern": rng.choice(_PATTERNS)},
                {"format": rng.choice(_FORMATS)},
            ]
        ),
    }


def _number(rng: random.Random, depth: int) -> Schema:
    schema: Schema = {"type": rng.choice(["integer", "number"])}
    low = rng.randint(-1000, 1000)
    if rng.random() < 0.5:
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = low
    if rng.random() < 0.5:
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = low + rng.randint(2, 500)
    if len(schema) == 1 and schema["type"] == "integer" and rng.random() < 0.3:
        schema["multipleOf"] = rng.choice([2, 5, 10])
    return schema


def _listed(rng: random.Random, depth: int) -> Schema:
    values: list[Any] = rng.sample(["a", "Ö\n", 1, 2.5, None, True, {"k": [1]}, [], 'say "hi"'], rng.randint(1, 4))
    return rng.choice([{"enum": values}, {"const": values[0]}, {"type": "boolean"}, {"type": "null"}])


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(_NAMES, rng.randint(0, 4))
    schema: Schema = {"type": "object", "properties": {name: _any(rng, depth - 1) for name in names}}
    if names:
        schema["required"] = rng.sample(names, rng.randint(0, len(names)))
        if rng.random() < 0.2:
            schema["required"].append("undescribed")
    match rng.randint(0, 4):
        case 0:
            schema["additionalProperties"] = False
            schema["required"] = [name for name in schema.get("required", ()) if name in names]
        case 1:
            schema["additionalProperties"] = _any(rng, depth - 1)
        case 2 if not names:
            schema = {"type": "object", "patternProperties": {"^p_[a-z]{1,3}$": _any(rng, depth - 1)}}
    return schema


def _array(rng: random.Random, depth: int) -> Schema:
    schema: Schema = {"type": "array"}
    if rng.random() < 0.8:
        schema["items"] = _any(rng, depth - 1)
    if rng.random() < 0.5:
        schema["minItems"] = rng.randint(0, 2)
    schema["maxItems"] = rng.randint(2, 4)
    if rng.random() < 0.2:
        schema = {
            "type": "array",
            "prefixItems": [_any(rng, depth - 1) for _ in range(rng.randint(1, 3))],
            "items": False,
        }
    return schema


def _either(rng: random.Random, depth: int) -> Schema:
    match rng.randint(0, 2):
        case 0:
            return {"anyOf": [_any(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
        case 1:
            return {"type": ["string", "null", "integer"], "maxLength": 4, "minimum": 7}
    branches = [
        {"type": "object", "properties": {"kind": {"const": kind}, "value": _any(rng, depth - 1)}, "required": ["kind"]}
        for kind in ("a", "b")
    ]
    return {"oneOf": branches}


def suite_schemas(folder: Path) -> list[Schema | bool]:
    """Return the different schemas of JSON-Schema-Test-Suite, whose `tests` folder is given."""
    seen: dict[str, Schema | bool] = {}
    for draft in DRAFTS:
        for path in sorted((folder / draft).rglob("*.json")):
            for group in json.loads(path.read_text()):
                seen.setdefault(json.dumps(group["schema"], sort_keys=True), group["schema"])
    return list(seen.values())


def composed_schemas(rng: random.Random, parts: Iterable[Schema], count: int) -> list[Schema]:
    """Return objects whose properties are schemas of `parts` without references, one to three of them."""
    free = [part for part in parts if isinstance(part, dict) and "$ref" not in json.dumps(part) and "$id" not in part]
    out = []
    for number in range(count):
        chosen = rng.sample(free, rng.randint(1, 3))
        bare = [{key: value for key, value in part.items() if key not in ("$schema", "$comment")} for part in chosen]
        names = [f"field_{index}" for index in range(len(bare))]
        out.append(
            {
                "title": f"Schema{number}",
                "type": "object",
                "properties": dict(zip(names, bare, strict=True)),
                "required": names,
                "additionalProperties": False,
            }
        )
    return out
