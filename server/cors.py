"""CORS: which web pages may read answers, as browsers ask it. Knows headers; no route and no key.

A policy, not a layer: `envelope` asks it once a request, so that nothing lies between a stream and its client. A
preflight carries no key by the browsers' own rule, so it is answered before keys are looked at.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Headers = Sequence[tuple[bytes, bytes]]

ANY = "*"
METHODS = b"GET, POST, DELETE"
EXPOSED = b"x-request-id, openai-processing-ms, retry-after, x-should-retry"
USUAL = b"authorization, content-type"
PREFLIGHT_SECONDS = b"600"
MAX_HEADERS = 4096
# A list of header names: what a browser asks for is allowed by name, because "*" never stands for authorization.
_NAMES = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+(\s*,\s*[!#$%&'*+.^_`|~0-9A-Za-z-]+)*")


class Cors:
    """The origins that are allowed; none at all sends no header."""

    def __init__(self, origins: Sequence[str]) -> None:
        """origins: as browsers write them, or "*" among them for all."""
        self._any = ANY in origins
        self._origins = frozenset(origin.lower().encode() for origin in origins)

    def headers(self, asked: Headers) -> list[tuple[bytes, bytes]]:
        """asked: the request's headers. -> those to add to any answer, an error's too."""
        if not self._origins:
            return []
        origin = _value(asked, b"origin")
        if self._any:
            return [] if origin is None else [(b"access-control-allow-origin", b"*"), _EXPOSE]
        vary = (b"vary", b"Origin")  # also on an answer to no origin: a cache must not give it to a page
        if origin is None or origin.lower() not in self._origins:
            return [vary]
        return [vary, (b"access-control-allow-origin", origin), _EXPOSE]

    def preflight(self, method: str, asked: Headers) -> list[tuple[bytes, bytes]] | None:
        """-> the headers of its answer, beside `headers`; None: this is none, or nobody is allowed."""
        if not self._origins or method != "OPTIONS" or _value(asked, b"origin") is None:
            return None
        if _value(asked, b"access-control-request-method") is None:
            return None
        wanted = _value(asked, b"access-control-request-headers") or b""
        names = wanted if len(wanted) <= MAX_HEADERS and _NAMES.fullmatch(wanted) else USUAL
        answer = [
            (b"access-control-allow-methods", METHODS),
            (b"access-control-allow-headers", names),
            (b"access-control-max-age", PREFLIGHT_SECONDS),
            (b"vary", b"Access-Control-Request-Headers"),
        ]
        # Asked by a page of the internet about a server on this machine or in this network.
        if _value(asked, b"access-control-request-private-network") == b"true":
            answer.append((b"access-control-allow-private-network", b"true"))
        return answer


_EXPOSE = (b"access-control-expose-headers", EXPOSED)


def _value(headers: Headers, name: bytes) -> bytes | None:
    return next((value for key, value in headers if key == name), None)
