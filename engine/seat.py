"""Seat: what one rank finds when it comes up, made by the host before it forks. And Pulse, by which it is watched.

A group is the processes that share a model; a rank is one of them, by its number: rank 0 has the scheduler and speaks
with the server, the others do as it tells them. Nothing that ranks share has a name outside of them, so nothing can be
left behind when they die. Knows no model, and neither who forks nor who watches.
"""

from __future__ import annotations

import mmap
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

LOST_PEER = 3
"""Exit code of a rank that ended because another one did: it is not the one to be named as the reason."""

_SLOT = 1024
"""Bytes of each rank in the memory that all share: three words of its beat, and after a cache line its last words."""
_LAST_WORDS = 64
_WORDS = _SLOT // 8
_NANOSECONDS = 10**9


class OrdersEnd(Protocol):
    """One rank's end of the channel by which rank 0 tells the others what to do."""

    def close(self) -> None:
        """Give it up: called by every rank, and by the host, for the ends that are not its own."""


MakeOrders = Callable[[int], tuple[OrdersEnd, Sequence[OrdersEnd]]]
"""size of the group -> the leader's end, and the followers' by their ranks, from rank 1 on."""


@dataclass(frozen=True)
class Beat:
    """What a rank last said of itself."""

    at: float
    """Seconds of time.monotonic."""
    patience: float
    """Seconds until the next beat after which the rank counts as hung; 0: it is starting, and has not said."""
    operations: int
    """That all ranks do together: how many it has begun."""


class Pulse:
    """Shows that a rank gets on. One rank writes it, the host reads it; they share the memory."""

    def __init__(self, memory: mmap.mmap, rank: int) -> None:
        """memory: of `shared_memory`."""
        words = memoryview(memory).cast("q")
        self._words = words[rank * _WORDS : (rank + 1) * _WORDS]
        self._last_words = memoryview(memory)[rank * _SLOT + _LAST_WORDS : (rank + 1) * _SLOT]
        self.beat()

    def beat(self) -> None:
        """The rank is alive. To be called after every step, and at least every `patience` / 4 seconds while idle."""
        self._words[0] = time.monotonic_ns()

    def serve(self, patience: float) -> None:
        """The rank has started. patience: seconds that a step of it may take, and more than 0."""
        self._words[1] = int(patience * _NANOSECONDS)
        self.beat()

    def operate(self) -> None:
        """The rank begins an operation that all ranks do together, where one that does not come makes all others wait.
        No beat: it may wait for ever."""
        self._words[2] += 1

    def say(self, text: str) -> None:
        """Before it ends: why. Once; what is longer than a page of a book is cut."""
        data = text.encode(errors="replace")[: len(self._last_words) - 1]
        self._last_words[: len(data)] = data

    def last_words(self) -> str:
        """For the host: what the rank said, or nothing."""
        return bytes(self._last_words).rstrip(b"\0").decode(errors="replace")

    def read(self) -> Beat:
        """For the host."""
        return Beat(self._words[0] / _NANOSECONDS, self._words[1] / _NANOSECONDS, self._words[2])


def shared_memory(size: int) -> mmap.mmap:
    """-> memory for the pulses of `size` ranks, which is shared with the processes forked after this."""
    return mmap.mmap(-1, max(size * _SLOT, mmap.PAGESIZE))


def lone_pulse() -> Pulse:
    """-> a pulse that nobody watches."""
    return Pulse(shared_memory(1), 0)


@dataclass(frozen=True, kw_only=True)
class Seat:
    """One rank's place in its group. What belongs to another rank is closed already."""

    rank: int = 0
    size: int = 1
    pulse: Pulse = field(default_factory=lone_pulse)
    link: socket.socket | None = None
    """To the server, over which `wire` goes. Rank 0 only."""
    store_listener: socket.socket | None = None
    """Listens on 127.0.0.1, for the store by which the ranks find each other's devices. Rank 0 only, of several."""
    store_port: int = 0
    """Of that socket, for every rank; 0 where the rank is the only one."""
    orders: OrdersEnd | None = None
    """This rank's end: the leader's for rank 0, else a follower's; None where the rank is the only one."""
