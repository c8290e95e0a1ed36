"""What all request bodies share: reading JSON strictly, and telling one fault at a time in a client's words.

Knows no endpoint. Types are strict ("1" is no number, 1.0 is no integer), an explicit null says the same as leaving
the field out, and a field that is not declared is an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from pronk.server.errors import (
    BAD_JSON,
    INVALID_TYPE,
    INVALID_VALUE,
    MISSING,
    UNKNOWN_PARAMETER,
    UNSUPPORTED,
    Answer,
    APIError,
)

MAX_NUMBER_LENGTH = 4000


class Body(BaseModel):
    """Base of every object in a request."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if value is not None}
        return data

    def check(self) -> None:
        """What the types cannot say. Raises APIError; called once on the outermost object."""


class StreamOptions(Body):
    include_usage: bool = Field(False, description="Send one more chunk with the usage before [DONE].")
    include_obfuscation: Literal[False] = Field(
        False, description="Chunks are not padded against an observer of their sizes; only false is accepted."
    )


Stop = Annotated[str | list[str], Field(union_mode="left_to_right")]

Request = TypeVar("Request", bound=Body)


def parse(kind: type[Request], body: bytes) -> Request:
    """body: JSON, whatever the content type says. -> a checked request.

    Raises APIError (400) that names the first field at fault.
    """
    data = read_json(body)
    if not isinstance(data, dict):
        raise APIError(f"The request body must be a JSON object, but is {json_type(data)}.", BAD_JSON)
    try:
        request = kind.model_validate(data)
    except ValidationError as error:
        # `url` and `context` are left out: an exception in `context` need not be printable.
        raise _told(error.errors(include_url=False, include_context=False)[0], data) from None
    request.check()
    return request


def read_json(body: bytes) -> Any:
    """RFC 8259 without extensions: no NaN, no lone surrogates, UTF-8 only. Raises APIError (400)."""
    try:
        return msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        message = f"The request body is not UTF-8: byte {error.start} cannot be read."
    except RecursionError:
        message = "The request body is nested too deeply."
    except msgspec.DecodeError as error:  # also its ValidationError: a number that fits in no type
        message = f"The request body is not valid JSON: {str(error).removeprefix('JSON is malformed: ')}."
    raise APIError(message, BAD_JSON)


def refuse(name: str, sentence: str) -> APIError:
    """-> the 400 for a field whose meaning is known and not served. To be raised."""
    return APIError(sentence, UNSUPPORTED, name)


def json_type(value: Any) -> str:
    """A value's kind in JSON's words."""
    match value:
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
        case dict():
            return "an object"
    return "null"


def _told(detail: ErrorDetails, body: dict[str, Any]) -> APIError:
    """One pydantic error -> the 400 that a client reads."""
    param = _path(detail, body)
    kind, message = detail["type"], detail["msg"]
    if kind == "missing":
        return APIError(f"'{param}' is required.", MISSING, param)
    if kind == "extra_forbidden":
        return APIError(
            f"'{param}' is not a parameter of this endpoint. It is refused because ignoring it could change the "
            "answer: leave it out.",
            UNKNOWN_PARAMETER,
            param,
        )
    rule = message.removeprefix("Value error, ").removeprefix("Input should be ")
    answer: Answer = INVALID_VALUE
    if kind.endswith("_type"):
        answer = INVALID_TYPE
        rule = f"{rule}, but is {json_type(detail['input'])}"
    return APIError(
        f"'{param}' must be {rule}." if message.startswith("Input") else f"'{param}': {rule}", answer, param
    )


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
