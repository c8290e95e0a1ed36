"""The output of a response: its items, and the events that tell of them in order.

`Output` is one machine for both: a stream sends what it returns, a whole answer keeps its items, so the two agree. It
is fed the deltas of one completion, content and calls in the order in which the model wrote them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from pronk.engine.tokenizer import Vocabulary
from pronk.server.chat.chunks import describe_logprobs
from pronk.server.chat.tool_parser import CallDelta, Part
from pronk.server.generation import Asking, Delta, Scored
from pronk.server.record import RequestRecord
from pronk.server.responses.items import ItemDict, new_id
from pronk.server.streaming import to_json

Event = dict[str, Any]


class Output:
    """The items of one answer, as they grow."""

    def __init__(self, vocabulary: Vocabulary, *, logprobs: bool) -> None:
        """logprobs: whether they are told."""
        self.items: list[ItemDict] = []
        self._vocabulary = vocabulary
        self._wants_logprobs = logprobs
        self._is_open = False
        self._early: list[dict[str, Any]] = []  # log probabilities whose text was held back until now

    def add(self, parts: Sequence[Part], logprobs: Sequence[Scored]) -> list[Event]:
        """-> what is to be told. logprobs: of the tokens behind `parts`; those of calls are not told."""
        events: list[Event] = []
        scored = [self._describe(each) for each in logprobs] if self._wants_logprobs else []
        scored, self._early = self._early + scored, []
        for part in parts:
            if isinstance(part, str):
                events += self._text(part, scored)
            else:
                events += self._call(part)
            scored = []
        if scored and self._is_open and self._item["type"] == "message":
            self._item["content"][0]["logprobs"] += scored
        elif not self._is_open:
            self._early = scored
        return events

    def say_nothing(self) -> list[Event]:
        """An answer that ended before its first word is an empty text."""
        return [] if self.items else self._text("", [])

    def close(self, *, status: str = "completed") -> list[Event]:
        """The item that is open is complete, or broken off."""
        if not self._is_open:
            return []
        self._is_open = False
        item = self._item
        item["status"] = status
        index = len(self.items) - 1
        place = {"item_id": item["id"], "output_index": index}
        if item["type"] == "function_call":
            told = [
                {
                    "type": "response.function_call_arguments.done",
                    **place,
                    "name": item["name"],
                    "arguments": item["arguments"],
                }
            ]
        else:
            part = item["content"][0]
            place["content_index"] = 0
            text_done = {
                "type": "response.output_text.done",
                **place,
                "text": part["text"],
                "logprobs": part["logprobs"],
            }
            told = [text_done, {"type": "response.content_part.done", **place, "part": _copy(part)}]
        return [*told, {"type": "response.output_item.done", "output_index": index, "item": _copy(item)}]

    @property
    def _item(self) -> ItemDict:
        return self.items[-1]

    def _text(self, text: str, logprobs: list[dict[str, Any]]) -> list[Event]:
        events = []
        if not (self._is_open and self._item["type"] == "message"):
            events += self.close()
            message = {"id": new_id("msg"), "type": "message", "role": "assistant", "status": "in_progress"}
            events += self._open({**message, "content": []})
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            events.append({"type": "response.content_part.added", **self._place(), "part": _copy(part)})
            self._item["content"].append(part)
        part = self._item["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        if text:
            events.append({"type": "response.output_text.delta", **self._place(), "delta": text, "logprobs": logprobs})
        return events

    def _call(self, call: CallDelta) -> list[Event]:
        events = []
        if call.id is not None and call.name is not None:
            events += self.close()
            item = {"id": new_id("fc"), "type": "function_call", "status": "in_progress", "call_id": call.id}
            events += self._open({**item, "name": call.name, "arguments": ""})
        if call.arguments:
            self._item["arguments"] += call.arguments
            place = {"item_id": self._item["id"], "output_index": len(self.items) - 1}
            events.append({"type": "response.function_call_arguments.delta", **place, "delta": call.arguments})
        return events

    def _open(self, item: ItemDict) -> list[Event]:
        self.items.append(item)
        self._is_open = True
        return [{"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": _copy(item)}]

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item["id"], "output_index": len(self.items) - 1, "content_index": 0}

    def _describe(self, scored: Scored) -> dict[str, Any]:
        entry = describe_logprobs(self._vocabulary, scored.token, scored.logprobs)
        for each in (entry, *entry["top_logprobs"]):
            each["bytes"] = each["bytes"] or []
        return entry


def _copy(item: ItemDict) -> ItemDict:
    """As it is now, whatever is added later."""
    copy: ItemDict = msgspec.json.decode(msgspec.json.encode(item))
    return copy


def finish(body: dict[str, Any], output: Output, record: RequestRecord, finish_reason: str | None) -> list[Event]:
    """The answer has ended: bring `body` up to date. finish_reason: OpenAI's of chat completions; None: with an error.

    -> the events that close the last item.
    """
    cut_off = finish_reason == "length"
    events = output.say_nothing() if finish_reason else []
    events += output.close(status="completed" if finish_reason and not cut_off else "incomplete")
    body["output"] = output.items
    if finish_reason is not None:
        body["status"] = "incomplete" if cut_off else "completed"
        body["incomplete_details"] = {"reason": "max_output_tokens"} if cut_off else None
        body["usage"] = usage_of(record)
    if body["status"] == "completed":
        body["completed_at"] = int(time.time())
    return events


def fail(body: dict[str, Any], message: str) -> None:
    """The answer cannot be made."""
    body["status"] = "failed"
    body["error"] = {"code": "server_error", "message": message}


def usage_of(record: RequestRecord) -> dict[str, Any]:
    """-> OpenAI's usage object of responses."""
    return {
        "input_tokens": record.prompt_tokens,
        "input_tokens_details": {"cached_tokens": record.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": record.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": record.prompt_tokens + record.completion_tokens,
    }


async def make(generation: Asking, body: dict[str, Any], output: Output) -> None:
    """A whole answer: bring `body` up to date with all of it. Raises what the generation raises."""
    reason = None
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            output.add(delta.parts, delta.logprobs)
            reason = delta.finish_reason
    finish(body, output, generation.record, reason)


class ResponseWriter:
    """The stream of one response. An EventWriter."""

    def __init__(self, body: dict[str, Any], output: Output, record: RequestRecord, ended: Callable[[], None]) -> None:
        """body: of the response that has just begun; it is brought up to date. ended: called when it is complete or
        has failed."""
        self._body = body
        self._output = output
        self._record = record
        self._ended = ended
        self._finish_reason: str | None = None
        self._number = 0

    def start(self) -> bytes:
        """See `EventWriter.start`."""
        return self._write(
            [
                {"type": "response.created", "response": self._body},
                {"type": "response.in_progress", "response": self._body},
            ]
        )

    def delta(self, delta: Delta) -> bytes:
        """See `EventWriter.delta`."""
        self._finish_reason = delta.finish_reason
        return self._write(self._output.add(delta.parts, delta.logprobs))

    def end(self) -> bytes:
        """See `EventWriter.end`."""
        closing = finish(self._body, self._output, self._record, self._finish_reason)
        self._ended()
        return self._write([*closing, {"type": f"response.{self._body['status']}", "response": self._body}])

    def fail(self, body: bytes) -> bytes:
        """See `EventWriter.fail`."""
        closing = finish(self._body, self._output, self._record, None)
        fail(self._body, msgspec.json.decode(body)["error"]["message"])
        self._ended()
        return self._write([*closing, {"type": "response.failed", "response": self._body}])

    def _write(self, events: Sequence[Event]) -> bytes:
        written = b""
        for event in events:
            kind = event["type"].encode()
            written += b"event: %b\ndata: %b\n\n" % (kind, to_json({**event, "sequence_number": self._number}))
            self._number += 1
        return written
