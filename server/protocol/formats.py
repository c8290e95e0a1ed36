"""The fields that say what form an answer's text must have: response_format, and vLLM's structured_outputs.

Types with OpenAI's rules, and the engine's Grammar that each of them means. Whether a grammar can be enforced is the
engine's to say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from pronk.engine.request import Grammar
from pronk.server.errors import INVALID_VALUE, APIError
from pronk.server.protocol.common import Body, json_type
from pronk.server.protocol.strict import check_strict

NAME_PATTERN = r"^[a-zA-Z0-9_-]{1,64}$"
MAX_CHOICES = 10_000
ANY_OBJECT = Grammar("json", '{"type":"object"}')


class JSONSchema(Body):
    name: Annotated[str, Field(pattern=NAME_PATTERN)] = Field(
        description="1 to 64 of the characters a-z, A-Z, 0-9, _ and -. The model does not see it."
    )
    description: str | None = Field(None, description="For the reader of the request; the model does not see it.")
    schema_: dict[str, Any] = Field(
        alias="schema", description="What the answer must be. It is enforced with strict and without."
    )
    strict: bool | None = Field(
        None, description="Check that the schema leaves nothing open: no further properties, none optional."
    )


class TextFormat(Body):
    type: Literal["text"] = Field(description="Any text.")


class JSONObjectFormat(Body):
    type: Literal["json_object"] = Field(description="A JSON object.")


class JSONSchemaFormat(Body):
    type: Literal["json_schema"] = Field(description="JSON that a schema describes.")
    json_schema: JSONSchema = Field(description="The schema and its name.")


ResponseFormat = Annotated[TextFormat | JSONObjectFormat | JSONSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Body):
    """vLLM's; exactly one of its fields."""

    json_: dict[str, Any] | str | None = Field(
        None, alias="json", description="A JSON schema, as an object or as its text."
    )
    regex: str | None = Field(None, description="A regular expression that matches the whole answer.")
    choice: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)] | None = Field(
        None, description="The answer is one of these texts."
    )
    grammar: str | None = Field(None, description="A grammar: in GBNF where it has a ::=, else in Lark's notation.")
    json_object: bool | None = Field(None, description="True: a JSON object.")


def format_grammar(response_format: TextFormat | JSONObjectFormat | JSONSchemaFormat | None) -> Grammar | None:
    """-> None for any text. Raises APIError that names the field."""
    match response_format:
        case JSONObjectFormat():
            return ANY_OBJECT
        case JSONSchemaFormat(json_schema=described):
            return json_schema_grammar(described, "response_format.json_schema")
    return None


def json_schema_grammar(described: JSONSchema, param: str) -> Grammar:
    """param: where `described` stands in the request. Raises APIError that names its schema."""
    place = f"{param}.schema"
    if described.strict:
        check_strict(described.schema_, place)
    return Grammar("json", _text(described.schema_, place))


def structured_grammar(structured: StructuredOutputs | None) -> Grammar | None:
    """-> None for any text. Raises APIError that names the field."""
    if structured is None:
        return None
    given = [name for name, value in structured if value is not None and value is not False]
    if len(given) != 1:
        names = "json, regex, choice, grammar and json_object"
        raise APIError(f"structured_outputs must have exactly one of {names}.", INVALID_VALUE, "structured_outputs")
    if structured.json_object:
        return ANY_OBJECT
    if structured.json_ is not None:
        return Grammar("json", _schema_text(structured.json_, "structured_outputs.json"))
    if structured.regex is not None:
        return Grammar("regex", structured.regex)
    if structured.choice is not None:
        return Grammar("choice", json.dumps(structured.choice))
    grammar = structured.grammar or ""
    return Grammar("gbnf" if "::=" in grammar else "lark", grammar)


def _schema_text(schema: Mapping[str, Any] | str, param: str) -> str:
    if not isinstance(schema, str):
        return _text(schema, param)
    try:
        parsed = json.loads(schema)
    except (ValueError, RecursionError):
        raise APIError(f"'{param}' is a text that is not JSON.", INVALID_VALUE, param) from None
    if not isinstance(parsed, dict):
        raise APIError(f"'{param}' must be a JSON schema, but is {json_type(parsed)}.", INVALID_VALUE, param)
    return schema


def _text(schema: Mapping[str, Any], param: str) -> str:
    try:
        return json.dumps(schema)
    except RecursionError:
        raise APIError(f"'{param}' is nested too deeply.", INVALID_VALUE, param) from None
