"""JSON schemas, rewritten for a grammar of calls: moved into another schema, or closed against further properties.

Knows where a schema holds schemas. A rewritten schema is a new one; the client's own is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Schema = Mapping[str, Any]
Change = Callable[[dict[str, Any]], dict[str, Any]]

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLE = (
    "items", "additionalProperties", "additionalItems", "unevaluatedProperties", "unevaluatedItems", "not", "if",
    "then", "else", "contains", "propertyNames",
)  # fmt: skip

# With them one object is described by several schemas at once, of which none may be closed on its own.
_JOINING = {
    "allOf", "not", "if", "then", "else", "dependentSchemas", "patternProperties", "propertyNames",
    "unevaluatedProperties", "$dynamicRef",
}  # fmt: skip
_JOINING_BESIDE_PROPERTIES = {"$ref", "anyOf", "oneOf"}


def moved(schema: Schema, place: str) -> dict[str, Any]:
    """The schema as it must be where it stands at `place`, a JSON pointer, of another one: its references to itself
    point there, and it has no `$id`, which would make them point elsewhere. Raises RecursionError for one too deep."""

    def change(part: dict[str, Any]) -> dict[str, Any]:
        reference = part.get("$ref")
        if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
            part["$ref"] = place + reference[1:]
        return part

    return {key: value for key, value in _rewritten(schema, change).items() if key not in ("$id", "id")}


def closed(schema: Schema) -> dict[str, Any]:
    """The schema, each object that names properties and says nothing of others having no others. What it lets through
    the schema itself lets through; a small model, once it has said what is asked, has nothing to add.

    A schema in which one object is described in several places stays open. Raises RecursionError for one too deep.
    """
    joining = False

    def look(part: dict[str, Any]) -> dict[str, Any]:
        nonlocal joining
        keywords = part.keys()
        joining |= not _JOINING.isdisjoint(keywords)
        joining |= "properties" in keywords and not _JOINING_BESIDE_PROPERTIES.isdisjoint(keywords)
        return part

    def close(part: dict[str, Any]) -> dict[str, Any]:
        properties, required = part.get("properties"), part.get("required", [])
        if "additionalProperties" in part or "minProperties" in part or not isinstance(properties, Mapping):
            return part
        if isinstance(required, list) and all(isinstance(name, str) and name in properties for name in required):
            part["additionalProperties"] = False
        return part

    looked_at: dict[str, Any] = _rewritten(schema, look)
    closed: dict[str, Any] = looked_at if joining else _rewritten(schema, close)
    return closed


def _rewritten(schema: Any, change: Change) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    part = dict(schema)
    for key in _MAPS:
        if isinstance(part.get(key), Mapping):
            part[key] = {name: _rewritten(value, change) for name, value in part[key].items()}
    for key in _LISTS:
        if isinstance(part.get(key), list):
            part[key] = [_rewritten(value, change) for value in part[key]]
    for key in _SINGLE:
        if isinstance(part.get(key), Mapping):
            part[key] = _rewritten(part[key], change)
    return change(part)
