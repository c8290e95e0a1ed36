"""Bearer keys: who may ask, and under which salt their prompts are cached. Knows no route but the open ones.

A pure ASGI layer in front of every route: what is not listed as open needs a key, so a new route is closed by default.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from pronk.server.errors import WRONG_KEY, APIError

OPEN_PATHS = frozenset({"/health", "/ping"})
SCHEME = b"bearer "


class Keys:
    """The keys that are accepted; none at all accepts everybody."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.strip().encode()).digest() for key in keys]

    def salt_for(self, headers: Sequence[tuple[bytes, bytes]]) -> str:
        """headers: as ASGI gives them. -> the cache salt of the key they show; "" when no key is needed.

        Raises APIError (401). Every key is compared, in constant time, whichever matches: the time tells nothing.
        """
        if not self._digests:
            return ""
        shown = [value for name, value in headers if name == b"authorization"]
        if not shown:
            raise APIError("No API key was given: send it in the header 'Authorization: Bearer KEY'.", WRONG_KEY)
        if len(shown) > 1 or not shown[0].lower().startswith(SCHEME):
            raise APIError("The Authorization header must be given once, as 'Bearer KEY'.", WRONG_KEY)
        key = shown[0][len(SCHEME) :].strip()
        digest = hashlib.sha256(key).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise APIError("This API key is not one that the server accepts.", WRONG_KEY)
        return hashlib.sha256(b"pronk prefix cache\0" + digest).hexdigest()


class Auth:
    """ASGI: refuses who shows no key, and leaves the key's cache salt in `scope["state"]["cache_salt"]`."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Decided on the path that the router matches, never on a URL rebuilt from headers.
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            scope.setdefault("state", {})["cache_salt"] = self.keys.salt_for(scope["headers"])
        await self.app(scope, receive, send)
