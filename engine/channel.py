"""How the leader of a tensor-parallel group (rank 0) tells its followers what to compute: the face of every channel.

A message is bytes. All followers get all messages, each once and in order. `engine/ring.py` carries them on one host,
`engine/sockets.py` between hosts. Does not know what a message says.

An empty message is a sign of life: it goes the way of the others, and `receive` does not return it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from pronk.engine.errors import GroupError


class Leader(Protocol):
    """Rank 0's end. For one thread."""

    def send(self, message: bytes | memoryview) -> None:
        """To every follower; a memoryview is of single bytes (format "B").

        Returns before they have read it, and waits only for a follower that is too far behind. Raises GroupError, which
        names the ranks that are gone or do not read; whoever is still there has got the message even so, unless there
        was no room for it. After that, the group is over: what is left to do is `close`.
        """

    def check(self) -> None:
        """Raises GroupError if a follower is gone; costs microseconds."""

    def close(self) -> None:
        """Every follower gets what was sent, and then LeaderGone."""


class Follower(Protocol):
    """The end of one of the other ranks. For one thread."""

    def receive(self, timeout: float | None) -> bytes | None:
        """-> the next message, or None if there was none in `timeout` seconds (None: wait as long as it takes).

        Raises LeaderGone when the leader has closed or died, after its last whole message has been received.
        """

    def close(self) -> None:
        """The leader learns that this rank is gone."""


def raise_gone(reasons: Mapping[int, str]) -> None:
    """Raise an error that names these ranks and what is the matter with each; nothing if there are none."""
    if reasons:
        raise GroupError("; ".join(f"rank {rank} {reason}" for rank, reason in sorted(reasons.items())), reasons)
