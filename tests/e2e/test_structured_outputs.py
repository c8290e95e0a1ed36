"""Random weights held to formats and to calls, over HTTP: what comes out always parses."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest

from .serving import Server, client_of

MESSAGES: Any = [{"role": "user", "content": "Tell me of a llama."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "legs": {"type": "integer"},
        "woolly": {"type": "boolean"},
    },
    "required": ["name", "legs", "woolly"],
    "additionalProperties": False,
}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "llama", "schema": SCHEMA, "strict": True}}
TOOL: Any = {"type": "function", "function": {"name": "feed", "parameters": SCHEMA, "strict": True}}
WILD: Any = {"model": "tiny", "messages": MESSAGES, "seed": 1, "n": 4, "temperature": 1.5, "max_tokens": 120}


def is_a_llama(text: str) -> bool:
    value = json.loads(text)
    return list(value) == ["name", "legs", "woolly"] and len(value["name"]) <= 8 and isinstance(value["woolly"], bool)


async def test_a_schema(server: Server) -> None:
    async with client_of(server) as client:
        whole = await client.chat.completions.create(**WILD, response_format=FORM)
        assert all(is_a_llama(choice.message.content or "") for choice in whole.choices)
        assert {choice.finish_reason for choice in whole.choices} == {"stop"}
        # However short it is cut, the document is whole.
        short = await client.chat.completions.create(**{**WILD, "max_tokens": 48}, response_format=FORM)
        assert all(is_a_llama(choice.message.content or "") for choice in short.choices)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"choice": ["alpaca", "llama"]}, "alpaca|llama"),
        ({"regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"grammar": 'start: ("a" | "b") "c"'}, "[ab]c"),
        ({"grammar": 'root ::= [x-z] "!"'}, "[x-z]!"),
    ],
    ids=str,
)
async def test_other_forms(server: Server, form: dict[str, Any], pattern: str) -> None:
    async with client_of(server) as client:
        whole = await client.chat.completions.create(**WILD, extra_body={"structured_outputs": form})
        for choice in whole.choices:
            assert re.fullmatch(pattern, choice.message.content or "")
        body: Any = {"structured_outputs": form}
        made = await client.completions.create(model="tiny", prompt="It is", seed=2, max_tokens=9, extra_body=body)
        assert re.fullmatch(pattern, made.choices[0].text)


async def test_required_calls(server: Server) -> None:
    async with client_of(server) as client:
        asked: Any = {**WILD, "tools": [TOOL], "tool_choice": "required", "max_tokens": 200}
        whole = await client.chat.completions.create(**asked)
        async with client.chat.completions.stream(**asked) as stream:
            streamed = await stream.get_final_completion()
        for choice, other in zip(whole.choices, streamed.choices, strict=True):
            assert choice.finish_reason == other.finish_reason == "tool_calls"
            calls, others = choice.message.tool_calls, other.message.tool_calls
            assert calls
            assert others
            assert all(is_a_llama(call.function.arguments) for call in calls if call.type == "function")
            assert [call.function.arguments for call in calls if call.type == "function"] == [
                call.function.arguments for call in others
            ]


async def test_what_cannot_be_enforced_is_told_by_name(server: Server) -> None:
    async with client_of(server) as client:
        for form, param in (
            ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
            (
                {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "llama"}}}},
                "response_format.json_schema.schema",
            ),
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(**WILD, extra_body=form)
            assert caught.value.param == param


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def calling(schema: dict[str, Any]) -> dict[str, Any]:
    functions = [{"name": "easy", "parameters": SCHEMA}, {"name": "hard", "parameters": closed({"x": schema})}]
    tools = [{"type": "function", "function": function} for function in functions]
    return {"tools": tools, "tool_choice": "required"}


ENDLESS = {"$defs": {"a": closed({"b": {"$ref": "#/$defs/b"}}), "b": closed({"a": {"$ref": "#/$defs/a"}})}}
PATTERNS = {"type": "string", "allOf": [{"pattern": f"x{number}"} for number in range(40)]}
HARD = "tools[1].function.parameters"
SCHEMA_FIELD = "response_format.json_schema.schema"
HOSTILE: list[tuple[dict[str, Any], str]] = [
    (form({**ENDLESS, "$ref": "#/$defs/a"}), SCHEMA_FIELD),
    (form({"anyOf": [{"const": f"value {number}"} for number in range(10_000)]}), SCHEMA_FIELD),
    (form({"type": "array", "minItems": 10**9}), SCHEMA_FIELD),
    (form({"type": "integer", "minimum": 5, "maximum": 3}), SCHEMA_FIELD),
    (form({"type": "object", "description": "x" * 1_000_000}), SCHEMA_FIELD),
    (form(PATTERNS), SCHEMA_FIELD),
    ({"structured_outputs": {"regex": "^(a?){500}a{500}$"}}, "structured_outputs"),
    ({"structured_outputs": {"grammar": 'start: "a" start'}}, "structured_outputs"),
    ({"structured_outputs": {"grammar": "start: " + "(" * 3000 + '"a"' + ")" * 3000}}, "structured_outputs"),
    (calling({"type": "integer", "minimum": 5, "maximum": 3}), HARD),
    (calling({"anyOf": [{"const": f"value {number}"} for number in range(10_000)]}), HARD),
    (calling({"type": "array", "minItems": 10**9}), HARD),
]


async def test_hostile_schemas_are_refused_and_cost_others_nothing(server: Server) -> None:
    async with client_of(server) as client:
        other: Any = {**WILD, "n": 1, "max_tokens": 400, "response_format": FORM}
        alone = await client.chat.completions.create(**other)
        long: Any = {**WILD, "n": 1, "max_tokens": 600, "extra_body": {"ignore_eos": True}}
        stream = await client.chat.completions.create(**long, stream=True)
        for body, param in HOSTILE:
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(**WILD, extra_body=body)
            assert caught.value.param == param
        beside = await client.chat.completions.create(**other)
        assert beside.choices[0].message.content == alone.choices[0].message.content
        reasons = [choice.finish_reason async for chunk in stream for choice in chunk.choices]
        assert reasons[-1] == "length"
        assert len(reasons) > 100
