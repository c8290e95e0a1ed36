"""The fields of a request that speak of tools: tools, tool_choice, parallel_tool_calls, functions, function_call.

Types with OpenAI's rules, `read_tools`, which makes a ToolCalls of them, and the rule of where results may stand. The
parts of `read_tools` are for another endpoint's types of the same fields, too. Knows nothing of prompts and answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Discriminator, Field, Tag

from pronk.server.chat.tools import Choice, Function, Mode, ToolCalls
from pronk.server.errors import INVALID_VALUE, APIError
from pronk.server.protocol.common import Body, refuse
from pronk.server.protocol.strict import check_strict

MAX_TOOLS = 128
MAX_DEPTH = 100
"""Of a function's parameters: no deeper schema could be enforced."""
NAME_PATTERN = "[a-zA-Z0-9_-]{1,64}"
Definition = TypeVar("Definition")


class FunctionDefinition(Body):
    name: str = Field(
        description="1 to 64 of the characters a-z, A-Z, 0-9, _ and -.",
        json_schema_extra={"pattern": f"^{NAME_PATTERN}$"},
    )
    description: str | None = Field(None, description="What it does and when to call it; the model reads it.")
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of an object. Default: no arguments.")
    strict: bool | None = Field(
        None, description="Hold the arguments to the schema also where the model may choose whether to call."
    )


class FunctionTool(Body):
    type: Literal["function"] = Field(description="The only kind of tool.")
    function: FunctionDefinition = Field(description="What the model may call.")


class OtherTool(Body):
    """One of OpenAI's other kinds, custom among them: refused by `functions_only`."""

    model_config = ConfigDict(extra="allow")
    type: str = Field(description="Refused: only functions can be called.")


class FunctionName(Body):
    name: str = Field(description="Of a function that is offered.")


class NamedChoice(Body):
    """Call this function, once."""

    type: Literal["function"] = Field(description="The only kind of tool.")
    function: FunctionName = Field(description="The function.")


class AllowedTools(Body):
    mode: Literal["auto", "required"] = Field(description="Whether the model chooses, or must call one of them.")
    tools: list[NamedChoice] = Field(
        min_length=1, max_length=MAX_TOOLS, fail_fast=True, description="The functions that may be called."
    )


class AllowedChoice(Body):
    """Call only these functions; with mode required at least one of them."""

    type: Literal["allowed_tools"] = Field(description="What this choice is.")
    allowed_tools: AllowedTools = Field(description="Which functions, and whether one must be called.")


class OtherChoice(Body):
    """Of a tool of another kind: refused by `plain_choice`."""

    model_config = ConfigDict(extra="allow")
    type: str = Field(description="Refused: only functions can be chosen.")


def kind_of_tool(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return "other_tool" if isinstance(kind, str) and kind != "function" else "function_tool"


def kind_of_choice(choice: Any) -> str:
    if isinstance(choice, str):
        return "mode_choice"
    kind = choice.get("type") if isinstance(choice, dict) else getattr(choice, "type", None)
    if kind == "allowed_tools":
        return "allowed_choice"
    return "other_choice" if isinstance(kind, str) and kind != "function" else "named_choice"


def _kind_of_function_call(choice: Any) -> str:
    return "mode_choice" if isinstance(choice, str) else "named_choice"


Tool = Annotated[
    Annotated[FunctionTool, Tag("function_tool")] | Annotated[OtherTool, Tag("other_tool")],
    Discriminator(kind_of_tool),
]
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode_choice")]
    | Annotated[NamedChoice, Tag("named_choice")]
    | Annotated[AllowedChoice, Tag("allowed_choice")]
    | Annotated[OtherChoice, Tag("other_choice")],
    Discriminator(kind_of_choice),
]
Functions = Annotated[list[FunctionDefinition], Field(max_length=MAX_TOOLS, fail_fast=True)]
FunctionCallChoice = Annotated[
    Annotated[Literal["none", "auto"], Tag("mode_choice")] | Annotated[FunctionName, Tag("named_choice")],
    Discriminator(_kind_of_function_call),
]


def read_tools(
    tools: Sequence[FunctionTool | OtherTool] | None,
    tool_choice: Mode | NamedChoice | AllowedChoice | OtherChoice | None = None,
    parallel_tool_calls: bool | None = None,
    functions: Sequence[FunctionDefinition] | None = None,
    function_call: str | FunctionName | None = None,
) -> ToolCalls | None:
    """The fields of a request, of the types above -> its tools; None where it offers none (an empty list offers none).

    Raises APIError that names the field: a tool of another kind, a name twice, parameters that are no object's schema,
    a strict schema that is not strict, a choice of what is not offered, the new fields and the old ones at once.
    """
    if tools and functions:
        raise APIError("functions is OpenAI's older name for tools: send one of them.", INVALID_VALUE, "functions")
    if functions:
        offered = offered_functions(functions, lambda place: f"functions[{place}]")
        legacy_choice = _choice_of_function(function_call, offered)
        return ToolCalls(offered, legacy_choice, parallel=False, legacy=True)
    if not tools:
        refuse_choice_of_nothing("tool_choice", tool_choice, "tools")
        refuse_choice_of_nothing("function_call", function_call, "functions")
        return None
    refuse_choice_of_nothing("function_call", function_call, "functions")
    definitions = [tool.function for tool in functions_only(tools)]
    offered = offered_functions(definitions, lambda place: f"tools[{place}].function")
    return ToolCalls(offered, _choice(tool_choice, offered), parallel=parallel_tool_calls is not False)


