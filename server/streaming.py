"""Sending an answer: its deltas as server-sent events, and the end of the work when the client leaves.

Knows a stream as the bytes that an EventWriter makes of deltas; no route and no body's shape.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.types import Receive, Send

from pronk.engine.errors import PronkError
from pronk.server.errors import INTERNAL, body_of, error_body
from pronk.server.generation import Delta

logger = logging.getLogger(__name__)

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


class EventWriter(Protocol):
    """One protocol's stream: deltas -> bytes of whole events, perhaps none."""

    def start(self) -> bytes:
        """What comes before everything else; sent together with the first delta."""

    def delta(self, delta: Delta) -> bytes: ...

    def end(self) -> bytes:
        """What comes after the last delta."""

    def fail(self, body: bytes) -> bytes:
        """body: OpenAI's error object as JSON. -> the last event of a stream that cannot go on."""


async def sse(parts: AsyncGenerator[Delta, None], writer: EventWriter, send: Send, *, name: str) -> None:
    """Send the whole response. Raises what `parts` raises before its first delta; nothing has been sent then.

    A later error is told in an event, after which the stream ends. name: of the request, for the log.
    """
    async with aclosing(parts):
        first = await anext(parts)
        await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
        await _send_events(send, writer.start() + writer.delta(first))
        try:
            async for delta in parts:
                await _send_events(send, writer.delta(delta))
            end = writer.end()
        except PronkError as error:
            logger.warning("%s: the stream ends with an error: %s", name, error)
            end = writer.fail(body_of(error))
        except Exception:
            logger.exception("%s: the stream ends with an error of the server's own", name)
            end = writer.fail(error_body(INTERNAL_MESSAGE, INTERNAL))
        await send({"type": "http.response.body", "body": end, "more_body": False})


async def _send_events(send: Send, events: bytes) -> None:
    if events:
        await send({"type": "http.response.body", "body": events, "more_body": True})


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
