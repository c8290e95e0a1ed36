"""Connections whose client reads nothing of what waits for it are dropped. Knows transports; no request and no answer.

Costs a stream nothing while its client reads: the transport itself says when its buffer is full, and only then, and
when an answer has ended, is anybody watched. Whoever reads a byte now and then is slow, and stays.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

from pronk.server.heads import Heads

logger = logging.getLogger(__name__)

LOOKS = 4
"""How often one looks in the time that a client has: it is dropped that much too late at most."""


class Outgoing(Protocol):
    """What is asked of a transport."""

    def get_write_buffer_size(self) -> int: ...

    def abort(self) -> None: ...


class Clock(Protocol):
    """What is asked of an event loop."""

    def call_later(self, delay: float, callback: Callable[[], None], /) -> asyncio.TimerHandle: ...


class Watch:
    """Over one connection while nobody writes to it: what waits must become less."""

    def __init__(self, clock: Clock, transport: Outgoing, seconds: float, dropped: Callable[[], None]) -> None:
        self._clock = clock
        self._transport = transport
        self._seconds = seconds
        self._dropped = dropped
        self._timer: asyncio.TimerHandle | None = None
        self._waits = 0
        self._idle_looks = 0

    def start(self) -> None:
        """From now on nobody writes."""
        self.stop()
        self._waits = self._transport.get_write_buffer_size()
        if self._waits:
            self._idle_looks = 0
            self._timer = self._clock.call_later(self._seconds / LOOKS, self._look)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        waits = self._transport.get_write_buffer_size()
        self._idle_looks = self._idle_looks + 1 if waits >= self._waits else 0
        self._waits = waits
        if self._idle_looks >= LOOKS:
            logger.info("a client that reads nothing was dropped after %g seconds", self._seconds)
            self._dropped()
            self._transport.abort()
        elif waits:
            self._timer = self._clock.call_later(self._seconds / LOOKS, self._look)


def watched(seconds: float, dropped: Callable[[], None]) -> type[asyncio.Protocol]:
    """-> the class of uvicorn's connections, each with a Watch. dropped: told of every client that is."""

    class Connection(Heads):
        watch: Watch | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.watch = Watch(self.loop, transport, seconds, dropped)

        def connection_lost(self, exc: Exception | None) -> None:
            if self.watch is not None:
                self.watch.stop()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            if self.watch is not None:
                self.watch.start()

        def resume_writing(self) -> None:
            super().resume_writing()
            if self.watch is not None:
                self.watch.stop()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.watch is not None:
                self.watch.start()

        def data_received(self, data: bytes) -> None:
            # The next request, whose answer will be written: unless there is no room for it.
            if self.watch is not None and not self.flow.write_paused:
                self.watch.stop()
            super().data_received(data)

    return Connection
