"""The bodies that chat completions are answered with: `chat.completion.chunk` events, and `chat.completion` objects.

Both are made of the same deltas: events of each one, the object of all of them, folded. Knows the request's wishes as
plain values; no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pronk.engine.request import TokenLogprobs
from pronk.engine.tokenizer import Vocabulary
from pronk.server.chat.tool_parser import Call, CallDelta
from pronk.server.generation import Answer, Delta, Scored
from pronk.server.record import RequestRecord
from pronk.server.streaming import DONE, to_json

Logprob = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What a request wants told beside the text."""

    logprobs: bool = False
    usage: bool = False
    """In a stream: a last chunk with the usage."""


@dataclass(frozen=True)
class Head:
    """What all chunks of an answer, and the whole answer, have in common."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str


def describe_logprobs(vocabulary: Vocabulary, token: int, logprobs: TokenLogprobs) -> Logprob:
    """-> an entry of OpenAI's `logprobs.content`. bytes are the token's own, also where it is part of a character."""
    entry = _describe_token(vocabulary, token, logprobs.logprob)
    entry["top_logprobs"] = [
        _describe_token(vocabulary, top, logprob)
        for top, logprob in zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)
    ]
    return entry


def _describe_token(vocabulary: Vocabulary, token: int, logprob: float) -> Logprob:
    raw = vocabulary.token_bytes(token)
    # JSON has no infinity; -9999 is how OpenAI's reference writes a token that cannot be.
    return {"token": raw.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw) or None}


def usage_of(record: RequestRecord) -> dict[str, Any]:
    """-> OpenAI's usage object."""
    return {
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "total_tokens": record.prompt_tokens + record.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
    }


class ChunkWriter:
    """An EventWriter: bytes of `chat.completion.chunk` events. What stays the same in all of them is encoded once."""

    def __init__(
        self, head: Head, wanted: Wanted, vocabulary: Vocabulary, record: RequestRecord, *, num_choices: int = 1
    ) -> None:
        self._wanted = wanted
        self._vocabulary = vocabulary
        self._record = record
        fields = {"id": head.id, "object": "chat.completion.chunk", "created": head.created, "model": head.model}
        self._head = b"data: " + to_json(fields)[:-1]
        self._opens = [b'%b,"choices":[{"index":%d,"delta":' % (self._head, index) for index in range(num_choices)]
        self._text_opens = [opened + b'{"content":' for opened in self._opens]
        self._close = b"}]" + (b',"usage":null}' if wanted.usage else b"}") + b"\n\n"
        self._plain_close = b',"logprobs":null,"finish_reason":null' + self._close
        self._text_close = b"}" + self._plain_close

    def start(self) -> bytes:
        """The role of each choice."""
        return b"".join(opened + b'{"role":"assistant","content":""}' + self._plain_close for opened in self._opens)

    def delta(self, delta: Delta) -> bytes:
        """-> one event for text, calls and logprobs, when there are any, and one for the end, when it is the last."""
        events = b""
        parts = delta.parts
        if not delta.logprobs and len(parts) == 1 and isinstance(parts[0], str):
            events = self._text_opens[delta.index] + to_json(parts[0]) + self._text_close
        elif parts or delta.logprobs:
            events = b'%b%b,"logprobs":%b,"finish_reason":null%b' % (
                self._opens[delta.index],
                to_json(_delta_of(delta)),
                self._logprobs(delta.logprobs),
                self._close,
            )
        if delta.finish_reason is not None:
            events += b'%b{},"logprobs":null,"finish_reason":%b%b' % (
                self._opens[delta.index],
                to_json(delta.finish_reason),
                self._close,
            )
        return events

    def end(self) -> bytes:
        """The usage, when the request asked for it, and [DONE]."""
        if not self._wanted.usage:
            return DONE
        return self._head + b',"choices":[],"usage":' + to_json(usage_of(self._record)) + b"}\n\n" + DONE

    def fail(self, body: bytes) -> bytes:
        return b"data: " + body + b"\n\n"

    def _logprobs(self, logprobs: Sequence[Scored]) -> bytes:
        if not logprobs or not self._wanted.logprobs:
            return b"null"
        return to_json(_logprobs_object(self._vocabulary, logprobs))


def _delta_of(delta: Delta) -> dict[str, Any]:
    told: dict[str, Any] = {}
    calls = delta.calls
    if calls:
        told["tool_calls"] = [_call_delta(call) for call in calls]
    if delta.text or not calls:
        told["content"] = delta.text
    return told


def _call_delta(call: CallDelta) -> dict[str, Any]:
    """Name and id stand in a call's first delta only: clients concatenate what they find."""
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _logprobs_object(vocabulary: Vocabulary, logprobs: Sequence[Scored]) -> dict[str, Any]:
    return {"content": [describe_logprobs(vocabulary, *scored) for scored in logprobs], "refusal": None}


def completion_body(
    head: Head, wanted: Wanted, vocabulary: Vocabulary, record: RequestRecord, answers: Sequence[Answer]
) -> dict[str, Any]:
    """-> a `chat.completion`."""
    return {
        "id": head.id,
        "object": "chat.completion",
        "created": head.created,
        "model": head.model,
        "choices": [_choice(index, answer, wanted, vocabulary) for index, answer in enumerate(answers)],
        "usage": usage_of(record),
    }


def _choice(index: int, answer: Answer, wanted: Wanted, vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "index": index,
        "message": _message(answer),
        "logprobs": _logprobs_object(vocabulary, answer.logprobs) if wanted.logprobs else None,
        "finish_reason": answer.finish_reason,
    }


def _message(answer: Answer) -> dict[str, Any]:
    """tool_calls is left out where there are none: an empty list stops some clients."""
    calls = answer.calls
    text = answer.text
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
    return message


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
