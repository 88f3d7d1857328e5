"""Schemas: which are refused and by which name, and that what is let through is followed to the letter."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from json_schemas import random_schema
from text_models import EOS, write_byte_tokenizer
from tpserve.coordinator.gateway.json_schema import SchemaError, enforceable
from tpserve.proto.grammar import GrammarCompiler
from tpserve.proto.messages import Grammar, GrammarKind
from tpserve.worker.arrays import aligned_zeros, as_tensor

DRAFT_7 = "http://json-schema.org/draft-07/schema#"


def obj(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


@pytest.mark.parametrize(
    ("schema", "place", "words"),
    [
        ({"not": {"type": "string"}}, "#", "'not' is not supported"),
        (obj(a={"if": {}, "then": {}}), "#/properties/a", "'if' is not supported"),
        ({"type": "array", "uniqueItems": True}, "#", "'uniqueItems'"),
        ({"type": "array", "contains": {}}, "#", "'contains'"),
        ({"type": "array", "items": {"allOf": [{}, {}]}}, "#/items", "'allOf' of more than one"),
        ({"type": "object", "dependentRequired": {}}, "#", "'dependentRequired'"),
        ({"$dynamicRef": "#x"}, "#", "'$dynamicRef'"),
        ({"type": "number", "multipleOf": 2}, "#", "'multipleOf'"),
        ({"type": "integer", "multipleOf": 2, "minimum": 3}, "#", "'multipleOf'"),
        ({"type": "integer", "minimum": -(2**70)}, "#", "'minimum' of more than 2^53"),
        ({"type": "string", "anyOf": [{}]}, "#", "'type' beside 'anyOf'"),
        ({"$ref": "#/$defs/a", "type": "string", "$defs": {"a": {}}}, "#", "'type' beside '$ref'"),
        ({"$ref": "other.json"}, "#", "the reference 'other.json'"),
        ({"$ref": "#/$defs/a"}, "#", "nothing is at '#/$defs/a'"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "#", "'oneOf' is only supported where"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#", "'oneOf' is only supported where"),
        ({"oneOf": [{"const": number} for number in range(200)]}, "#", "'oneOf' of more than 128"),
        ({"oneOf": [{"const": 1}, {"const": 1.0}]}, "#", "'oneOf' is only supported where"),
        ({"type": "string", "pattern": "(?=a)b"}, "#", "'(?=' in the pattern"),
        ({"type": "string", "pattern": r"\bword"}, "#", r"'\\b' in the pattern"),
        ({"type": "string", "pattern": '"'}, "#", "quotes, backslashes and control characters"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "#", "'maxLength' beside 'pattern'"),
        ({"type": "string", "format": "date", "minLength": 3}, "#", "'minLength' beside 'format'"),
        ({"type": "object", "patternProperties": {"a": {}, "b": {}}}, "#", "more than one of 'patternProperties'"),
        (
            {"type": "object", "properties": {"ab": {}}, "patternProperties": {"^a": {}}},
            "#",
            "'patternProperties' beside 'ab'",
        ),
        ({"enum": ["aaaa!"], "pattern": "^(a+)+$"}, "#", "'pattern' beside 'enum'"),
        (
            {"type": "object", "required": ["a"], "additionalProperties": False},
            "#",
            "'a' is required and never allowed",
        ),
        ({"type": "string", "enum": [1]}, "#", "none of the listed values"),
        ({"type": "objekt"}, "#/type", "'objekt' is not valid"),
        ({"type": "object", "properties": []}, "#/properties", "is not of type 'object'"),
        (False, "#", "allows nothing"),
        ({"anyOf": [False]}, "#", "no branch of 'anyOf'"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_place_and_name(schema: Any, place: str, words: str) -> None:
    with pytest.raises(SchemaError) as caught:
        enforceable(schema)
    assert str(caught.value).startswith(f"{place}: ")
    assert words in str(caught.value)


def test_depth_has_a_limit() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100):
        schema = {"type": "array", "items": schema}
    with pytest.raises(SchemaError, match="more than 64 levels deep"):
        enforceable(schema)


def test_references_may_loop() -> None:
    tree = {"type": "object", "properties": {"left": {"$ref": "#"}, "value": {"type": "integer"}}}
    assert enforceable(tree)


class Writer:
    """Writes random texts that a schema's grammar allows."""

    def __init__(self, folder: Path, seed: int) -> None:
        size = write_byte_tokenizer(folder, added=('": ', '", "', "null", "true", "false", "}}", "e0", "\\n"))
        self._compiler = GrammarCompiler(folder, size)
        self._mask = aligned_zeros((1, -(-size // 32)), np.int32)
        self._tensor = as_tensor(self._mask)
        self._rng = np.random.default_rng(seed)
        self._info = self._compiler._info.decoded_vocab()

    def write(self, schema: Any, max_tokens: int) -> str | None:
        """Return a text that ended by itself; None if it became too long."""
        grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema), (EOS,))
        matcher = self._compiler.matcher(self._compiler.compile(grammar), (EOS,))
        out = b""
        for _ in range(max_tokens):
            matcher.fill_next_token_bitmask(self._tensor, 0, False)
            bits = np.unpackbits(self._mask[0].view(np.uint8), bitorder="little")[: len(self._info)]
            allowed = np.flatnonzero(bits)
            # White space may come nearly anywhere; without this, texts would be made of it.
            texts = [bytes(self._info[int(token)]) for token in allowed]
            weights = np.array(
                [0.02 if not text.strip() and token != EOS else 1.0 for token, text in zip(allowed, texts, strict=True)]
            )
            if EOS in allowed:
                weights[allowed == EOS] = weights.sum()
            choice = int(self._rng.choice(len(allowed), p=weights / weights.sum()))
            if allowed[choice] == EOS:
                return out.decode(errors="surrogateescape")
            assert matcher.accept_token(int(allowed[choice]), False)
            out += texts[choice]
        return None


def test_every_text_that_ends_validates(tmp_path: Path) -> None:
    writer = Writer(tmp_path, 3)
    rng = random.Random(3)
    num_valid = 0
    for _ in range(150):
        schema = random_schema(rng, depth=2)
        enforced = enforceable(schema)
        for _ in range(3):
            text = writer.write(enforced, 150)
            if text is not None:
                value = json.loads(text)
                jsonschema.Draft202012Validator(schema).validate(value)
                num_valid += 1
    assert num_valid > 200


@pytest.mark.parametrize(
    ("schema", "yes", "no"),
    [
        ({"type": "string", "maxLength": 3}, ['"abc"', '""'], ['"abcd"', '"\x01"']),
        ({"maxLength": 3}, ['"abc"'], ["5"]),
        ({"type": "string", "pattern": "b"}, ['"abc"', '"b"'], ['"a"']),
        ({"type": "string", "pattern": "^b"}, ['"bc"'], ['"ab"']),
        ({"type": "string", "pattern": "c$"}, ['"bc"'], ['"ca"']),
        ({"type": "string", "pattern": "^a$|^b$"}, ['"a"', '"b"'], ['"ab"']),
        ({"type": "object"}, ['{"a": [1]}', "{}"], ["[]"]),
        ({"type": "object", "required": ["x"]}, ['{"x": 1}'], ["{}"]),
        ({"type": "array", "minItems": 1}, ["[1]", '[{"a": null}, 2]'], ["[]"]),
        ({"$schema": DRAFT_7, "items": [{"type": "integer"}], "additionalItems": False}, ["[1]"], ['["a"]', "[1, 2]"]),
        (obj(a={"type": "integer"}, b=False), ['{"a": 1}'], ['{"b": 1}', '{"c": 1}']),
        (obj(a={"type": "integer"}), ['{"a": 1}', "{}"], ['{"c": 1}']),
        (
            {**obj(a={"type": "integer"}), "additionalProperties": {"type": "string"}},
            ['{"a": 1, "c": "x"}'],
            ['{"c": 1}'],
        ),
        ({"type": "integer", "enum": [1, "a"]}, ["1"], ['"a"']),
        ({"type": ["integer", "null"], "minimum": 3}, ["3", "null"], ["2"]),
        ({"oneOf": [{"type": "string"}, {"type": "null"}]}, ['"a"', "null"], ["1"]),
        ({"minLength": 2.0, "maxLength": 2.0}, ['"ab"'], ['"a"']),
    ],
)
def test_what_schemas_come_to_mean(tmp_path: Path, schema: Any, yes: list[str], no: list[str]) -> None:
    compiler = GrammarCompiler(tmp_path, write_byte_tokenizer(tmp_path))
    compiled = compiler.compile(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(enforceable(schema)), (EOS,)))
    for text in (*yes, *no):
        matcher = compiler.matcher(compiled, (EOS,))
        assert (matcher.accept_string(text, False) and matcher.is_completed()) is (text in yes), text
