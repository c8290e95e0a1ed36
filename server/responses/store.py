"""ResponseStore: responses that may be asked for again, for as long as there is room and they are not too old.

In memory, and gone with the process. Bounded in number, bytes and age; the oldest go first. Each belongs to an owner
(the API key's salt): for everybody else it does not exist. Lives on the event loop, and is not for other threads. Knows
responses as JSON objects; no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pronk.server.errors import UNKNOWN_RESPONSE, APIError
from pronk.server.responses.items import ItemDict
from pronk.server.streaming import to_json


@dataclass
class Stored:
    """A response and what it was made of."""

    body: dict[str, Any]
    """As it is told; while it is being made in the background, as far as it is."""
    input: list[ItemDict]
    """The items of its own request."""
    before: list[ItemDict]
    """The items of the conversation before it, instructions left out."""
    task: asyncio.Task[None] | None = None
    """That makes it in the background."""
    size: int = field(default=0)
    stored_at: float = field(default=0.0)

    @property
    def conversation(self) -> list[ItemDict]:
        """What a request that goes on after it begins with."""
        return [*self.before, *self.input, *self.body["output"]]


class ResponseStore:
    """Stored responses, oldest first."""

    def __init__(
        self,
        *,
        max_responses: int,
        max_bytes: int,
        max_age_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """max_responses 0: nothing is kept."""
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._max_age = max_age_seconds
        self._clock = clock
        self._stored: OrderedDict[tuple[str, str], Stored] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def num_bytes(self) -> int:
        """Of what is kept, as JSON."""
        return self._bytes

    def put(self, owner: str, stored: Stored) -> None:
        """Keep it, in place of the one of the same id if there is one; what there is no room for goes."""
        key = (owner, stored.body["id"])
        self._drop(key)
        # What it shares with others of its conversation is counted again: a bound, and cheap to keep.
        stored.size = len(to_json([stored.body, stored.input, stored.before]))
        stored.stored_at = self._clock()
        self._stored[key] = stored
        self._bytes += stored.size
        self._make_room()

    def get(self, owner: str, response_id: str, param: str | None = None) -> Stored:
        """Raises APIError (404), which names `param`."""
        self._make_room()
        stored = self._stored.get((owner, response_id))
        if stored is None:
            raise APIError(f"There is no response with the id '{response_id[:100]}'.", UNKNOWN_RESPONSE, param)
        return stored

    def find_items(self, owner: str, wanted: Mapping[str, str]) -> dict[str, ItemDict]:
        """wanted: ids of items that answers of the owner's hold, each with the field of the request that names it.
        -> the items, of each the newest. Raises APIError (404), which names the field of one that there is not."""
        self._make_room()
        found: dict[str, ItemDict] = {}
        for (held_by, _), stored in reversed(self._stored.items()):
            if len(found) == len(wanted):
                break
            if held_by == owner:
                for item in (*stored.body["output"], *stored.input):
                    name = item.get("id")
                    if name in wanted:
                        found.setdefault(name, item)
        for item_id, param in wanted.items():
            if item_id not in found:
                raise APIError(f"There is no item with the id '{item_id[:100]}'.", UNKNOWN_RESPONSE, param)
        return found

    def delete(self, owner: str, response_id: str) -> None:
        """Raises APIError (404)."""
        stored = self.get(owner, response_id)
        if stored.task is not None:
            stored.task.cancel()
        self._drop((owner, response_id))

    def _make_room(self) -> None:
        oldest_allowed = self._clock() - self._max_age
        while self._stored:
            key, stored = next(iter(self._stored.items()))
            is_full = len(self._stored) > self._max_responses or self._bytes > self._max_bytes
            if not is_full and stored.stored_at >= oldest_allowed:
                return
            self._drop(key)

    def _drop(self, key: tuple[str, str]) -> None:
        stored = self._stored.pop(key, None)
        if stored is not None:
            self._bytes -= stored.size
