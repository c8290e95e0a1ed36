"""The fields of a request that speak of tools: tools, tool_choice, parallel_tool_calls, functions, function_call.

Types with OpenAI's rules, and `read_tools`, which makes a ToolCalls of them. Knows nothing of prompts and answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from pronk.server.chat.tools import ToolCalls
from pronk.server.protocol.common import Body

MAX_TOOLS = 128


class FunctionDefinition(Body):
    name: str = Field(description="1 to 64 of the characters a-z, A-Z, 0-9, _ and -.")
    description: str | None = Field(None, description="What it does and when to call it; the model reads it.")
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of an object. Default: no arguments.")
    strict: bool | None = Field(
        None, description="Hold the arguments to the schema, whether the call is forced or not."
    )


class Tool(Body):
    type: str = Field(description='Only "function".')
    function: FunctionDefinition | None = None


def read_tools(
    tools: Sequence[Tool] | None,
    tool_choice: object = None,
    parallel_tool_calls: bool | None = None,
    functions: Sequence[FunctionDefinition] | None = None,
    function_call: object = None,
) -> ToolCalls | None:
    """The fields of a checked request -> its tools; None where it offers none (an empty list offers none).

    Raises APIError that names the field: a name twice, a choice of a function that is not offered, both the new and the
    old fields.
    """
    raise NotImplementedError


def check_tool_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises APIError for a tool's (or function's) message that follows no call. Ids are not compared."""
    raise NotImplementedError
