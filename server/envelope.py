"""What surrounds every request, whatever its route: an id, a record, headers, the answer to an error, one log line.

A pure ASGI layer, the outermost. It leaves the server's own `send` in `scope["state"]["send_body"]`: what follows an
answer's start can go there straight, past this layer and all others. Knows no route by name and no field.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pronk.engine.errors import PronkError
from pronk.server.cors import Cors
from pronk.server.errors import INTERNAL, INTERNAL_MESSAGE, Answer, answer_of, body_of, error_body, headers_of
from pronk.server.record import CLIENT_CLOSED_REQUEST, RequestRecord
from pronk.server.shapes import timings_of
from pronk.server.streaming import ClientDisconnectedError

logger = logging.getLogger(__name__)

PROBES = frozenset({"/health", "/ping", "/metrics"})
_CLIENTS_ID = re.compile(rb"[!-~]{1,128}")


class Ended(Protocol):
    def __call__(self, record: RequestRecord, /, *, route: str, method: str) -> None: ...


class Envelope:
    """ASGI: leaves the request's record in `scope["state"]["record"]`, and tells `ended` when it is over."""

    def __init__(self, app: ASGIApp, ended: Ended, cors: Cors) -> None:
        self.app = app
        self.ended = ended
        self.cors = cors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = RequestRecord(_request_id(scope))
        state = scope.setdefault("state", {})
        state["record"], state["send_body"] = record, send
        for_pages = self.cors.headers(scope["headers"])

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_headers(record), *for_pages]
            await send(message)

        try:
            await self._answer(scope, receive, send_with_headers, record)
        finally:
            if record.status is None:
                record.status = CLIENT_CLOSED_REQUEST
            _log(record, scope)
            self.ended(record, route=_route(scope), method=scope["method"])

    async def _answer(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        try:
            preflight = self.cors.preflight(scope["method"], scope["headers"])
            if preflight is not None:
                await send({"type": "http.response.start", "status": 204, "headers": preflight})
                await send({"type": "http.response.body"})
            else:
                await self.app(scope, receive, send)
        except ClientDisconnectedError:
            logger.debug("%s: the client left", record.request_id)
        except PronkError as error:
            answer = answer_of(error)
            record.rejection = answer.reason
            await _send_error(send, answer, body_of(error), record)
        except Exception:
            logger.exception("%s: a fault of the server's own", record.request_id)
            await _send_error(send, INTERNAL, error_body(INTERNAL_MESSAGE, INTERNAL), record)


async def _send_error(send: Send, answer: Answer, body: bytes, record: RequestRecord) -> None:
    if record.status is not None:
        return  # the answer has begun and cannot be taken back; the server below closes the connection
    headers = {"content-type": "application/json", "content-length": str(len(body)), **headers_of(answer)}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _request_id(scope: Scope) -> str:
    """The client's own X-Request-Id where it is short and printable, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _CLIENTS_ID.fullmatch(value):
            return str(value, "ascii")
    return f"req-{uuid.uuid4().hex}"


def _headers(record: RequestRecord) -> list[tuple[bytes, bytes]]:
    milliseconds = round((time.perf_counter() - record.arrived) * 1000)
    return [(b"x-request-id", record.request_id.encode()), (b"openai-processing-ms", b"%d" % milliseconds)]


def _route(scope: Scope) -> str:
    """The route's template. A path that matched none may be anything, and is not told apart from others."""
    return getattr(scope.get("route"), "path", "other")


def _log(record: RequestRecord, scope: Scope) -> None:
    """One line: never a word of a prompt or an answer, and no path but a route's."""
    if record.outcome is None:
        level = logging.DEBUG if scope["path"] in PROBES else logging.INFO
        logger.log(
            level,
            "%s: %s %s %s%s, %.3f s",
            record.request_id,
            scope["method"],
            _route(scope),
            record.status,
            f" ({record.rejection})" if record.rejection else "",
            time.perf_counter() - record.arrived,
        )
        return
    first = record.time_to_first_token
    logger.info(
        "%s: %s %s, %d prompt tokens (%d cached), %d completion tokens, first after %s, %s",
        record.request_id,
        record.status,
        record.outcome,
        record.prompt_tokens,
        record.cached_tokens,
        record.completion_tokens,
        "-" if first is None else f"{first:.3f} s",
        _times(record),
    )


def _times(record: RequestRecord) -> str:
    """The whole time, and the parts that sum up to it."""
    told = timings_of(record)
    if told is None:
        return f"{time.perf_counter() - record.arrived:.3f} s"
    return (
        f"{told['total']:.3f} s: server {told['server']:.3f}, queue {told['queue']:.3f}, "
        f"prefill {told['prefill']:.3f} ({told['prompt_tokens_computed']} tokens computed), "
        f"decode {told['decode']:.3f} ({told['steps']} steps in all, {told['preemptions']} preemptions)"
    )
