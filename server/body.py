"""Reading a request's body: no further than it may be long, and no longer than it may take. Knows bytes; no JSON."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import Receive

from pronk.server.errors import BODY_TIMEOUT, BODY_TOO_LARGE, APIError
from pronk.server.streaming import ClientDisconnectedError

BODY_SECONDS = 60.0

# A client that is still sending reads no answer: what is left of a body that is too long is received and dropped,
# within these bounds, so that the client sees why it is refused.
DROP_BYTES = 64 << 20
DROP_SECONDS = 5.0


async def read_body(receive: Receive, limit: int, *, seconds: float = BODY_SECONDS) -> bytes:
    """limit: in bytes. Raises APIError: 413 once the body is longer, 408 once it takes longer."""
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while True:
                part, more = await _next_part(receive)
                body += part
                if len(body) > limit:
                    break
                if not more:
                    return bytes(body)
    except TimeoutError:
        raise APIError(f"The request body did not arrive within {seconds:g} seconds.", BODY_TIMEOUT) from None
    if more:
        await _drop_rest(receive)
    raise APIError(f"The request body is longer than {limit} bytes, the most that the server reads.", BODY_TOO_LARGE)


async def _drop_rest(receive: Receive) -> None:
    dropped = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DROP_SECONDS):
            more = True
            while more and dropped < DROP_BYTES:
                part, more = await _next_part(receive)
                dropped += len(part)


async def _next_part(receive: Receive) -> tuple[bytes, bool]:
    """-> the bytes that came, and whether more follow."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnectedError
    return message.get("body", b""), message.get("more_body", False)
