"""EventStream: one response of server-sent events, kept open while there is nothing to say. Knows bytes; no event.

A chunk goes straight to the server's own `send`, past every layer, and waits there while the client's connection is
full: meanwhile whoever makes the events is not asked for more, and what is made is joined where it waits (the engine's
`Inbox`). How long a client may read nothing is `connections`' business.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.types import Scope, Send

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
# A line that every reader of such streams skips.
COMMENT = b": keep-alive\n\n"


class EventStream:
    """Begins with the first bytes that are sent, or with the first comment; until then the request can be refused.

    To be entered before it is used.
    """

    def __init__(self, send: Send, send_body: Send, *, keep_alive: float = 0) -> None:
        """send: takes the response's start. send_body: takes what follows; the same, or what it calls in the end.

        keep_alive: seconds of silence after which a comment is sent; 0: none.
        """
        self.has_begun = False
        self._send = send
        self._send_body = send_body
        self._interval = keep_alive
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._is_sending = False
        self._timer: asyncio.TimerHandle | None = None
        self._comment: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, scope: Scope, send: Send) -> EventStream:
        """For the request of a route: as the server is configured, and past the layers that `envelope` is around."""
        return cls(send, scope["state"].get("send_body", send), keep_alive=scope["app"].state.config.keep_alive)

    async def __aenter__(self) -> EventStream:
        if self._interval:
            self._timer = self._loop.call_later(self._interval, self._look)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._comment is not None:
            self._comment.cancel()
            await asyncio.wait((self._comment,))

    async def send(self, events: bytes, *, last: bool = False) -> None:
        """events: whole ones. Waits while the client does not read what was sent before. Nothing follows the last."""
        if self._comment is not None:
            await asyncio.wait((self._comment,))
        self._last = self._loop.time()
        self._is_sending = True
        if not self.has_begun:
            await self._begin()
        await self._send_body({"type": "http.response.body", "body": events, "more_body": not last})
        self._is_sending = False

    async def _begin(self) -> None:
        self.has_begun = True
        await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})

    def _look(self) -> None:
        """Has it been silent for so long? A client that does not read needs no comment."""
        now = self._loop.time()
        due = self._last + self._interval
        if now < due:
            self._timer = self._loop.call_at(due, self._look)
            return
        if not self._is_sending and self._comment is None:
            self._comment = self._loop.create_task(self._send_comment())
        self._last = now
        self._timer = self._loop.call_at(now + self._interval, self._look)

    async def _send_comment(self) -> None:
        try:
            if not self.has_begun:
                await self._begin()
            await self._send_body({"type": "http.response.body", "body": COMMENT, "more_body": True})
        finally:
            self._comment = None
