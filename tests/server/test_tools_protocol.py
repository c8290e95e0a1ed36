"""The fields that speak of tools: OpenAI's rules, and the field that is named for each fault."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletionFunctionToolParam, ChatCompletionToolChoiceOptionParam
from pydantic import TypeAdapter

from pronk.server.chat.tools import Choice, Function, ToolCalls
from pronk.server.errors import APIError
from pronk.server.protocol.common import Body, parse
from pronk.server.protocol.strict import check_strict
from pronk.server.protocol.tools import (
    MAX_TOOLS,
    FunctionCallChoice,
    Functions,
    ToolChoice,
    Tools,
    check_tool_messages,
    read_tools,
)

OBJECT: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "string"}}}
STRICT = {**OBJECT, "required": ["a"], "additionalProperties": False}


class Fields(Body):
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Functions | None = None
    function_call: FunctionCallChoice | None = None


def tool(name: str = "f", **changes: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **changes}}


def read(**fields: Any) -> ToolCalls | None:
    asked = parse(Fields, json.dumps(fields).encode())
    return read_tools(asked.tools, asked.tool_choice, asked.parallel_tool_calls, asked.functions, asked.function_call)


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [tool(name) for name in names]}}


def refused(**fields: Any) -> tuple[str | None, str | None]:
    """-> param and code of the 400."""
    with pytest.raises(APIError) as caught:
        read(**fields)
    assert caught.value.answer.status == 400
    assert caught.value.param is not None
    assert caught.value.param in str(caught.value)
    return caught.value.param, caught.value.answer.code


def test_a_function_with_everything() -> None:
    calls = read(tools=[tool("f-1_x", description="d", parameters=STRICT, strict=True)])
    assert calls == ToolCalls((Function("f-1_x", "d", STRICT, strict=True),), Choice("auto"))


def test_a_function_with_a_name_only() -> None:
    calls = read(tools=[tool("x" * 64)])
    assert calls == ToolCalls((Function("x" * 64),))
    assert calls.offered[0].schema == {"type": "object", "properties": {}}


def test_nulls_say_nothing_but_those_inside_a_schema_stay() -> None:
    schema = {"type": "object", "properties": {"a": {"default": None}}}
    calls = read(tools=[tool(description=None, parameters=schema, strict=None)], tool_choice=None)
    assert calls == ToolCalls((Function("f", None, schema),))


@pytest.mark.parametrize(
    "fields", [{}, {"tools": []}, {"tools": None}, {"functions": []}, {"tools": [], "functions": []}]
)
@pytest.mark.parametrize("choice", [{}, {"tool_choice": "none"}, {"tool_choice": "auto"}, {"function_call": "none"}])
@pytest.mark.parametrize("parallel", [{}, {"parallel_tool_calls": True}])
def test_no_tools(fields: dict[str, Any], choice: dict[str, Any], parallel: dict[str, Any]) -> None:
    assert read(**fields, **choice, **parallel) is None


@pytest.mark.parametrize(
    ("choice", "meaning"),
    [
        ("none", Choice("none")),
        ("auto", Choice("auto")),
        ("required", Choice("required")),
        (tool("g"), Choice("required", frozenset("g"), named=True)),
        (allowed("auto", "g"), Choice("auto", frozenset("g"))),
        (allowed("required", "f", "g"), Choice("required", frozenset("fg"))),
    ],
)
def test_choices(choice: Any, meaning: Choice) -> None:
    calls = read(tools=[tool("f"), tool("g")], tool_choice=choice)
    assert calls is not None
    assert calls.choice == meaning


@pytest.mark.parametrize(("sent", "meaning"), [({}, True), (True, True), (False, False)])
def test_parallel_calls(sent: Any, meaning: bool) -> None:
    calls = read(tools=[tool()], **({} if sent == {} else {"parallel_tool_calls": sent}))
    assert calls is not None
    assert calls.parallel is meaning


@pytest.mark.parametrize(
    ("choice", "meaning"),
    [
        ({}, Choice("auto")),
        ({"function_call": "auto"}, Choice("auto")),
        ({"function_call": "none"}, Choice("none")),
        ({"function_call": {"name": "f"}}, Choice("required", frozenset("f"), named=True)),
    ],
)
def test_the_older_fields(choice: dict[str, Any], meaning: Choice) -> None:
    calls = read(functions=[{"name": "f", "parameters": OBJECT}], **choice)
    assert calls == ToolCalls((Function("f", None, OBJECT),), meaning, parallel=False, legacy=True)


UNSUPPORTED = "unsupported_parameter"
INVALID = "invalid_value"
UNKNOWN = "unknown_parameter"
MISSING = "missing_required_parameter"
TYPE = "invalid_type"
F = {"tools": [tool("f")]}
FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [tool("")]}, "tools[0].function.name", INVALID),
    ({"tools": [tool("x" * 65)]}, "tools[0].function.name", INVALID),
    ({"tools": [tool("f"), tool("a b")]}, "tools[1].function.name", INVALID),
    ({"tools": [tool("f\n")]}, "tools[0].function.name", INVALID),
    ({"tools": [tool("é")]}, "tools[0].function.name", INVALID),
    ({"tools": [tool("f"), tool("g"), tool("f")]}, "tools[2].function.name", INVALID),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", MISSING),
    ({"tools": [{"type": "function"}]}, "tools[0].function", MISSING),
    ({"tools": [{"function": {"name": "f"}}]}, "tools[0].type", MISSING),
    ({"tools": [{"type": "function", "function": {"name": "f"}, "x": 1}]}, "tools[0].x", UNKNOWN),
    ({"tools": [tool("f", x=1)]}, "tools[0].function.x", UNKNOWN),
    ({"tools": [tool("f"), {"type": "custom", "custom": {"name": "x"}}]}, "tools[1].type", UNSUPPORTED),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", UNSUPPORTED),
    ({"tools": ["f"]}, "tools[0]", TYPE),
    ({"tools": {}}, "tools", TYPE),
    ({"tools": [tool(f"f{place}") for place in range(MAX_TOOLS + 1)]}, "tools", INVALID),
    ({"tools": [tool("f", parameters=[])]}, "tools[0].function.parameters", TYPE),
    ({"tools": [tool("f", parameters={"type": "string"})]}, "tools[0].function.parameters", INVALID),
    ({"tools": [tool("f", parameters={"type": ["object"]})]}, "tools[0].function.parameters", INVALID),
    ({"tools": [tool("f", parameters=OBJECT, strict=True)]}, "tools[0].function.parameters", INVALID),
    ({"tools": [tool("f", strict=1)]}, "tools[0].function.strict", TYPE),
    ({"tools": [tool("f", description=1)]}, "tools[0].function.description", TYPE),
    ({**F, "tool_choice": "f"}, "tool_choice", INVALID),
    ({**F, "tool_choice": 1}, "tool_choice", TYPE),
    ({**F, "tool_choice": {}}, "tool_choice.type", MISSING),
    ({**F, "tool_choice": tool("g")}, "tool_choice.function.name", INVALID),
    ({**F, "tool_choice": {"type": "function"}}, "tool_choice.function", MISSING),
    ({**F, "tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice.type", UNSUPPORTED),
    ({**F, "tool_choice": allowed("none", "f")}, "tool_choice.allowed_tools.mode", INVALID),
    ({**F, "tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools", INVALID),
    ({**F, "tool_choice": allowed("auto", "f", "g")}, "tool_choice.allowed_tools.tools[1].function.name", INVALID),
    ({"tool_choice": "required"}, "tool_choice", INVALID),
    ({"tools": [], "tool_choice": tool("f")}, "tool_choice", INVALID),
    ({**F, "parallel_tool_calls": "no"}, "parallel_tool_calls", TYPE),
    ({**F, "functions": [{"name": "f"}]}, "functions", INVALID),
    ({**F, "function_call": {"name": "f"}}, "function_call", INVALID),
    ({"function_call": {"name": "f"}}, "function_call", INVALID),
    ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call.name", INVALID),
    ({"functions": [{"name": "f"}], "function_call": "required"}, "function_call", INVALID),
    ({"functions": [{"name": "f"}, {"name": "f"}]}, "functions[1].name", INVALID),
    ({"functions": [{"name": "f f"}]}, "functions[0].name", INVALID),
]


@pytest.mark.parametrize(("fields", "param", "code"), FAULTS)
def test_faults_are_named(fields: dict[str, Any], param: str, code: str) -> None:
    assert refused(**fields) == (param, code)


@pytest.mark.parametrize("choice", ["none", "auto", "required", tool("f"), allowed("auto", "f")])
def test_what_is_accepted_here_is_openais_own_form(choice: Any) -> None:
    TypeAdapter(ChatCompletionFunctionToolParam).validate_python(tool("f", parameters=STRICT, strict=True))
    TypeAdapter(ChatCompletionToolChoiceOptionParam).validate_python(choice)
    assert read(tools=[tool("f", parameters=STRICT, strict=True)], tool_choice=choice) is not None


# Strict schemas


def nested(inner: dict[str, Any], *, keyword: str = "properties") -> dict[str, Any]:
    value: Any = {"p": inner} if keyword in ("properties", "$defs") else inner
    value = [{"type": "null"}, inner] if keyword == "anyOf" else value
    return {**STRICT, **({"$defs": value} if keyword == "$defs" else {}), "properties": {"a": {keyword: value}}}


@pytest.mark.parametrize(
    "schema",
    [
        STRICT,
        {"type": "object", "properties": {}, "additionalProperties": False},
        {"type": "object", "additionalProperties": False},
        nested(STRICT, keyword="items"),
        nested(STRICT, keyword="anyOf"),
        {**STRICT, "properties": {"a": {"enum": [OBJECT]}}},
        {**STRICT, "properties": {"a": {"default": OBJECT}}},
    ],
)
def test_strict_schemas(schema: dict[str, Any]) -> None:
    check_strict(schema, "x")


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({}, "x"),
        ({"anyOf": [STRICT]}, "x"),
        ({**STRICT, "additionalProperties": True}, "x"),
        ({**STRICT, "required": []}, "x"),
        ({**STRICT, "required": "a"}, "x"),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": False}, "x"),
        (nested(OBJECT, keyword="items"), "x.properties.a.items"),
        (nested(OBJECT, keyword="anyOf"), "x.properties.a.anyOf[1]"),
        ({**STRICT, "$defs": {"d": OBJECT}}, "x.$defs.d"),
        ({**STRICT, "properties": {"a": {"type": ["object", "null"]}}}, "x.properties.a"),
        ({**STRICT, "properties": {"a": {"properties": {}}}}, "x.properties.a"),
    ],
)
def test_what_is_not_strict_is_named(schema: dict[str, Any], place: str) -> None:
    with pytest.raises(APIError) as caught:
        check_strict(schema, "x")
    assert caught.value.param == place


def test_a_deep_schema_is_walked() -> None:
    schema: dict[str, Any] = {"type": "array"}
    for _ in range(3_000):
        schema = {"type": "array", "items": schema}
    check_strict({**STRICT, "properties": {"a": schema}}, "x")


# Where results stand

CALL = {"role": "assistant", "tool_calls": [{"id": "1"}]}
OLD_CALL = {"role": "assistant", "function_call": {"name": "f"}}
RESULT = {"role": "tool", "tool_call_id": "?"}
OLD_RESULT = {"role": "function", "name": "f"}
USER = {"role": "user"}


@pytest.mark.parametrize(
    "messages",
    [[], [USER], [USER, CALL, USER], [CALL, RESULT, RESULT, USER], [USER, OLD_CALL, OLD_RESULT], [CALL, CALL, RESULT]],
)
def test_results_after_calls(messages: list[dict[str, Any]]) -> None:
    check_tool_messages(messages)


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([RESULT], 0),
        ([USER, OLD_RESULT], 1),
        ([CALL, RESULT, USER, RESULT], 3),
        ([{"role": "assistant", "tool_calls": []}, RESULT], 1),
        ([{"role": "assistant"}, RESULT], 1),
    ],
)
def test_results_without_a_call_are_refused(messages: list[dict[str, Any]], place: int) -> None:
    with pytest.raises(APIError) as caught:
        check_tool_messages(messages)
    assert caught.value.param == f"messages[{place}].role"
