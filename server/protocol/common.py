"""What all request bodies share: reading JSON strictly, and telling one fault at a time in a client's words.

Knows no endpoint. Types are strict ("1" is no number, 1.0 is no integer), an explicit null says the same as leaving
the field out, and a field that is not declared is an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator
from pydantic_core import ErrorDetails

from pronk.server.errors import (
    BAD_JSON,
    INVALID_TYPE,
    INVALID_VALUE,
    MISSING,
    UNKNOWN_PARAMETER,
    UNSUPPORTED,
    APIError,
)


class Body(BaseModel):
    """Base of every object in a request."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        """Also leaves out all unknown fields but the first: only one is told, and a million would cost seconds."""
        if not isinstance(data, dict):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        if cls.model_config["extra"] == "forbid":
            known = {field.alias or name for name, field in cls.model_fields.items()}
            unknown = [name for name in given if name not in known]
            for name in unknown[1:]:
                del given[name]
        return given

    def check(self) -> None:
        """What the types cannot say. Raises APIError; called once on the outermost object."""


def told(kind: str, **rules: Any) -> WithJsonSchema:
    """For Annotated: how a value is described whose rules are kept elsewhere, in JSON schema's words."""
    return WithJsonSchema({"type": kind, **rules})


Share = Annotated[float, told("number", minimum=0, maximum=1)]
Temperature = Annotated[float, told("number", minimum=0, maximum=2)]


class StreamOptions(Body):
    include_usage: bool = Field(False, description="Send one more chunk with the usage before [DONE].")
    continuous_usage_stats: bool = Field(False, description="Tell in every chunk the usage so far.")
    include_obfuscation: bool = Field(
        False, description="Only false: chunks are not padded against an observer of their sizes."
    )


MAX_TYPES = 8
"""Faults that are looked at to tell one: more types than any union here has."""

# What a name that was once or is elsewhere a field's is called here.
RENAMED = {
    "guided_json": "structured_outputs.json",
    "guided_regex": "structured_outputs.regex",
    "guided_choice": "structured_outputs.choice",
    "guided_grammar": "structured_outputs.grammar",
    "guided_decoding_backend": "structured_outputs",
    "guided_whitespace_pattern": "structured_outputs",
    "regex": "structured_outputs.regex",
    "ebnf": "structured_outputs.grammar",
    "grammar": "structured_outputs.grammar",
    "json_schema": "structured_outputs.json",
}

Request = TypeVar("Request", bound=Body)


def parse(kind: type[Request], body: bytes) -> Request:
    """body: JSON, whatever the content type says. -> a checked request.

    Raises APIError (400) that names the first field at fault.
    """
    return validate(kind, read_object(body))


def read_object(body: bytes) -> dict[str, Any]:
    """Raises APIError (400) for what is not a JSON object."""
    data = read_json(body)
    if not isinstance(data, dict):
        raise APIError(f"The request body must be a JSON object, but is {json_type(data)}.", BAD_JSON)
    return data


def validate(kind: type[Request], data: dict[str, Any]) -> Request:
    """-> a checked request. Raises APIError (400) that names the first field at fault."""
    try:
        request = kind.model_validate(data)
    except ValidationError as error:
        raise _told(_first(error.errors(include_url=False), data), data) from None
    request.check()
    return request


def schema_of(kind: type[Body]) -> dict[str, Any]:
    """-> its JSON schema for OpenAPI; `openapi.complete` moves what its references name."""
    return kind.model_json_schema(ref_template="#/components/schemas/{model}")


def read_json(body: bytes) -> Any:
    """RFC 8259 without extensions: no NaN, no lone surrogates, UTF-8 only. Raises APIError (400)."""
    try:
        return msgspec.json.decode(body)
    except UnicodeDecodeError:
        message = _not_utf8(body)
    except RecursionError:
        message = "The request body is nested too deeply."
    except msgspec.DecodeError as error:  # also its ValidationError: a number that fits in no type
        message = f"The request body is not valid JSON: {_fault(body, error)}."
    raise APIError(message, BAD_JSON)


