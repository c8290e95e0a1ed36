"""The messages of a chat, as OpenAI's clients write them: types, and today's spelling of what is written in older ones.

Knows no template and no token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from pronk.server.errors import INVALID_VALUE, APIError
from pronk.server.protocol.common import Body, refuse
from pronk.server.protocol.tools import check_tool_messages

MAX_ITEMS = 2048


class TextPart(Body):
    type: Literal["text"]
    text: str = Field(description="Parts are joined without anything between them.")


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: str = Field(description="As text; only in an assistant's message.")


class OtherPart(Body):
    """An image, a sound or a file: known to OpenAI's API, and refused by `check_messages`."""

    model_config = ConfigDict(extra="allow")
    type: Literal["image_url", "input_audio", "file"] = Field(description="Refused: this model reads text.")


def _kind_of_part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("image_url", "input_audio", "file"):
        return "other"
    return "refusal_part" if kind == "refusal" else "text_part"  # as no field is called: it is told in an error's place


def _kind_of_content(content: Any) -> str:
    return "parts" if isinstance(content, list) else "string"


Part = Annotated[
    Annotated[TextPart, Tag("text_part")]
    | Annotated[RefusalPart, Tag("refusal_part")]
    | Annotated[OtherPart, Tag("other")],
    Discriminator(_kind_of_part),
]
# fail_fast: of a million faults in one list, one is told, and only one is looked for.
# max_length: many more than anybody writes, and few enough to be looked at while other streams wait.
Parts = Annotated[list[Part], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
Content = Annotated[
    Annotated[str, Tag("string")] | Annotated[Parts, Tag("parts")],
    Discriminator(_kind_of_content),
]

NAME = "Accepted and not shown to the model: Llama's format has no place for a participant's name."


class FunctionCall(Body):
    name: str = Field(description="Of the function.")
    arguments: str = Field(description="A JSON object, as text.")


class ToolCall(Body):
    id: str = Field(description="By which the message with the result names this call.")
    type: Literal["function"] = Field("function", description="The only kind of call.")
    function: FunctionCall = Field(description="What was called.")


class SystemMessage(Body):
    role: Literal["system"]
    content: Content = Field(description="A text, or a list of text parts.")
    name: str | None = Field(None, description=NAME)


class DeveloperMessage(Body):
    """The same as a system message."""

    role: Literal["developer"]
    content: Content = Field(description="A text, or a list of text parts.")
    name: str | None = Field(None, description=NAME)


class UserMessage(Body):
    role: Literal["user"]
    content: Content = Field(description="A text, or a list of text parts.")
    name: str | None = Field(None, description=NAME)


class AssistantMessage(Body):
    """An earlier answer, as clients send it back: the empty companions of `content` are accepted, empty only."""

    role: Literal["assistant"]
    content: Content | None = Field(None, description="A text, or a list of text and refusal parts.")
    refusal: str | None = Field(None, description="Stands for the content where there is none.")
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_ITEMS, fail_fast=True)] | None = Field(
        None, description="What it called."
    )
    function_call: FunctionCall | None = Field(None, description="OpenAI's older name for a single call.")
    annotations: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="Empty.")
    name: str | None = Field(None, description=NAME)


class ToolMessage(Body):
    role: Literal["tool"]
    content: Content = Field(description="What the call gave: a text, or a list of text parts.")
    tool_call_id: str = Field(description="The id of the call.")


class FunctionMessage(Body):
    """OpenAI's older form of a tool's message."""

    role: Literal["function"]
    content: Content | None = Field(None, description="What the call gave.")
    name: str = Field(description="Of the function that was called.")


Message = Annotated[
    SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage,
    Field(discriminator="role"),
]
Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]


def plain_messages(messages: Sequence[Body]) -> list[dict[str, Any]]:
    """-> as dicts, in today's spelling: a function_call is a tool call, and a function's message a tool's."""
    return [_modern(message.model_dump(exclude_none=True)) for message in messages]


def _modern(message: dict[str, Any]) -> dict[str, Any]:
    call = message.pop("function_call", None)
    if call is not None:
        message["tool_calls"] = [{"type": "function", "function": call}]
    if message["role"] == "function":
        return {"role": "tool", "content": message.get("content", "")}
    if message.get("refusal") is not None and not message.get("content"):
        message["content"] = message["refusal"]
    return message


def check_messages(messages: Sequence[Any]) -> None:
    """What the types cannot say. Raises APIError that names the place."""
    calling = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        _check_parts(message, where)
        calls, call = getattr(message, "tool_calls", None), getattr(message, "function_call", None)
        if calls and call is not None:
            sentence = "function_call is OpenAI's older name for tool_calls: send one of them."
            raise APIError(sentence, INVALID_VALUE, f"{where}.function_call")
        calling.append({"role": message.role, "tool_calls": calls, "function_call": call})
    check_tool_messages(calling)


def _check_parts(message: Any, where: str) -> None:
    if not isinstance(message.content, list):
        return
    for index, part in enumerate(message.content):
        place = f"{where}.content[{index}]"
        if isinstance(part, OtherPart):
            raise refuse(place, f"This model reads text only: a part of type {part.type} cannot be used.")
        if isinstance(part, RefusalPart) and message.role != "assistant":
            raise APIError(f"A refusal can only be part of an assistant's message, at {place}.", INVALID_VALUE, place)