def functions_only(tools: Sequence[Definition | OtherTool]) -> list[Definition]:
    """-> the same. Raises APIError for a tool of another kind."""
    functions: list[Definition] = []
    for place, tool in enumerate(tools):
        if isinstance(tool, OtherTool):
            param = f"tools[{place}].type"
            raise refuse(param, f"A tool of type '{tool.type}' cannot be used: '{param}' must be 'function'.")
        functions.append(tool)
    return functions


def offered_functions(
    definitions: Sequence[FunctionDefinition], param_of: Callable[[int], str]
) -> tuple[Function, ...]:
    """param_of: place -> where the definition stands in the request.

    Raises APIError for a name twice, or one that OpenAI's API would not have, and for parameters that are no object's
    schema, or not strict where they are to be.
    """
    names: set[str] = set()
    functions = []
    for place, definition in enumerate(definitions):
        param = param_of(place)
        if definition.name in names:
            raise APIError(
                f"'{param}.name' is '{definition.name}', which another function is called already.",
                INVALID_VALUE,
                f"{param}.name",
            )
        names.add(definition.name)
        functions.append(_offered_function(definition, param))
    return tuple(functions)


def _check_depth(schema: Mapping[str, Any], param: str) -> None:
    """Before the prompt is written, in which each level takes a wider margin."""
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise APIError(f"'{param}' is nested more than {MAX_DEPTH} levels deep.", INVALID_VALUE, param)
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting += [(part, depth + 1) for part in inside]


def _offered_function(definition: FunctionDefinition, param: str) -> Function:
    if not re.fullmatch(NAME_PATTERN, definition.name):
        raise APIError(
            f"'{param}.name' must be 1 to 64 of the characters a-z, A-Z, 0-9, _ and -.", INVALID_VALUE, f"{param}.name"
        )
    parameters = definition.parameters
    if parameters is not None and parameters.get("type", "object") != "object":
        raise APIError(
            f"'{param}.parameters' must be the JSON schema of an object: its type must be \"object\".",
            INVALID_VALUE,
            f"{param}.parameters",
        )
    if parameters is not None:
        _check_depth(parameters, f"{param}.parameters")
    if definition.strict and parameters is not None:
        check_strict(parameters, f"{param}.parameters")
    return Function(definition.name, definition.description, parameters, strict=bool(definition.strict))


def refuse_choice_of_nothing(param: str, choice: object, missing: str) -> None:
    """Raises APIError for the field `param` when it asks for a call and the field `missing` offers nothing."""
    if choice not in (None, "none", "auto"):
        raise APIError(f"{param} asks for a call, but {missing} offers nothing to call.", INVALID_VALUE, param)


def _choice(
    tool_choice: Mode | NamedChoice | AllowedChoice | OtherChoice | None, offered: Sequence[Function]
) -> Choice:
    match tool_choice:
        case NamedChoice():
            return named_choice(tool_choice.function.name, offered, "tool_choice.function.name")
        case AllowedChoice(allowed_tools=allowed):
            names = [tool.function.name for tool in allowed.tools]
            place = "tool_choice.allowed_tools.tools[{}].function.name"
            return allowed_choice(allowed.mode, names, offered, place.format)
    return plain_choice(tool_choice)


def plain_choice(tool_choice: Mode | OtherChoice | None) -> Choice:
    """Of no function. Raises APIError for a tool of another kind."""
    if isinstance(tool_choice, OtherChoice):
        raise refuse(
            "tool_choice.type",
            f"A choice of type '{tool_choice.type}' cannot be used: 'tool_choice.type' must be 'function' or "
            "'allowed_tools'.",
        )
    return Choice(tool_choice or "auto")


def named_choice(name: str, offered: Sequence[Function], param: str) -> Choice:
    """Of one function. Raises APIError that names `param` when it is not offered."""
    _require(name, offered, param)
    return Choice("required", frozenset((name,)), named=True)


def allowed_choice(
    mode: Mode, names: Sequence[str], offered: Sequence[Function], param_of: Callable[[int], str]
) -> Choice:
    """Of some functions. Raises APIError that names `param_of(place)` when one is not offered."""
    for place, name in enumerate(names):
        _require(name, offered, param_of(place))
    return Choice(mode, frozenset(names))


def _choice_of_function(function_call: str | FunctionName | None, offered: Sequence[Function]) -> Choice:
    if isinstance(function_call, FunctionName):
        return named_choice(function_call.name, offered, "function_call.name")
    return Choice("none") if function_call == "none" else Choice("auto")


def _require(name: str, offered: Sequence[Function], param: str) -> None:
    if all(function.name != name for function in offered):
        raise APIError(f"'{param}' is '{name[:64]}', which is none of the functions offered.", INVALID_VALUE, param)


def check_tool_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """messages: those of a request, as OpenAI's clients write them.

    Raises APIError for a result, of role tool or function, that follows no call. Ids are not compared, and a call needs
    no result: clients shorten conversations, and write ids of their own.
    """
    called = False
    for place, message in enumerate(messages):
        role = message["role"]
        if role not in ("tool", "function"):
            called = role == "assistant" and bool(message.get("tool_calls") or message.get("function_call"))
        elif not called:
            param = f"messages[{place}].role"
            raise APIError(
                f"A message of role '{role}' must follow an assistant's message with calls, at '{param}'.",
                INVALID_VALUE,
                param,
            )
