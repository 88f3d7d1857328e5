"""Which JSON schemas a grammar can enforce, and the form in which it does.

What passes here makes output that always validates: keywords that xgrammar would ignore are refused by name, and what
it reads otherwise than JSON Schema means is written so that it cannot. Narrowing is allowed (a schema without a type
that limits numbers becomes one of numbers), widening is not. Knows nothing of requests.
"""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import jsonschema.validators
import referencing.exceptions

Schema = dict[str, Any]

MAX_DEPTH = 64
MAX_EXCLUSIVE = 128
"""Branches of one `oneOf`, which are compared in pairs."""
MAX_NUMBER = 2**53
"""Up to here, every integer is a number of its own in floating point, in which bounds are compared."""


class SchemaError(ValueError):
    """The schema is malformed, or asks for what cannot be enforced; the message says where and what."""


_UNSUPPORTED = {
    "not": "negation",
    "if": "conditions",
    "contains": "contained items",
    "dependentRequired": "dependencies",
    "dependentSchemas": "dependencies",
    "dependencies": "dependencies",
    "$dynamicRef": "dynamic references",
    "$recursiveRef": "dynamic references",
}
_TYPE_KEYWORDS = {
    "object": (
        "properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties",
        "maxProperties", "unevaluatedProperties",
    ),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems", "unevaluatedItems", "additionalItems"),
    "string": ("pattern", "minLength", "maxLength", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}  # fmt: skip
"""By type, the keywords that say something only of it."""
_TYPES = {**_TYPE_KEYWORDS, "integer": _TYPE_KEYWORDS["number"], "boolean": (), "null": ()}
_CONSTRAINTS = {
    "type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf", *(word for words in _TYPES.values() for word in words),
}  # fmt: skip
"""Keywords that restrict; all others are notes for people."""
_CHECKED = {
    "type", "enum", "const", "minLength", "maxLength", "format", "required", "minItems", "maxItems", "minProperties",
    "maxProperties", *_TYPE_KEYWORDS["number"],
}  # fmt: skip
"""Keywords that listed values are checked against: those that take no time, as patterns of clients may."""
_LOOKAROUND = re.compile(r"\\[bBpPkK1-9]|\(\?(?!:)<?.")
_NEEDS_ESCAPE = re.compile(r'"|\\\\|\\[tnrfv0cxu]|[\x00-\x1f]')
_ATOM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\.")
_ANY_CHAR = "[ !#-\\[\\]-\ud7ff\ue000-\U0010ffff]"
"""What a JSON string holds without escapes. Written out, as xgrammar's own classes let ill-formed UTF-8 through."""
_BRACKETED = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]")


def enforceable(schema: Schema | bool) -> Schema | bool:
    """Return an equivalent or narrower schema that a grammar enforces to the letter.

    Raises
    ------
    SchemaError
        Naming the place, as in `#/properties/name`, and the keyword.
    """
    if isinstance(schema, bool):
        if not schema:
            raise SchemaError("#: the schema false allows nothing")
        return {}
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        place = "/".join(["#", *map(str, error.absolute_path)])
        raise SchemaError(f"{place}: {_short(error.message)}") from None
    except (RecursionError, referencing.exceptions.Unresolvable):
        raise SchemaError("#: the schema is nested too deeply or names an unknown dialect") from None
    return _Rewriter(schema, kind).run()


