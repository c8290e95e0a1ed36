"""Items of the Responses API and the messages that they mean: one list of either says the same conversation.

Knows no prompt and no store.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from pronk.server.protocol.responses import (
    FunctionCallItem,
    FunctionCallOutput,
    InputMessage,
    ItemReference,
    OutputText,
    ReasoningItem,
    RefusalText,
)

Message = dict[str, Any]
ItemDict = dict[str, Any]

_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def new_id(prefix: str) -> str:
    """An id as OpenAI's look."""
    return f"{prefix}_{uuid.uuid4().hex}"


def references(given: str | Sequence[Any]) -> dict[str, str]:
    """A request's input -> ids of the items of stored responses that it names, each with the field that does."""
    if isinstance(given, str):
        return {}
    named = ((item.id, index) for index, item in enumerate(given) if isinstance(item, ItemReference))
    return {item_id: f"input[{index}].id" for item_id, index in named}


def input_items(given: str | Sequence[Any], referred: Mapping[str, ItemDict]) -> list[ItemDict]:
    """A request's input -> its items as they are kept and told, each with an id. referred: those of `references`."""
    if isinstance(given, str):
        return [_message("user", [{"type": "input_text", "text": given}])] if given else []
    items = []
    for item in given:
        if isinstance(item, ItemReference):
            items.append(referred[item.id])
        elif isinstance(item, InputMessage):
            items.append(_message(item.role, _parts(item), item.id, item.status))
        elif isinstance(item, FunctionCallItem | FunctionCallOutput | ReasoningItem):
            told = item.model_dump(exclude_none=True)
            told.setdefault("id", new_id(_PREFIXES[item.type]))
            if not isinstance(item, ReasoningItem):
                told.setdefault("status", "completed")
            items.append(told)
    return items


def _message(role: str, content: list[dict[str, Any]], name: str | None = None, status: str | None = None) -> ItemDict:
    return {
        "id": name or new_id("msg"),
        "type": "message",
        "role": role,
        "status": status or "completed",
        "content": content,
    }


def _parts(message: InputMessage) -> list[dict[str, Any]]:
    kind = "output_text" if message.role == "assistant" else "input_text"
    if isinstance(message.content, str):
        return [_text_part(kind, message.content)]
    parts = []
    for part in message.content:
        if isinstance(part, RefusalText):
            parts.append({"type": "refusal", "refusal": part.refusal})
        else:
            text = str(getattr(part, "text", ""))
            parts.append(_text_part("output_text" if isinstance(part, OutputText) else kind, text))
    return parts


def _text_part(kind: str, text: str) -> dict[str, Any]:
    return {"type": kind, "text": text, "annotations": []} if kind == "output_text" else {"type": kind, "text": text}


def messages_of(items: Sequence[Mapping[str, Any]]) -> list[Message]:
    """-> messages as chat completions spell them. Calls that follow each other, or a text of the assistant's, are one
    message; reasoning is left out."""
    messages: list[Message] = []
    for item in items:
        kind = item["type"]
        if kind == "message":
            messages.append({"role": item["role"], "content": _joined(item["content"])})
        elif kind == "function_call_output":
            output = item["output"]
            content = output if isinstance(output, str) else _joined(output)
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
        elif kind == "function_call":
            call = {
                "id": item["call_id"],
                "type": "function",
                "function": {"name": item["name"], "arguments": item["arguments"]},
            }
            if messages and messages[-1]["role"] == "assistant":
                messages[-1].setdefault("tool_calls", []).append(call)
            else:
                messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    return messages


def _joined(content: Sequence[Mapping[str, Any]]) -> str:
    return "".join(str(part.get("text", part.get("refusal", ""))) for part in content)
