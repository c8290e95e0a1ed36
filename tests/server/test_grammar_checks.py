"""Grammars are checked before anything is generated: whose fault it is, and who waits for it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from typing import Any

import pytest

from pronk.engine.errors import InvalidParameterError
from pronk.engine.request import Grammar
from pronk.server.answering import check_grammar
from pronk.server.service import GRAMMARS_AT_ONCE

from .conftest import Connect
from .fakes import FakeEngine, served

CLOSED = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
IMPOSSIBLE = {**CLOSED, "description": "impossible"}
USER = [{"role": "user", "content": "Hi"}]


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def functions(*parameters: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return [{"name": f"f{place}", "parameters": schema, **fields} for place, schema in enumerate(parameters)]


def tools(*parameters: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": function} for function in functions(*parameters, **fields)]


def flat(*parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """As the Responses API has them."""
    return [{"type": "function", "strict": True, **function} for function in functions(*parameters)]


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


CALL = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
    "required": ["name", "parameters"],
}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": tools(CLOSED, CLOSED, IMPOSSIBLE), "tool_choice": "required"}, "tools[2].function.parameters"),
        ({"tools": tools(CLOSED, IMPOSSIBLE, strict=True)}, "tools[1].function.parameters"),
        ({"functions": functions(IMPOSSIBLE, CLOSED, strict=True)}, "functions[0].parameters"),
        ({"tools": tools(CLOSED, deep(60))}, "tools[1].function.parameters"),
        ({"functions": functions(deep(60))}, "functions[0].parameters"),
        ({"tools": tools(CLOSED, strict=True), "response_format": form(CALL)}, "tools"),
    ],
)
async def test_an_error_names_the_function_that_is_to_blame(connect: Connect, body: dict[str, Any], param: str) -> None:
    reply = await connect().chat(model="tiny", messages=USER, **body)
    assert reply.status == 400
    assert reply.json["error"]["param"] == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": flat(CLOSED, IMPOSSIBLE), "tool_choice": "required"}, "tools[1].parameters"),
        ({"tools": flat(CLOSED), "text": {"format": {"type": "json_schema", "name": "x", "schema": CALL}}}, "tools"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": IMPOSSIBLE}}}, "text.format"),
    ],
)
async def test_an_error_of_a_response_does_so_too(connect: Connect, body: dict[str, Any], param: str) -> None:
    data = json.dumps({"model": "tiny", "input": "Hi", **body}).encode()
    reply = await connect().call("POST", "/v1/responses", data)
    assert reply.status == 400
    assert reply.json["error"]["param"] == param


async def test_a_schema_that_binds_nothing_is_not_looked_at(connect: Connect) -> None:
    reply = await connect().chat(model="tiny", messages=USER, tools=tools(IMPOSSIBLE))
    assert reply.status == 200


async def test_grammars_that_take_long_hold_no_more_threads_than_are_theirs() -> None:
    going_on = threading.Event()
    asked: list[str] = []

    def slowly(grammar: Grammar) -> None:
        asked.append(grammar.text)
        going_on.wait(30)
        raise InvalidParameterError("too long", "structured_outputs")

    model = dataclasses.replace(
        served(FakeEngine()), check_grammar=slowly, is_checked=lambda grammar: grammar.text == "known"
    )
    waiting = [asyncio.create_task(check_grammar(model, Grammar("regex", str(n)), "field")) for n in range(100)]
    try:
        # Threads are left for others, and a grammar that is known does not wait.
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "done"), 20) == "done"
        await asyncio.wait_for(check_grammar(model, Grammar("regex", "known"), "field"), 20)
        assert len(asked) <= GRAMMARS_AT_ONCE
    finally:
        going_on.set()
        refusals = await asyncio.gather(*waiting, return_exceptions=True)
    assert {refusal.param for refusal in refusals if isinstance(refusal, InvalidParameterError)} == {"field"}
    assert len(asked) == len(refusals) == 100
