"""The bodies that chat completions are answered with: `chat.completion.chunk` events, and `chat.completion` objects.

Both are made of the same deltas: events of each one, the object of all of them, folded. Knows the request's wishes as
plain values; no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pronk.engine.request import TokenLogprobs
from pronk.engine.tokenizer import Vocabulary
from pronk.server.chat.tool_parser import Call, CallDelta
from pronk.server.generation import Answer, Delta, Scored
from pronk.server.record import RequestRecord
from pronk.server.shapes import Extras, Frame, Head, describe_prompt_logprobs, finite, timings_of, usage_of
from pronk.server.streaming import error_event, to_json

Logprob = dict[str, Any]


@dataclass(frozen=True)
class Wanted(Extras):
    """What a request wants told beside the text, and how."""

    logprobs: bool = False
    prompt_logprobs: bool = False
    """Only of a whole answer."""
    function_call: bool = False
    """Tell a call as OpenAI did before there were tools."""


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
    return {"token": raw.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(raw) or None}


class ChunkWriter:
    """An EventWriter: bytes of `chat.completion.chunk` events. What stays the same in all of them is encoded once."""

    def __init__(
        self,
        head: Head,
        wanted: Wanted,
        vocabulary: Vocabulary,
        record: RequestRecord,
        *,
        prompt: Sequence[int] = (),
        num_choices: int = 1,
    ) -> None:
        """prompt: its token ids."""
        self._wanted = wanted
        self._vocabulary = vocabulary
        self._prompt = prompt
        self._told_tokens = 0
        self._frame = Frame(head, "chat.completion.chunk", wanted, record)
        self._opens = [self._frame.open(index, "delta") for index in range(num_choices)]
        self._text_opens = [opened + b'{"content":' for opened in self._opens]
        self._text_close = b'},"logprobs":null,"finish_reason":null' + self._frame.plain_close
        # Most chunks are text and nothing else.
        self._plain = not (wanted.token_ids or wanted.continuous_usage)

    def start(self) -> bytes:
        """The role of each choice; in the first chunk the prompt's token ids, when they were asked for."""
        role = {"role": "assistant", "content": ""}
        events = [self._chunk(index, role) for index in range(len(self._opens))]
        if self._wanted.token_ids:
            events[0] = b'%b,"prompt_token_ids":%b}\n\n' % (events[0][: -len(b"}\n\n")], to_json(self._prompt))
        return b"".join(events)

    def delta(self, delta: Delta) -> bytes:
        """-> one event for text, calls and logprobs, when there are any, and one for the end, when it is the last."""
        self._told_tokens += len(delta.token_ids)
        events = b""
        parts = delta.parts
        if self._plain and not delta.logprobs and len(parts) == 1 and isinstance(parts[0], str):
            events = self._text_opens[delta.index] + to_json(parts[0]) + self._text_close
        elif parts or delta.logprobs or (self._wanted.token_ids and delta.token_ids):
            told = _delta_of(delta, as_function_call=self._wanted.function_call)
            events = self._chunk(delta.index, told, logprobs=delta.logprobs, token_ids=delta.token_ids)
        if delta.finish_reason is not None:
            events += self._chunk(delta.index, {}, finish_reason=delta.finish_reason)
        return events

    def end(self) -> bytes:
        """See `Frame.end`."""
        return self._frame.end()

    def fail(self, body: bytes) -> bytes:
        return error_event(body)

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        *,
        logprobs: Sequence[Scored] = (),
        finish_reason: str | None = None,
        token_ids: Sequence[int] = (),
    ) -> bytes:
        scored = _logprobs_object(self._vocabulary, logprobs) if logprobs and self._wanted.logprobs else None
        event = b'%b%b,"logprobs":%b,"finish_reason":%b' % (
            self._opens[index],
            to_json(delta),
            to_json(scored),
            to_json(finish_reason),
        )
        if self._wanted.token_ids:
            event += b',"token_ids":' + to_json(token_ids)
        return event + self._frame.close(self._told_tokens)


def _delta_of(delta: Delta, *, as_function_call: bool) -> dict[str, Any]:
    told: dict[str, Any] = {}
    calls = delta.calls
    if calls and as_function_call:
        told["function_call"] = _function_delta(calls)
    elif calls:
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


def _function_delta(calls: Sequence[CallDelta]) -> dict[str, Any]:
    """Of the only call that such an answer can hold."""
    told: dict[str, Any] = {"arguments": "".join(call.arguments for call in calls)}
    return told if calls[0].name is None else {"name": calls[0].name, **told}


def _logprobs_object(vocabulary: Vocabulary, logprobs: Sequence[Scored]) -> dict[str, Any]:
    return {"content": [describe_logprobs(vocabulary, *scored) for scored in logprobs], "refusal": None}


def completion_body(
    head: Head,
    wanted: Wanted,
    vocabulary: Vocabulary,
    record: RequestRecord,
    answers: Sequence[Answer],
    *,
    prompt: Sequence[int] = (),
) -> dict[str, Any]:
    """prompt: its token ids. -> a `chat.completion`."""
    body: dict[str, Any] = {
        "id": head.id,
        "object": "chat.completion",
        "created": head.created,
        "model": head.model,
        "choices": [_choice(index, answer, wanted, vocabulary) for index, answer in enumerate(answers)],
        "usage": usage_of(record),
    }
    if wanted.prompt_logprobs:
        body["prompt_logprobs"] = describe_prompt_logprobs(vocabulary, prompt, answers[0].prompt_logprobs or ())
    if wanted.token_ids:
        body["prompt_token_ids"] = prompt
    if wanted.timings:
        body["timings"] = timings_of(record)
    return body


def _choice(index: int, answer: Answer, wanted: Wanted, vocabulary: Vocabulary) -> dict[str, Any]:
    choice = {
        "index": index,
        "message": _message(answer, as_function_call=wanted.function_call),
        "logprobs": _logprobs_object(vocabulary, answer.logprobs) if wanted.logprobs else None,
        "finish_reason": answer.finish_reason,
    }
    return {**choice, "token_ids": answer.token_ids} if wanted.token_ids else choice


def _message(answer: Answer, *, as_function_call: bool) -> dict[str, Any]:
    """tool_calls is left out where there are none: an empty list stops some clients."""
    calls = answer.calls
    text = answer.text
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if calls and as_function_call:
        message["function_call"] = {"name": calls[0].name, "arguments": calls[0].arguments}
    elif calls:
        message["tool_calls"] = [_call(call) for call in calls]
    return message


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
