"""Formats of answers beside which there are calls: what of them could be read as a call, {"name": "f", "parameters":
{...}}, is taken out of them, or they cannot stand there.

Without this a call that breaks its own strict schema would be an answer of the format, and be read as a call all the
same. Knows JSON schemas, regular expressions and texts; no grammar. A schema that is none is left for others to refuse.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

Schema = Mapping[str, Any]

_SPACE = "[ \\t\\n\\r]*"
_SEVERAL = {"$ref", "anyOf", "oneOf", "allOf", "enum", "const"}


def call_pattern(names: Collection[str]) -> str:
    """A regular expression of every text that begins like a call of one of these functions, in the taught form."""
    any_name = "|".join(re.escape(name) for name in sorted(names))
    return rf'{_SPACE}\{{{_SPACE}"name"{_SPACE}:{_SPACE}"({any_name})"{_SPACE},{_SPACE}"parameters"[\s\S]*'


def without_calls(schema: Schema, strict: Collection[str]) -> dict[str, Any] | None:
    """The schema without the objects that could be calls of the functions named in `strict`; None where that cannot be
    said in a schema. An object that may have any property may not have `parameters`, whatever functions there are.

    Raises RecursionError for one that is too deep.
    """
    return _narrowed(schema, _Answers(schema, strict))


def _narrowed(schema: Schema, answers: _Answers) -> dict[str, Any] | None:
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        return dict(schema)
    named = "parameters" in properties or "parameters" in required
    if not (named or schema.get("additionalProperties") is False or not _SEVERAL.isdisjoint(schema)):
        return {**schema, "properties": {**properties, "parameters": False}}
    if answers.are_no_calls(schema):
        return dict(schema)
    for keyword in ("anyOf", "oneOf"):
        options = [_narrowed_option(option, answers) for option in _listed(schema, keyword)]
        if options and None not in options:
            return {**schema, keyword: options}
    return None


def _narrowed_option(option: Any, answers: _Answers) -> Any:
    if answers.are_no_calls(option):
        return option
    return _narrowed(option if isinstance(option, Mapping) else {}, answers)


class _Answers:
    """Whether values of a schema could be read as calls. Each schema is looked at once."""

    def __init__(self, root: Schema, strict: Collection[str]) -> None:
        self._root = root
        self._strict = strict
        self._known: dict[int, bool] = {}

    def are_no_calls(self, schema: Any) -> bool:
        """False where that is not plain, as of a schema that refers to itself."""
        if not self._strict or not isinstance(schema, Mapping):
            return not self._strict or schema is False
        if id(schema) not in self._known:
            self._known[id(schema)] = False
            self._known[id(schema)] = self._by_itself(schema) or self._by_others(schema)
        return self._known[id(schema)]

    def _by_others(self, schema: Schema) -> bool:
        """By the schemas that it is put together from."""
        if any(self.are_no_calls(part) for part in _listed(schema, "allOf")):
            return True
        if "$ref" in schema and self.are_no_calls(self._target(schema["$ref"])):
            return True
        options = [_listed(schema, keyword) for keyword in ("anyOf", "oneOf")]
        return any(parts and all(self.are_no_calls(part) for part in parts) for parts in options)

    def _by_itself(self, schema: Schema) -> bool:
        """By what the schema says without others."""
        if "const" in schema or isinstance(schema.get("enum"), list):
            values = [schema["const"]] if "const" in schema else schema["enum"]
            return not any(self._is_call(value) for value in values)
        if not _may_be(schema, "object"):
            return True
        properties = schema.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        closed = schema.get("additionalProperties") is False and "patternProperties" not in schema
        for name, kind in (("name", "string"), ("parameters", "object")):
            if name not in properties:
                if closed:
                    return True
            elif not _may_be(properties[name], kind):
                return True
        return self._has_other_name(properties.get("name"))

    def _has_other_name(self, name: Any) -> bool:
        if not isinstance(name, Mapping):
            return False
        if "const" in name:
            return not self._is_strict(name["const"])
        values = name.get("enum")
        return isinstance(values, list) and not any(self._is_strict(value) for value in values)

    def _is_call(self, value: Any) -> bool:
        return isinstance(value, Mapping) and self._is_strict(value.get("name")) and "parameters" in value

    def _is_strict(self, name: Any) -> bool:
        return isinstance(name, str) and name in self._strict

    def _target(self, reference: Any) -> Any:
        """-> the schema that is referred to; True, which could be anything, for none."""
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            return True
        at: Any = self._root
        for step in reference.split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(at, Mapping) or name not in at:
                return True
            at = at[name]
        return at


def _listed(schema: Schema, keyword: str) -> list[Any]:
    value = schema.get(keyword)
    return value if isinstance(value, list) else []


def _may_be(schema: Any, kind: str) -> bool:
    """Whether by its type a value may be of this one."""
    if not isinstance(schema, Mapping):
        return schema is not False
    types = schema.get("type", kind)
    return kind in types if isinstance(types, str | list) else True
