"""A tool and a schema that every door is asked for, and what their answers must be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jsonschema

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "pattern": "^[A-Z][a-z]{2,9}$"}, "unit": {"enum": ["c", "f"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather of a city", "parameters": CITY},
}
FORCED_CALL: dict[str, Any] = {
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
}
PERSON_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,9}$"},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
PERSON: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON_SCHEMA}}


def check_call(function: Mapping[str, str], finish: str) -> None:
    """A call of the tool, whole and of its schema."""
    assert (function["name"], finish) == ("get_weather", "tool_calls")
    jsonschema.Draft202012Validator(CITY).validate(json.loads(function["arguments"]))


def check_person(text: str, finish: str) -> None:
    """JSON of the schema, ended by itself."""
    assert finish == "stop"
    jsonschema.Draft202012Validator(PERSON_SCHEMA).validate(json.loads(text))
