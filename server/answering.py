"""What every route that generates does alike: read the body, and answer with a Generation, streamed or whole.

Knows HTTP and a Generation by its face; no endpoint's fields and no body's shape.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pronk.engine.errors import RequestError
from pronk.engine.request import Grammar
from pronk.server.body import read_body
from pronk.server.generation import Asking
from pronk.server.sending import EventStream
from pronk.server.service import ServedModel
from pronk.server.streaming import EventWriter, sse, to_json, unless_disconnected

T = TypeVar("T")

# Shorter bodies are read on the spot, within a few milliseconds; a longer one would hold up other streams.
INLINE_BYTES = 16_384
_SECONDS_TO_BLAME = 0.3


async def read_request(request: HTTPRequest, read: Callable[[bytes], T]) -> T:
    """-> what `read` makes of the body; it runs in a thread where it may take long, and so must not touch what others
    change on the event loop. Raises what it raises."""
    body = await read_body(request.receive, request.app.state.config.max_body_bytes)
    return await apart(lambda: read(body), is_long=len(body) > INLINE_BYTES)


async def apart(work: Callable[[], T], *, is_long: bool) -> T:
    """-> what `work` makes; in a thread, where that may take long. Raises what it raises."""
    return await asyncio.to_thread(work) if is_long else work()


async def check_grammar(
    model: ServedModel, grammar: Grammar | None, param: str, parts: Sequence[tuple[str, Grammar]] = ()
) -> None:
    """parts: what the grammar is made of, each with its field: an error names the one that is to blame by itself, if
    that is soon found.

    Raises InvalidParameterError that names `param`, or a part's field, for a grammar which cannot be enforced.
    """
    if grammar is None or model.is_checked(grammar):
        return
    start = time.monotonic()
    async with model.judging:
        refusal = await _refusal(model, grammar, param)
        for field, part in parts:
            if refusal is None or time.monotonic() - start > _SECONDS_TO_BLAME:
                break
            found = await _refusal(model, part, field)
            if found is not None:
                refusal = found
                break
    if refusal is not None:
        raise refusal


async def _refusal(model: ServedModel, grammar: Grammar, param: str) -> RequestError | None:
    try:
        await asyncio.to_thread(model.check_grammar, grammar)
    except RequestError as error:
        error.param = param
        return error
    return None


class GenerationResponse(Response):
    """Asks the engine when it is sent, so that leaving the client's connection ends the asking."""

    def __init__(
        self,
        generation: Asking,
        *,
        whole: Callable[[], Coroutine[Any, Any, Any]],
        writer: EventWriter | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        """whole: asks the generation for all -> the answer, to be written as JSON. writer: of the stream, when one is
        wanted.

        names: the engine's name of a field -> the name that the client used, where that is another.
        """
        super().__init__()
        self._generation = generation
        self._make_whole = whole
        self._writer = writer
        self._names = names or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self._writer is not None:
                await unless_disconnected(receive, self._stream(self._writer, EventStream.of(scope, send)))
            else:
                await self._whole(scope, receive, send)
        except RequestError as error:
            error.param = self._names.get(error.param or "", error.param)
            raise

    async def _stream(self, writer: EventWriter, stream: EventStream) -> None:
        await sse(self._generation.deltas(), writer, stream, name=self._generation.record.request_id)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await unless_disconnected(receive, self._make_whole())
        await Response(to_json(body), media_type="application/json")(scope, receive, send)
