"""Leading: rank 0's word to the other ranks, and its look at whether they are still there.

Knows orders and a channel; not what orders are good for.
"""

from __future__ import annotations

import time

from pronk.engine.channel import Leader
from pronk.engine.errors import GroupError
from pronk.engine.orders import Order, encode

SIGN_SECONDS = 1.0
"""How often the others hear something, and are looked at. They count silence in seconds too: see `sockets`."""
BLAME_SECONDS = 0.2
"""How long after a failed operation a rank's end is waited for: it is what is to be told then."""
LOOK_SECONDS = 0.01


class Leading:
    """For one thread. leader: None where there is nobody to be told."""

    def __init__(self, leader: Leader | None) -> None:
        self._leader = leader
        self._next_sign = 0.0

    def tell(self, order: Order) -> None:
        """Raises GroupError when a rank is gone."""
        if self._leader is not None:
            self._leader.send(encode(order))

    def keep(self) -> None:
        """To be called at least once a second, and as often as one likes. Raises GroupError when a rank is gone."""
        now = time.monotonic()
        if self._leader is not None and now >= self._next_sign:
            self._next_sign = now + SIGN_SECONDS
            self._leader.send(b"")
            self._leader.check()

    def blame(self, error: GroupError) -> GroupError:
        """error: of an operation that all ranks do together. -> one for the people who wait: it names who is gone,
        where that can be seen, and nothing of how ranks are reached."""
        if self._leader is None or error.ranks:
            return error
        until = time.monotonic() + BLAME_SECONDS
        while time.monotonic() < until:
            try:
                self._leader.check()
            except GroupError as found:
                return found
            time.sleep(LOOK_SECONDS)
        return GroupError("another rank does not answer: its host, or the network between them, may be down")
