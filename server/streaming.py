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
from starlette.types import Receive

from pronk.engine.errors import PronkError
from pronk.server.errors import INTERNAL, INTERNAL_MESSAGE, body_of, error_body
from pronk.server.generation import Delta
from pronk.server.sending import EventStream

logger = logging.getLogger(__name__)

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


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


def error_event(body: bytes) -> bytes:
    """body: OpenAI's error object as JSON. -> the last event of a stream of chunks that cannot go on."""
    return b"data: " + body + b"\n\n"


async def sse(parts: AsyncGenerator[Delta, None], writer: EventWriter, stream: EventStream, *, name: str) -> None:
    """Send the whole response. Raises what `parts` raises while nothing has been sent.

    A later error is told in an event, after which the stream ends. name: of the request, for the log.
    """
    is_open = False
    async with stream, aclosing(parts):
        try:
            async for delta in parts:
                events = writer.delta(delta) if is_open else writer.start() + writer.delta(delta)
                is_open = True
                if events:
                    await stream.send(events)
            end = writer.end()
        except Exception as error:
            if not stream.has_begun:
                raise
            end = (b"" if is_open else writer.start()) + writer.fail(_told(error, name))
        await stream.send(end, last=True)


def _told(error: Exception, name: str) -> bytes:
    """-> the error object for an error that comes when the stream has begun."""
    if isinstance(error, PronkError):
        logger.warning("%s: the stream ends with an error: %s", name, error)
        return body_of(error)
    logger.error("%s: the stream ends with an error of the server's own", name, exc_info=error)
    return error_body(INTERNAL_MESSAGE, INTERNAL)


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
