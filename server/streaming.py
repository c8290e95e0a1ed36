"""From the engine's outputs to the client: one iterator of deltas, which `sse` sends and `collect` folds.

What a stream says and what a whole answer says cannot differ, because both are made of the same deltas. Knows tokens
only as bytes of the vocabulary; knows no route and no body's shape but the chunk of chat completions.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Send

from pronk.engine.detokenizer import Detokenizer
from pronk.engine.errors import EngineDrainingError, NonFiniteLogitsError, PronkError, RequestError
from pronk.engine.request import Output, SamplingParams, TokenLogprobs
from pronk.engine.tokenizer import Vocabulary
from pronk.server.errors import INTERNAL, RequestFailedError, body_of, error_body
from pronk.server.record import RequestRecord

logger = logging.getLogger(__name__)

Logprob = dict[str, Any]
T = TypeVar("T")

INTERNAL_MESSAGE = "The server met an error of its own; its log has the details."
DONE = b"data: [DONE]\n\n"
SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ClientDisconnectedError(Exception):
    """The client left before its answer was complete: nobody is there to be told anything."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step adds to an answer. The last one of an answer has a finish_reason, and may have text too."""

    text: str
    logprobs: list[Logprob]
    finish_reason: str | None = None


class Assembler:
    """One completion's outputs -> deltas: text, and each token's logprobs with the text that the token completes.

    Every token's logprobs are in exactly one delta, in order, one entry for each token the usage counts.
    """

    def __init__(self, vocabulary: Vocabulary, params: SamplingParams, eos_token_ids: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._skip_special_tokens = params.skip_special_tokens
        self._ending_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
        self._show_ending = params.include_stop_str_in_output
        self._detokenizer = Detokenizer(
            vocabulary,
            stop=params.stop,
            include_stop_str_in_output=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
        )
        self._waiting: deque[tuple[int, Logprob]] = deque()
        self._fed_bytes = 0
        self._shown_bytes = 0

    def feed(self, output: Output) -> Delta:
        """-> what this output adds; its text may still be empty."""
        for token, logprobs in zip(output.token_ids, output.logprobs or (), strict=False):
            self._fed_bytes += self._visible_bytes(token)
            self._waiting.append((self._fed_bytes, describe_logprobs(self._vocabulary, token, logprobs)))
        text = self._detokenizer.feed(self._shown_ids(output))
        finished = output.finish_reason is not None
        if finished:
            text += self._detokenizer.finish()
        if self._waiting:
            self._shown_bytes += len(text.encode())
        return Delta(text, self._due(bool(text), finished), output.finish_reason)

    def _shown_ids(self, output: Output) -> list[int]:
        """A token that ended the completion by its id is no part of the text."""
        ids = output.token_ids
        ended_by_token = output.finish_reason == "stop" and not isinstance(output.stop_reason, str)
        if ended_by_token and not self._show_ending and ids and ids[-1] in self._ending_ids:
            return ids[:-1]
        return ids

    def _visible_bytes(self, token: int) -> int:
        if self._skip_special_tokens and self._vocabulary.is_special(token):
            return 0
        return len(self._vocabulary.token_bytes(token))

    def _due(self, has_text: bool, finished: bool) -> list[Logprob]:
        due = []
        while self._waiting and (finished or (has_text and self._waiting[0][0] <= self._shown_bytes)):
            due.append(self._waiting.popleft()[1])
        return due


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


async def deltas(
    outputs: AsyncIterator[Output], assembler: Assembler, record: RequestRecord
) -> AsyncGenerator[Delta, None]:
    """Deltas until the one with a finish_reason. Counts tokens and the outcome in `record`.

    Raises at the first step what AsyncEngine.generate refuses a request for; at any time EngineDeadError, and
    RequestFailedError or NonFiniteLogitsError when the engine gave up this request. Closing it early aborts.
    """
    record.outcome = "client_abort"  # so it is, when this generator is closed before it ends
    try:
        async for output in outputs:
            record.count(len(output.token_ids))
            record.cached_tokens = max(record.cached_tokens, output.num_cached_tokens)
            record.timing = output.timing or record.timing
            delta = assembler.feed(output)
            if output.finish_reason == "error" or output.finish_reason == "abort":
                raise _failure(output)
            if output.finish_reason is not None:
                record.outcome = output.finish_reason
            if delta.text or delta.logprobs or delta.finish_reason:
                yield delta
            if output.finish_reason is not None:
                return
        raise RequestFailedError("The engine ended the request without a reason.")
    except (RequestError, EngineDrainingError):
        record.outcome = None
        raise
    except Exception:
        record.outcome = "error"
        raise
    finally:
        if isinstance(outputs, AsyncGenerator):
            await outputs.aclose()


def _failure(output: Output) -> PronkError:
    if output.finish_reason == "abort":
        return RequestFailedError("The request was aborted.")
    # The one reason for which the engine gives up a single request.
    return NonFiniteLogitsError(f"The request failed: {output.error}.")


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    logprobs: list[Logprob]
    finish_reason: str


async def collect(parts: AsyncGenerator[Delta, None]) -> Answer:
    """Fold deltas. Raises what they raise."""
    texts: list[str] = []
    logprobs: list[Logprob] = []
    finish_reason = ""
    async with aclosing(parts):
        async for delta in parts:
            texts.append(delta.text)
            logprobs += delta.logprobs
            finish_reason = delta.finish_reason or ""
    return Answer("".join(texts), logprobs, finish_reason)


class ChunkWriter:
    """Bytes of `chat.completion.chunk` events. What stays the same in all of them is encoded once."""

    def __init__(self, *, completion_id: str, created: int, model: str, logprobs: bool, usage: bool) -> None:
        """logprobs, usage: whether the request asked for them."""
        head = {"id": completion_id, "object": "chat.completion.chunk", "created": created, "model": model}
        self._head = b"data: " + to_json(head)[:-1]
        self._open = self._head + b',"choices":[{"index":0,"delta":'
        self._close = b"}]" + (b',"usage":null}' if usage else b"}") + b"\n\n"
        self._text_open = self._open + b'{"content":'
        self._text_close = b'},"logprobs":null,"finish_reason":null' + self._close
        self._logprobs = logprobs

    def role(self) -> bytes:
        """The first event of an answer."""
        return self._open + b'{"role":"assistant","content":""},"logprobs":null,"finish_reason":null' + self._close

    def delta(self, delta: Delta) -> bytes:
        """-> one event for text and logprobs, when there are any, and one for the end, when it is the last."""
        events = b""
        if delta.text or delta.logprobs:
            text = to_json(delta.text)
            if self._logprobs:
                logprobs = to_json({"content": delta.logprobs, "refusal": None})
                events = b'%b%b},"logprobs":%b,"finish_reason":null%b' % (
                    self._text_open,
                    text,
                    logprobs,
                    self._close,
                )
            else:
                events = self._text_open + text + self._text_close
        if delta.finish_reason is not None:
            events += b'%b{},"logprobs":null,"finish_reason":%b%b' % (
                self._open,
                to_json(delta.finish_reason),
                self._close,
            )
        return events

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The event that comes last when the request asked for it."""
        return self._head + b',"choices":[],"usage":' + to_json(usage) + b"}\n\n"


def usage_of(record: RequestRecord) -> dict[str, Any]:
    """-> OpenAI's usage object."""
    return {
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "total_tokens": record.prompt_tokens + record.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
    }


async def sse(
    parts: AsyncGenerator[Delta, None], writer: ChunkWriter, record: RequestRecord, send: Send, *, include_usage: bool
) -> None:
    """Send the whole response. Raises what `parts` raises before its first delta; nothing has been sent then.

    A later error is told in an event, after which the stream ends without [DONE].
    """
    async with aclosing(parts):
        first = await anext(parts)
        await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
        await _send_event(send, writer.role() + writer.delta(first))
        try:
            async for delta in parts:
                await _send_event(send, writer.delta(delta))
            end = writer.usage(usage_of(record)) + DONE if include_usage else DONE
        except PronkError as error:
            logger.warning("%s: the stream ends with an error: %s", record.request_id, error)
            end = b"data: " + body_of(error) + b"\n\n"
        except Exception:
            logger.exception("%s: the stream ends with an error of the server's own", record.request_id)
            end = b"data: " + error_body(INTERNAL_MESSAGE, INTERNAL) + b"\n\n"
        await send({"type": "http.response.body", "body": end, "more_body": False})


async def _send_event(send: Send, event: bytes) -> None:
    await send({"type": "http.response.body", "body": event, "more_body": True})


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """receive: of a request whose body has been read. -> work's result.

    Raises ClientDisconnectedError when the client leaves first: work has then been cancelled, and has ended.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_until_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnectedError
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


def to_json(value: Any) -> bytes:
    """JSON in which no byte can be taken for the end of a line: some clients cut streams where Unicode breaks lines."""
    data = msgspec.json.encode(value)
    if b"\xc2\x85" in data or b"\xe2\x80" in data:
        data = data.replace(b"\xc2\x85", b"\\u0085")
        data = data.replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")
    return data