def _not_utf8(body: bytes) -> str:
    try:
        body.decode()
    except UnicodeDecodeError as error:  # msgspec's counts from the beginning of the string that it is in
        return f"The request body is not UTF-8: byte {error.start} cannot be read."
    return "The request body is not UTF-8."


def _fault(body: bytes, error: msgspec.DecodeError) -> str:
    if not body.strip():
        return "it is empty"
    half = _HALF_CHARACTER.search(body)
    if half is not None:  # msgspec looks for its other half in what follows, and does not find that
        return f"it holds one half of a surrogate pair (byte {half.start()}): a text was cut within a character"
    return str(error).removeprefix("JSON is malformed: ")


def refuse(name: str, sentence: str) -> APIError:
    """-> the 400 for a field whose meaning is known and not served. To be raised."""
    return APIError(sentence, UNSUPPORTED, name)


# A surrogate's escape beside which there is not the other half's.
_HALF_CHARACTER = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)


def json_type(value: Any) -> str:
    """A value's kind in JSON's words."""
    match value:
        case bool():
            return "a boolean"
        case int():
            return "an integer"
        case float():
            return "a decimal number"
        case str():
            return "a string"
        case list():
            return "an array"
        case dict():
            return "an object"
    return "null"


_WANTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}


def _first(errors: Sequence[ErrorDetails], body: dict[str, Any]) -> ErrorDetails:
    """Where a value is of no type of a union, the fault is in the type that it is nearest to: `stop[1]`, not `stop`."""
    first = errors[0]
    place = _path(first, body)
    within = (error for error in errors[1:MAX_TYPES] if _path(error, body).startswith((f"{place}.", f"{place}[")))
    return next(within, first) if first["type"] in _WANTED else first


def _told(detail: ErrorDetails, body: dict[str, Any]) -> APIError:
    """One pydantic error -> the 400 that a client reads."""
    param = _path(detail, body)
    kind = detail["type"]
    context = detail.get("ctx", {})
    if kind.startswith("union_tag_"):  # no role, or one that does not exist
        param = f"{param}.{context['discriminator'].strip(chr(39))}"
        kind = "missing" if kind == "union_tag_not_found" else kind
    if kind == "missing":
        return APIError(f"'{param}' is required.", MISSING, param)
    if kind == "extra_forbidden" and param in RENAMED:
        return refuse(param, f"'{param}' is not a field here: use '{RENAMED[param]}'.")
    if kind == "extra_forbidden":
        return APIError(
            f"'{param}' is unknown here, and ignoring it could change the answer: leave it out.",
            UNKNOWN_PARAMETER,
            param,
        )
    if kind in _WANTED:
        found = json_type(detail["input"])
        fault = "is too large" if found == "an integer" and kind == "float_type" else f"is {found}"
        return APIError(f"'{param}' must be {_WANTED[kind]}, but {fault}.", INVALID_TYPE, param)
    rules = {
        "union_tag_invalid": "must be one of {expected_tags}",
        "too_short": "must hold at least {min_length} item",
        "too_long": "must hold at most {max_length} items",
        "string_pattern_mismatch": "must match {pattern}",
        "string_too_short": "must not be empty",
        "string_too_long": "must have at most {max_length} characters",
    }
    rule = rules[kind].format_map(context) if kind in rules else detail["msg"].replace("Input should", "must", 1)
    return APIError(f"'{param}' {rule}.", INVALID_VALUE, param)


def _path(detail: ErrorDetails, body: dict[str, Any]) -> str:
    """Where in the body: `messages[0].content`. Names of union members, which pydantic adds, are no part of it."""
    place: Any = body
    path = ""
    for index, part in enumerate(detail["loc"]):
        is_last = index == len(detail["loc"]) - 1
        if isinstance(part, int) and isinstance(place, list):
            path += f"[{part}]"
            place = place[part] if part < len(place) else None
        elif isinstance(place, dict) and (
            part in place or (is_last and detail["type"] in ("missing", "extra_forbidden"))
        ):
            path += f".{part}" if path else str(part)
            place = place.get(part)
    return path
