"""What `strict` demands of a JSON schema, as OpenAI has it: nothing optional and nothing further in any object.

Knows no field of a request, and not which keywords can be enforced: that is the grammar's to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pronk.server.errors import INVALID_VALUE, APIError

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")


def check_strict(schema: Mapping[str, Any], param: str) -> None:
    """Raises APIError, naming the place, for a schema that is not of an object, or that has an object in which
    `additionalProperties` is not false or a property is not required.

    param: where the schema stands in the request.
    """
    if schema.get("type") != "object":
        raise _wrong(param, 'must have "type": "object" where strict is true')
    for place, part in _schemas(schema, param):
        kind = part.get("type")
        if kind != "object" and not (isinstance(kind, list) and "object" in kind) and "properties" not in part:
            continue
        if part.get("additionalProperties") is not False:
            raise _wrong(place, 'must have "additionalProperties": false where strict is true')
        properties = part.get("properties", {})
        required = part.get("required", [])
        missing = [name for name in properties if not isinstance(required, list) or name not in required]
        if missing:
            raise _wrong(place, f"must name the property '{missing[0]}' in required where strict is true")


def _wrong(place: str, rule: str) -> APIError:
    return APIError(f"'{place}' {rule}.", INVALID_VALUE, place)


def _schemas(schema: Mapping[str, Any], param: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """-> the schema and all schemas inside it, each with its place. Not recursive: a schema may be deep."""
    waiting: list[tuple[str, object]] = [(param, schema)]
    while waiting:
        place, part = waiting.pop()
        if not isinstance(part, Mapping):
            continue
        yield place, part
        inside: list[tuple[str, object]] = [(f"{place}.{key}", part.get(key)) for key in _SINGLE]
        for key in _MAPS:
            named = part.get(key)
            if isinstance(named, Mapping):
                inside += [(f"{place}.{key}.{name}", value) for name, value in named.items()]
        for key in _LISTS:
            listed = part.get(key)
            if isinstance(listed, list):
                inside += [(f"{place}.{key}[{index}]", value) for index, value in enumerate(listed)]
        waiting += reversed(inside)