class _Rewriter:
    """Rewrites one schema; what references point at becomes `#/$defs/<number>`."""

    def __init__(self, root: Schema, validator: Any) -> None:
        self._root = root
        self._validator = validator
        self._definitions: dict[str, str] = {}
        self._rewritten: dict[str, Any] = {}

    def run(self) -> Schema:
        out: Schema = self._rewrite(self._root, "#", 0)
        if self._rewritten:
            out = {**out, "$defs": self._rewritten} if "$ref" not in out else {"anyOf": [out], "$defs": self._rewritten}
        return out

    def _rewrite(self, schema: Any, place: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise SchemaError(f"{place}: the schema is nested more than {MAX_DEPTH} levels deep")
        if schema is True:
            return {}
        if schema is False:
            return False
        for keyword, what in _UNSUPPORTED.items():
            if keyword in schema:
                raise SchemaError(f"{place}: {keyword!r} is not supported: {what} cannot be enforced")
        if place != "#" and "$id" in schema:
            raise SchemaError(f"{place}: '$id' is not supported below the root")
        given = {key: value for key, value in schema.items() if key in _CONSTRAINTS}
        if "const" in given or "enum" in given:
            return self._values(given, place)
        for keyword in ("$ref", "anyOf", "oneOf", "allOf"):
            if keyword in given:
                return self._applicator(keyword, given, place, depth)
        return self._typed(given, place, depth)

    def _values(self, given: Schema, place: str) -> Schema:
        """Keep of the listed values those that the keywords beside them allow."""
        word = "const" if "const" in given else "enum"
        values = [given["const"]] if "const" in given else given["enum"]
        others = {key: value for key, value in given.items() if key != word}
        if unsafe := [key for key in others if key not in _CHECKED]:
            raise SchemaError(f"{place}: {unsafe[0]!r} beside {word!r} is not supported")
        validator = self._validator(others)
        kept = [value for value in values if validator.is_valid(value)]
        if not kept:
            raise SchemaError(f"{place}: none of the listed values is allowed by the keywords beside them")
        return {"enum": kept}

    def _applicator(self, keyword: str, given: Schema, place: str, depth: int) -> Schema:
        if others := sorted(given.keys() - {keyword}):
            raise SchemaError(f"{place}: {others[0]!r} beside {keyword!r} is not supported")
        if keyword == "$ref":
            return {"$ref": self._reference(given["$ref"], place, depth)}
        branches = given[keyword]
        if keyword == "allOf" and len(branches) > 1:
            raise SchemaError(f"{place}: 'allOf' of more than one schema is not supported")
        if keyword == "oneOf":
            self._require_exclusive(branches, place)
        places = [f"{place}/{keyword}/{index}" for index in range(len(branches))]
        rewritten = [self._rewrite(branch, where, depth + 1) for branch, where in zip(branches, places, strict=True)]
        possible = [branch for branch in rewritten if branch is not False]
        if not possible:
            raise SchemaError(f"{place}: no branch of {keyword!r} allows anything")
        return {"anyOf": possible}

    def _reference(self, reference: str, place: str, depth: int) -> str:
        """Rewrite what is referred to, once; return the new reference."""
        if reference != "#" and not reference.startswith("#/"):
            raise SchemaError(f"{place}: the reference {_short(reference)!r} is not supported; '#/...' is")
        name = self._definitions.get(reference)
        if name is None:
            name = self._definitions[reference] = str(len(self._definitions))
            target = self._rewrite(self._resolve(reference, place), reference, depth + 1)
            if target is False:
                raise SchemaError(f"{place}: {_short(reference)!r} is the schema false, which allows nothing")
            self._rewritten[name] = target
        return f"#/$defs/{name}"

    def _resolve(self, reference: str, place: str) -> Any:
        target: Any = self._root
        for part in reference.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and part.isdigit() and int(part) < len(target):
                target = target[int(part)]
            elif isinstance(target, dict) and part in target:
                target = target[part]
            else:
                raise SchemaError(f"{place}: nothing is at {_short(reference)!r}")
        if not isinstance(target, dict | bool):
            raise SchemaError(f"{place}: {_short(reference)!r} is not a schema")
        return target

    def _require_exclusive(self, branches: list[Any], place: str) -> None:
        """Refuse branches of which two might match: a grammar takes any."""
        if len(branches) > MAX_EXCLUSIVE:
            raise SchemaError(f"{place}: 'oneOf' of more than {MAX_EXCLUSIVE} schemas is not supported; use 'anyOf'")
        resolved = [
            self._resolve(b["$ref"], place) if isinstance(b, dict) and set(b) == {"$ref"} else b for b in branches
        ]
        for index, left in enumerate(resolved):
            for right in resolved[index + 1 :]:
                if not _exclusive(left, right):
                    raise SchemaError(
                        f"{place}: 'oneOf' is only supported where no value fits two branches by their type, their "
                        "constants or those of a required property; use 'anyOf'"
                    )

    def _typed(self, given: Schema, place: str, depth: int) -> Schema:
        kinds = given.get("type")
        if isinstance(kinds, list):
            return {"anyOf": [self._typed({**given, "type": kind}, place, depth) for kind in kinds]}
        if kinds is None:
            kinds = next((kind for kind, words in _TYPE_KEYWORDS.items() if given.keys() & set(words)), None)
            if kinds is None:
                return {}
        own = {key: value for key, value in given.items() if key in _TYPES[kinds]}
        out = {"type": kinds}
        match kinds:
            case "object":
                return out | self._object(own, place, depth)
            case "array":
                return out | self._array(own, place, depth)
            case "string":
                return out | _string(own, place)
            case "number" | "integer":
                return out | _number(kinds, own, place)
        return out

    def _object(self, given: Schema, place: str, depth: int) -> Schema:
        out: Schema = {key: int(value) for key, value in given.items() if key in ("minProperties", "maxProperties")}
        properties, patterns = given.get("properties", {}), given.get("patternProperties", {})
        required = list(given.get("required", ()))
        others = given.get("additionalProperties", given.get("unevaluatedProperties"))
        if others is not None:
            others = self._rewrite(others, f"{place}/additionalProperties", depth + 1)
        named = {
            name: self._rewrite(value, f"{place}/properties/{name}", depth + 1) for name, value in properties.items()
        }
        if patterns:
            self._check_property_patterns(patterns, [*named, *required], others, place)
            ((pattern, value),) = patterns.items()
            value = self._rewrite(value, f"{place}/patternProperties/{pattern}", depth + 1)
            if value is not False:
                out["patternProperties"] = {_pattern(pattern, f"{place}/patternProperties"): value}
        if "propertyNames" in given:
            if named or patterns or required:
                raise SchemaError(f"{place}: 'propertyNames' beside named properties is not supported")
            names = self._rewrite(given["propertyNames"], f"{place}/propertyNames", depth + 1)
            if names is False:
                others = False
            elif names:
                out["propertyNames"] = names if "type" in names else {"type": "string", **names}
        for name in required:  # one that is not described is of the others
            named.setdefault(name, {} if others is None else others)
            if named[name] is False:
                raise SchemaError(f"{place}: {name!r} is required and never allowed")
        # The schema false is a property that must not be; then no other may come, since it might be that one.
        forbidden = [name for name, value in named.items() if value is False]
        if named := {name: value for name, value in named.items() if value is not False}:
            out["properties"] = named
        if required:
            out["required"] = required
        if forbidden or (others is False):
            out["additionalProperties"] = False
        elif others is not None:
            out["additionalProperties"] = others
        elif not named and not patterns:
            out["additionalProperties"] = {}  # nothing is said of what an object holds: it may hold anything
        return out

    @staticmethod
    def _check_property_patterns(patterns: Schema, names: list[str], others: Any, place: str) -> None:
        if len(patterns) > 1:
            raise SchemaError(f"{place}: more than one of 'patternProperties' is not supported")
        if names:  # one that matches would have to follow both, and clients' patterns are not run here
            raise SchemaError(f"{place}: 'patternProperties' beside {names[0]!r} is not supported")
        if others not in (None, False):
            raise SchemaError(f"{place}: 'patternProperties' beside 'additionalProperties' is not supported")

    def _array(self, given: Schema, place: str, depth: int) -> Schema:
        if given.get("uniqueItems"):
            raise SchemaError(f"{place}: 'uniqueItems' is not supported: it cannot be enforced")
        items, prefix = given.get("items"), given.get("prefixItems")
        if isinstance(items, list):  # the form of drafts before 2020-12
            prefix, items = items, given.get("additionalItems")
        out: Schema = {key: int(value) for key, value in given.items() if key in ("minItems", "maxItems")}
        if prefix:
            out["prefixItems"] = [
                self._rewrite(value, f"{place}/prefixItems/{index}", depth + 1) for index, value in enumerate(prefix)
            ]
            if False in out["prefixItems"]:
                raise SchemaError(f"{place}: an item of 'prefixItems' is the schema false, which allows nothing")
        if items is None:
            items = given.get("unevaluatedItems", True if not prefix else None)
        if items is not None:
            out["items"] = self._rewrite(items, f"{place}/items", depth + 1)
        return out


def _string(given: Schema, place: str) -> Schema:
    lengths = [name for name in ("minLength", "maxLength") if name in given]
    for name in ("pattern", "format"):
        if name in given and lengths:
            raise SchemaError(f"{place}: {lengths[0]!r} beside {name!r} is not supported")
    if "pattern" in given and "format" in given:
        raise SchemaError(f"{place}: 'format' beside 'pattern' is not supported")
    if "pattern" in given:
        return {"pattern": _pattern(given["pattern"], place)}
    if lengths:
        # Said as a pattern, since xgrammar lets control characters into strings of limited length.
        low, high = int(given.get("minLength", 0)), given.get("maxLength")
        return {"pattern": f"^{_ANY_CHAR}{{{low},{'' if high is None else int(high)}}}$"}
    return given


def _number(kind: str, given: Schema, place: str) -> Schema:
    if large := [word for word, value in given.items() if abs(value) > MAX_NUMBER]:
        raise SchemaError(f"{place}: {large[0]!r} of more than 2^53 is not supported: it is no exact number")
    step = given.get("multipleOf")
    if step is not None and (kind != "integer" or len(given) > 1 or step != int(step)):
        raise SchemaError(
            f"{place}: 'multipleOf' is only supported for integers without bounds, and must be one itself"
        )
    return given if step is None else {"multipleOf": int(step)}


def _pattern(pattern: str, place: str) -> str:
    """Return a pattern for the whole string, whose matches need no escapes in JSON.

    xgrammar matches patterns from end to end, and against the JSON text: classes leave out quotes, backslashes and
    control characters there, but a pattern that names one outside a class would end the string too early.
    """
    if found := _LOOKAROUND.search(pattern):
        raise SchemaError(f"{place}: {found.group()!r} in the pattern {_short(pattern)!r} is not supported")
    if found := _NEEDS_ESCAPE.search(pattern):
        raise SchemaError(
            f"{place}: {found.group()!r} in the pattern {_short(pattern)!r} is not supported: quotes, backslashes and "
            "control characters cannot be asked for"
        )
    bare = _BRACKETED.sub("", pattern)
    pattern = _ATOM.sub(lambda atom: _ANY_CHAR if atom.group() == "." else atom.group(), pattern)
    anchored = "^" in bare or "$" in bare
    if "|" in bare:
        return pattern if anchored else f"^{_ANY_CHAR}*(?:{pattern}){_ANY_CHAR}*$"
    start = "" if pattern.startswith("^") else f"^{_ANY_CHAR}*"
    end = "" if bare.endswith("$") else f"{_ANY_CHAR}*$"
    return start + pattern + end


def _exclusive(left: Any, right: Any, depth: int = 0) -> bool:
    """Whether no value can match both schemas, as far as can be told at a glance."""
    if left is False or right is False:
        return True
    if left is True or right is True:
        return False
    values = [_listed(left), _listed(right)]
    if values[0] is not None and values[1] is not None:
        return not any(a == b and isinstance(a, bool) == isinstance(b, bool) for a in values[0] for b in values[1])
    kinds = [_kinds(left), _kinds(right)]
    if kinds[0] and kinds[1] and not kinds[0] & kinds[1]:
        return True
    if kinds != [{"object"}, {"object"}] or depth == 2:
        return False
    shared = set(left.get("required", ())) & set(right.get("required", ()))
    return any(
        _exclusive(left.get("properties", {}).get(name, True), right.get("properties", {}).get(name, True), depth + 1)
        for name in shared
    )


def _listed(schema: Schema) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema.get("enum")


def _kinds(schema: Schema) -> set[str]:
    kinds = schema.get("type", ())
    names = {kinds} if isinstance(kinds, str) else set(kinds)
    return names | {"integer"} if "number" in names else names


def _short(text: str) -> str:
    return text if len(text) <= 120 else text[:117] + "..."
