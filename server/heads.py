"""Requests' heads, as they come in: bounded in length and in time, and refused in OpenAI's shape.

A layer of uvicorn's connection. Knows the bytes of HTTP/1.1; no route and no body.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from pronk.server.errors import HEAD_TIMEOUT, HEAD_TOO_LONG, NOT_HTTP, Answer, error_body

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 << 10
"""Looked at after each piece that is read, so that a head may be longer by as much as is read at once."""
HEAD_SECONDS = 60.0


class Heads(HttpToolsProtocol):
    """An upgrade that a request offers, to HTTP/2 for one, is not taken: the request is answered as if it offered none.

    (Java's HTTP client offers one with every first request. The parser takes its body for the other protocol's.)
    """

    _num_pending = 0
    """Bytes that came since something was complete: a head, a piece of a body, or what follows one."""
    _in_head = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._num_pending += len(data)
        while data:
            try:
                self.parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as upgrade:
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)  # the old one may have been told to close
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
            except httptools.HttpParserError:
                self._refuse("What was sent is not an HTTP/1.1 request.", NOT_HTTP)
                return
        if self._num_pending > MAX_HEAD_BYTES:
            self._refuse(f"The request's head is longer than {MAX_HEAD_BYTES} bytes.", HEAD_TOO_LONG)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._wait_for_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            super().on_header(name, value)
        else:
            self._num_pending = 0  # a trailer: nobody reads those

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            return  # it comes once more, without the offer
        self._in_head = False
        self._num_pending = 0
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_pending = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_pending = 0
        if not self._in_head:
            super().on_message_complete()

    def _head_without_upgrade(self) -> bytes:
        head = [self.parser.get_method(), b" ", self.url, b" HTTP/", self.parser.get_http_version().encode(), b"\r\n"]
        for name, value in self.headers:
            if name != b"upgrade":
                head += [name, b": ", value, b"\r\n"]
        return b"".join([*head, b"\r\n"])

    def _wait_for_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        if self._in_head:
            self._refuse(f"The request's head did not arrive within {HEAD_SECONDS:g} seconds.", HEAD_TIMEOUT)
        else:
            self.transport.close()

    def _refuse(self, message: str, answer: Answer) -> None:
        """Close the connection, and say why, unless that would be read as a part of an answer."""
        logger.info("a connection was closed: %s", message)
        answers = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not answers and not self.pipeline:
            body = error_body(message, answer)
            head = [STATUS_LINE[answer.status]]
            for name, value in self.server_state.default_headers:
                head += [name, b": ", value, b"\r\n"]
            head += [b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)]
            self.transport.write(b"".join([*head, b"connection: close\r\n\r\n", body]))
        self.transport.close()
