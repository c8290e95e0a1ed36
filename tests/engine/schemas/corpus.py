"""JSON schemas to hold structured outputs to: every keyword with the values that matter, and some that people write.

`corpus()` gives them by name, `group/what`. Whether each is enforced or refused is not said here: it is found out, and
kept in bench/results/schemas.json and told in docs/structured-outputs.md.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Schema = dict[str, Any]
Named = Iterator[tuple[str, Any]]

REALISTIC = Path(__file__).parent / "realistic.json"
SCALARS = ("null", "boolean", "integer", "number", "string")
PATTERNS = (
    "^[a-z]+$", "^[A-Z]{2}[0-9]{3}$", "^\\d{5}(-\\d{4})?$", "^(red|green|blue)$", "^$", "^.{3}$", "foo", "^foo", "bar$",
    "a.c", "^a|b$", "^[^a-z]+$", "^\\w+@\\w+\\.com$", "^(x?){200}$", "^(a+)+$", "^[\"\\\\]{2}$", "^\\s*$", "^\\S+$",
    "^é+$", "^\\u0041[\\u0042-\\u0044]$", "^(?:ab)*$", "^[0-9a-fA-F]{8}$", "^\\+?[1-9]\\d{1,14}$", "^.*needle.*$",
    "^[\\t\\n]+$", "^\\/[a-z]*$", "^😀$", "^.*a.{3}$", "^\\$\\d+\\.\\d\\d$", "^(a|aa|aaa){2}$", "^(?=a)b", "^(a)\\1$",
    "\\bword\\b", "([", "^[a-z&&[^b]]$",
)  # fmt: skip
FORMATS = (
    "date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "regex",
    "json-pointer", "uri-reference", "iri", "idn-email", "byte", "password", "made-up",
)  # fmt: skip


def corpus() -> dict[str, Any]:
    """All of them. -> name -> schema"""
    makers = (_types, _values, _numbers, _strings, _arrays, _objects, _combined, _referring, _annotated, _refused)
    named = [item for make in makers for item in make()]
    named += [(f"realistic/{name}", schema) for name, schema in json.loads(REALISTIC.read_text()).items()]
    schemas = dict(named)
    if len(schemas) < len(named):
        raise ValueError("two schemas have the same name")
    return schemas


def _object(properties: dict[str, Any], required: list[str] | None = None, **more: Any) -> Schema:
    names = list(properties) if required is None else required
    schema: Schema = {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
    return {**schema, **more}


def _types() -> Named:
    yield "type/any", {}
    yield "type/true", True
    yield "type/false", False
    for kind in (*SCALARS, "array", "object"):
        yield f"type/{kind}", {"type": kind}
    for first, second in itertools.combinations((*SCALARS, "array", "object"), 2):
        yield f"type/{first}-or-{second}", {"type": [first, second]}
    yield "type/all", {"type": [*SCALARS, "array", "object"]}
    yield "type/unknown", {"type": "float"}


def _values() -> Named:
    constants = {
        "null": None, "true": True, "zero": 0, "minus": -1, "whole": 2.0, "fraction": 1.5, "small": 1e-7,
        "large": 10**18, "empty": "", "quote": 'say "x"\\', "control": "a\nb\tc\u0001", "accent": "é😀\u2028",
        "del": "\x7f", "array": [1, "a", None], "object": {"b": 1, "a": [True]}, "no-items": [], "no-properties": {},
    }  # fmt: skip
    for name, value in constants.items():
        yield f"value/const-{name}", {"const": value}
    yield "value/enum-strings", {"enum": ["red", "green", "blue"]}
    yield "value/enum-prefixes", {"enum": ["a", "ab", "abc", "b"]}
    yield "value/enum-numbers", {"enum": [1, 10, 100, 2.5]}
    yield "value/enum-mixed", {"enum": [None, True, 1, "1", [1], {"a": 1}]}
    yield "value/enum-of-type", {"type": "string", "enum": ["x", "y"]}
    yield "value/enum-wrong-type", {"type": "integer", "enum": ["x"]}
    yield "value/enum-empty", {"enum": []}
    yield "value/enum-long", {"enum": [f"value {number}" for number in range(500)]}
    yield "value/const-and-enum", {"const": "a", "enum": ["a", "b"]}


def _numbers() -> Named:
    for kind in ("integer", "number"):
        for low in (None, -10, 0, 3, 2.5, -1000000):
            for high in (None, 0, 7, 12.75, 1000000):
                if low is None and high is None:
                    continue
                bounds = {"minimum": low, "maximum": high}
                schema = {"type": kind, **{name: value for name, value in bounds.items() if value is not None}}
                yield f"number/{kind}-{low}-to-{high}", schema
        yield f"number/{kind}-above", {"type": kind, "exclusiveMinimum": 3}
        yield f"number/{kind}-below", {"type": kind, "exclusiveMaximum": 3}
        yield f"number/{kind}-between", {"type": kind, "exclusiveMinimum": 0, "exclusiveMaximum": 2}
        yield f"number/{kind}-both-bounds", {"type": kind, "minimum": 1, "exclusiveMinimum": 1, "maximum": 5}
        for multiple in (1, 2, 7, 100, 0.5, 0.01, 1000003, 0):
            yield f"number/{kind}-multiple-of-{multiple}", {"type": kind, "multipleOf": multiple}
        yield f"number/{kind}-multiple-in-range", {"type": kind, "multipleOf": 5, "minimum": 7, "maximum": 33}
        yield f"number/{kind}-nothing", {"type": kind, "minimum": 5, "maximum": 3}
    yield "number/int32", {"type": "integer", "format": "int32"}
    yield "number/int64", {"type": "integer", "format": "int64"}
    yield "number/double", {"type": "number", "format": "double"}
    yield "number/no-multiple", {"type": "integer", "multipleOf": 10, "minimum": 1, "maximum": 9}
    yield "number/bounds-without-type", {"minimum": 3}
    yield "number/tiny", {"type": "number", "minimum": 1e-9, "maximum": 2e-9}


def _strings() -> Named:
    for low, high in itertools.product((None, 0, 1, 5, 100), (None, 0, 3, 5, 1000)):
        bounds = {"minLength": low, "maxLength": high}
        schema = {"type": "string", **{name: value for name, value in bounds.items() if value is not None}}
        if len(schema) > 1:
            yield f"string/length-{low}-to-{high}", schema
    for pattern in PATTERNS:
        yield f"string/pattern {pattern}", {"type": "string", "pattern": pattern}
    yield "string/pattern-and-length", {"type": "string", "pattern": "^[a-z]*$", "minLength": 2, "maxLength": 4}
    yield "string/pattern-against-length", {"type": "string", "pattern": "^abc$", "maxLength": 2}
    yield "string/pattern-without-type", {"pattern": "^a$"}
    for name in FORMATS:
        yield f"string/format-{name}", {"type": "string", "format": name}
    yield "string/format-and-pattern", {"type": "string", "format": "date", "pattern": "^2"}
    yield "string/nothing", {"type": "string", "minLength": 5, "maxLength": 3}
    yield "string/huge-maximum", {"type": "string", "maxLength": 10**9}
    yield "string/huge-minimum", {"type": "string", "minLength": 10**9}


def _arrays() -> Named:
    for kind in (*SCALARS, "array", "object"):
        yield f"array/of-{kind}", {"type": "array", "items": {"type": kind}}
    for low, high in itertools.product((None, 0, 1, 3), (None, 0, 2, 5)):
        bounds = {"minItems": low, "maxItems": high}
        schema = {"type": "array", **{name: value for name, value in bounds.items() if value is not None}}
        if len(schema) > 1:
            yield f"array/any-{low}-to-{high}", schema
            yield f"array/integers-{low}-to-{high}", {**schema, "items": {"type": "integer"}}
    pair = [{"type": "integer"}, {"type": "string"}]
    yield "array/prefix", {"type": "array", "prefixItems": pair}
    yield "array/prefix-closed", {"type": "array", "prefixItems": pair, "items": False}
    yield "array/tuple", {"type": "array", "prefixItems": pair, "items": False, "minItems": 2}
    yield (
        "array/prefix-then-booleans",
        {"type": "array", "prefixItems": pair, "items": {"type": "boolean"}, "minItems": 3},
    )
    yield "array/items-false", {"type": "array", "items": False}
    yield "array/items-false-but-one", {"type": "array", "items": False, "minItems": 1}
    yield "array/nested", {"type": "array", "items": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}}
    yield "array/of-enum", {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2}
    yield "array/draft-7-tuple", {
        "$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "items": pair, "additionalItems": False
    }  # fmt: skip
    yield "array/not-unique", {"type": "array", "items": {"type": "integer"}, "uniqueItems": False}
    yield "array/huge-minimum", {"type": "array", "minItems": 10**9}
    yield "array/huge-maximum", {"type": "array", "items": {"type": "integer"}, "maxItems": 10**9}


def _objects() -> Named:
    properties = {"a": {"type": "integer"}, "b": {"type": "string"}, "c": {"type": "boolean"}}
    names = list(properties)
    for count in range(len(names) + 1):
        for required in itertools.combinations(names, count):
            for name, additional in (("closed", False), ("open", True), ("integers", {"type": "integer"})):
                schema = {"type": "object", "properties": properties, "required": list(required)}
                yield (
                    f"object/requires-{''.join(required) or 'nothing'}-{name}",
                    {**schema, "additionalProperties": additional},
                )
    yield "object/map", {"type": "object", "additionalProperties": {"type": "number"}}
    yield "object/empty-only", {"type": "object", "additionalProperties": False}
    yield "object/required-unnamed", {"type": "object", "required": ["x"]}
    yield "object/required-but-refused", {"type": "object", "required": ["x"], "additionalProperties": False}
    yield "object/property-true", _object({"a": True, "b": {}})
    yield "object/property-false", _object({"a": False}, [])
    yield (
        "object/odd-names",
        _object({'q"': {"type": "null"}, "é\n": {"type": "null"}, "": {"type": "null"}, "a/~b": {}}),
    )
    yield "object/name-is-prefix", _object({"a": {"type": "null"}, "ab": {"type": "null"}, "abc": {"type": "null"}}, [])
    yield "object/reversed-required", _object({"a": {"type": "null"}, "b": {"type": "null"}}, ["b", "a"])
    yield "object/pattern-names", {"type": "object", "patternProperties": {"^x-": {"type": "integer"}}}
    yield "object/pattern-names-closed", {
        "type": "object", "patternProperties": {"^[a-c]$": {"type": "integer"}}, "additionalProperties": False
    }  # fmt: skip
    yield "object/pattern-names-overlap", {
        "type": "object", "patternProperties": {"^a": {"type": "integer"}, "b$": {"type": "string"}}
    }  # fmt: skip
    for keyword, count in itertools.product(("minProperties", "maxProperties"), (0, 1, 2, 5)):
        yield f"object/{keyword}-{count}", {"type": "object", keyword: count}
        yield f"object/{keyword}-{count}-of-optional", _object(properties, [], **{keyword: count})
        yield f"object/{keyword}-{count}-of-required", _object(properties, names, **{keyword: count})
    nested: Schema = {"type": "integer"}
    for depth in range(1, 13):
        nested = _object({"a": nested})
        if depth in (3, 6, 12):
            yield f"object/nested-{depth}", nested
    yield "object/many", _object({f"property_{number}": {"type": "boolean"} for number in range(60)})
    yield "object/many-optional", _object({f"p{number}": {"type": "boolean"} for number in range(60)}, [])
    yield "object/without-type", {"properties": {"a": {"type": "integer"}}, "required": ["a"]}


def _combined() -> Named:
    text, whole = {"type": "string"}, {"type": "integer"}
    cat = _object({"kind": {"const": "cat"}, "lives": {"type": "integer", "minimum": 1, "maximum": 9}})
    dog = _object({"kind": {"const": "dog"}, "name": {"type": "string"}})
    for keyword in ("anyOf", "oneOf"):
        yield f"combined/{keyword}-scalars", {keyword: [text, whole, {"type": "null"}]}
        yield f"combined/{keyword}-tagged", {keyword: [cat, dog]}
        yield f"combined/{keyword}-referred", {
            "$defs": {"cat": cat, "dog": dog}, keyword: [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}]
        }  # fmt: skip
        yield f"combined/{keyword}-enums", {keyword: [{"enum": ["a", "b"]}, {"enum": ["c"]}]}
        yield f"combined/{keyword}-overlapping-enums", {keyword: [{"enum": ["a", "b"]}, {"enum": ["b", "c"]}]}
        yield f"combined/{keyword}-same", {keyword: [text, text]}
        yield f"combined/{keyword}-overlap", {keyword: [{"type": "number"}, whole]}
        yield f"combined/{keyword}-untagged", {keyword: [_object({"a": whole}), _object({"b": whole})]}
        yield f"combined/{keyword}-string-or-tag", {keyword: [{"type": "string", "maxLength": 3}, {"const": "longer"}]}
        yield (
            f"combined/{keyword}-arrays",
            {keyword: [{"type": "array", "items": text}, {"type": "array", "items": whole}]},
        )
        yield f"combined/{keyword}-one", {keyword: [text]}
        yield f"combined/{keyword}-none", {keyword: []}
        yield f"combined/{keyword}-false", {keyword: [False, whole]}
        yield (
            f"combined/{keyword}-with-sibling",
            {"type": "integer", "minimum": 3, keyword: [{"maximum": 5}, {"maximum": 9}]},
        )
        yield f"combined/{keyword}-of-property", _object({"x": {keyword: [text, {"type": "null"}]}})
    yield "combined/anyOf-and-oneOf", {"anyOf": [text, whole], "oneOf": [text, {"type": "null"}]}
    yield "combined/allOf-bounds", {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 9}]}
    yield "combined/allOf-multiples", {"type": "integer", "allOf": [{"multipleOf": 4}, {"multipleOf": 6}]}
    yield (
        "combined/allOf-objects",
        {
            "allOf": [
                {"type": "object", "properties": {"a": whole}, "required": ["a"]},
                {"type": "object", "properties": {"b": text}, "required": ["b"]},
            ]
        },
    )
    yield (
        "combined/allOf-same-property",
        {
            "allOf": [
                _object({"a": {"type": "integer", "minimum": 2}}),
                _object({"a": {"type": "integer", "maximum": 4}}),
            ]
        },
    )
    yield "combined/allOf-patterns", {"type": "string", "allOf": [{"pattern": "^a"}, {"pattern": "z$"}]}
    yield "combined/allOf-lengths", {"type": "string", "allOf": [{"minLength": 2}, {"maxLength": 3}]}
    yield (
        "combined/allOf-arrays",
        {
            "allOf": [
                {"type": "array", "items": {"minimum": 1}},
                {"items": {"type": "integer", "maximum": 3}},
                {"maxItems": 4},
            ]
        },
    )
    yield "combined/allOf-contradiction", {"allOf": [text, whole]}
    yield "combined/allOf-anyOf", {"allOf": [{"anyOf": [text, whole]}, {"anyOf": [whole, {"type": "null"}]}]}
    yield "combined/allOf-one", {"allOf": [cat]}
    yield "combined/nested-anyOf", {"anyOf": [{"anyOf": [text, whole]}, {"anyOf": [{"type": "null"}, cat]}]}


def _referring() -> Named:
    yield "ref/simple", {"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n"}
    yield "ref/definitions", {"definitions": {"n": {"type": "integer"}}, "$ref": "#/definitions/n"}
    yield (
        "ref/chain",
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/c"}, "c": {"enum": [1]}}, "$ref": "#/$defs/a"},
    )
    yield "ref/with-sibling", {"$defs": {"n": {"type": "integer", "minimum": 2}}, "$ref": "#/$defs/n", "maximum": 4}
    yield "ref/anchor", {"$defs": {"n": {"$anchor": "here", "type": "integer"}}, "$ref": "#here"}
    yield "ref/escaped", {"$defs": {"a/b~c%": {"type": "integer"}}, "$ref": "#/$defs/a~1b~0c%25"}
    yield "ref/to-property", _object({"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}})
    yield (
        "ref/list",
        {
            "$defs": {
                "node": _object(
                    {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}
                )
            },
            "$ref": "#/$defs/node",
        },
    )
    yield "ref/tree", _object({"value": {"type": "string"}, "kids": {"type": "array", "items": {"$ref": "#"}}})
    yield (
        "ref/mutual",
        {
            "$defs": {
                "a": _object({"b": {"$ref": "#/$defs/b"}}, []),
                "b": _object({"a": {"$ref": "#/$defs/a"}}, []),
            },
            "$ref": "#/$defs/a",
        },
    )
    yield (
        "ref/expression",
        {
            "$defs": {
                "e": {
                    "anyOf": [
                        {"type": "number"},
                        _object(
                            {"op": {"enum": ["+", "*"]}, "left": {"$ref": "#/$defs/e"}, "right": {"$ref": "#/$defs/e"}}
                        ),
                    ]
                }
            },
            "$ref": "#/$defs/e",
        },
    )
    yield "ref/itself", {"$ref": "#"}
    yield "ref/endless", _object({"a": {"$ref": "#"}})
    yield "ref/missing", {"$ref": "#/$defs/nowhere"}
    yield "ref/remote", {"$ref": "https://example.com/schema.json"}
    yield "ref/file", {"$ref": "file:///etc/hostname"}
    yield "ref/relative", {"$ref": "other.json"}
    yield "ref/dynamic", {"$dynamicRef": "#x"}
    yield "ref/nested-id", {"properties": {"a": {"$id": "https://example.com/a", "type": "integer"}}}


def _annotated() -> Named:
    notes = {
        "title": "T", "description": "D", "default": 1, "examples": [1], "example": 1, "deprecated": True,
        "readOnly": True, "writeOnly": True, "$comment": "C", "$id": "https://example.com/s",
        "contentMediaType": "text/plain",
        "contentEncoding": "base64", "contentSchema": {"type": "string"}, "externalDocs": {}, "xml": {},
        "x-order": 3, "discriminator": {"propertyName": "a"}, "markdownDescription": "D",
    }  # fmt: skip
    for name, note in notes.items():
        yield f"annotation/{name}", {"type": "integer", name: note}
    for draft in ("draft-04", "draft-06", "draft-07"):
        yield f"annotation/{draft}", {"$schema": f"http://json-schema.org/{draft}/schema#", "type": "integer"}
    for draft in ("2019-09", "2020-12"):
        yield f"annotation/{draft}", {"$schema": f"https://json-schema.org/draft/{draft}/schema", "type": "integer"}
    yield "annotation/draft-4-exclusive", {
        "$schema": "http://json-schema.org/draft-04/schema#", "type": "integer", "minimum": 1, "exclusiveMinimum": True
    }  # fmt: skip
    yield "annotation/other-draft", {"$schema": "https://example.com/own", "type": "integer"}
    yield "annotation/nullable-false", {"type": "integer", "nullable": False}


def _refused() -> Named:
    whole = {"type": "integer"}
    keywords = {
        "not": whole, "if": whole, "then": whole, "else": whole, "contains": whole, "minContains": 1, "maxContains": 2,
        "uniqueItems": True, "propertyNames": {"pattern": "^a"}, "dependentRequired": {"a": ["b"]},
        "dependentSchemas": {"a": whole}, "dependencies": {"a": ["b"]}, "unevaluatedItems": False,
        "unevaluatedProperties": False, "$dynamicAnchor": "x", "$recursiveRef": "#", "$recursiveAnchor": True,
        "$vocabulary": {}, "nullable": True, "extends": whole, "disallow": "string", "divisibleBy": 2,
        "minlength": 3, "additionalproperties": False, "requird": ["a"], "x-guidance": {"lenient": True},
    }  # fmt: skip
    for name, value in keywords.items():
        yield f"refused/{name}", {name: value}
    yield "refused/in-property", _object({"a": {"type": "array", "uniqueItems": True}})
    yield "refused/anyOf-number", {"anyOf": 1}
    yield "refused/properties-list", {"properties": []}
    yield "refused/property-number", {"properties": {"a": 1}}
    yield "refused/required-true", {"properties": {"a": {}}, "required": True}
    yield "refused/min-text", {"type": "string", "minLength": "3"}
    yield "refused/not-an-object", [1]
