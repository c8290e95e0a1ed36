"""The description of the API at /openapi.json: what the framework knows, made right by what holds for all of it.

Every object of a request takes null for a field that may be left out, and an unknown field only as null. What is
described as refused can only be null, and kinds of objects that are refused are not described. Every answer that says
no has one shape. Knows OpenAPI's form; no endpoint by name.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pronk.engine.errors import PronkError

Schema = dict[str, Any]

EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {
        "data": {"type": "string", "description": "A JSON object; at the end of some streams the text [DONE]."},
        "event": {"type": "string"},
    },
}
# itemSchema describes one event. It is OpenAPI 3.2's: 3.1 has no word for it, and takes `schema` for the whole stream.
STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"itemSchema": EVENT}}}}
"""For a route whose answer may also be a stream."""
REFUSED = "Refused:"
"""How the description begins of a field that is known and not served, or of the `type` of such an object."""
ERROR = {
    "type": "object",
    "description": "What every answer that says no is made of.",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_REFUSAL = {
    "description": "OpenAI's error object",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}


class DescriptionError(PronkError):
    """Two parts of the API go by one name."""


def complete(document: Schema, *, open_paths: Collection[str] = ()) -> Schema:
    """document: the framework's, whose request bodies are of `protocol.common.schema_of`; changed in place.

    open_paths: those that need no key. Raises DescriptionError.
    """
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas["Error"] = ERROR
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                content["schema"] = _hoisted(content["schema"], schemas)
            operation["responses"].update({"4XX": _REFUSAL, "5XX": _REFUSAL})
            if path not in open_paths:
                operation["security"] = [{"key": []}, {}]  # a server may be started without keys
    return document


def _hoisted(schema: Schema, schemas: dict[str, Schema]) -> Schema:
    """-> the schema, with its definitions where its references look for them."""
    own = dict(schema)
    definitions = own.pop("$defs", {})
    refused = {f"#/components/schemas/{name}" for name, definition in definitions.items() if _is_refused(definition)}
    for name, definition in definitions.items():
        if _is_refused(definition):
            continue
        told = _with_nulls(_without(definition, refused))
        if schemas.setdefault(name, told) != told:
            raise DescriptionError(f"two bodies are called {name}: rename one of the classes")
    return _with_nulls(_without(own, refused))


def _is_refused(definition: Schema) -> bool:
    return str(definition.get("properties", {}).get("type", {}).get("description", "")).startswith(REFUSED)


def _without(part: Any, references: Collection[str]) -> Any:
    """-> the part of a schema, in which no reference to one of these is left to choose."""
    if isinstance(part, dict):
        return {key: _without(value, references) for key, value in part.items() if key != "discriminator"}
    if isinstance(part, list):
        return [_without(one, references) for one in part if not _refers(one, references)]
    return part


def _refers(part: Any, references: Collection[str]) -> bool:
    return isinstance(part, dict) and part.get("$ref") in references


def _with_nulls(schema: Schema) -> Schema:
    """null says the same as leaving a field out, whether it is known or not."""
    if "anyOf" in schema:
        return {**schema, "anyOf": [_with_nulls(part) for part in schema["anyOf"]]}
    if schema.get("type") != "object":
        return schema
    required = schema.get("required", ())
    properties = {
        name: part if name in required else _nullable(part) for name, part in schema.get("properties", {}).items()
    }
    told = {**schema, "properties": properties}
    if schema.get("additionalProperties") is False:
        told["additionalProperties"] = {"type": "null"}
    return told


def _nullable(schema: Schema) -> Schema:
    if schema.get("description", "").startswith(REFUSED):
        return {"type": "null", "description": schema["description"]}
    kinds = schema.get("anyOf", [])
    if {"type": "null"} in kinds or not (schema.keys() & {"type", "$ref", "anyOf", "oneOf", "const", "enum"}):
        return schema
    about = {key: value for key, value in schema.items() if key in ("title", "description", "default")}
    return {"anyOf": [{key: value for key, value in schema.items() if key not in about}, {"type": "null"}], **about}
