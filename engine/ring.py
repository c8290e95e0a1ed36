"""A channel on one host: a ring of shared memory that the leader writes and every follower reads, and pipes.

The memory is anonymous and the pipes have no names: made before the ranks fork, inherited by them, and gone with the
last of them, however they end. A message lies in memory once, for all followers. Does not know what a message says.

The ring holds a stream of bytes. A message is its length in eight bytes, its bytes, and zeros to the next multiple of
eight; it may go around the end of the memory, and may be longer than the memory, for the leader writes as much as there
is room for, says so, and goes on when the followers have read. Positions count from the first byte ever written; modulo
the capacity they are places in memory.

Memory holds nothing but the stream; all that says how far it is written or read goes through pipes. After writing, the
leader sends the new position down one pipe to each follower, which wakes it and is all that it knows of what it may
read. After reading a quarter of the capacity, a follower sends its position up another pipe, which is all that the
leader knows of what it may overwrite. This is right on every processor, and needs no look at its rules for ordering
memory: a pipe has a lock, so what was stored before a write to it is seen by whoever has read what was written, and
what was loaded before a write cannot be replaced by stores that follow the read. A counter in memory would have to be
ordered with the data around it, for which Python has no means: on Arm, a follower that looks at a counter while the
leader goes on writing may see the counter before the bytes.

No wake-up is lost, because no position is: the leader waits if a pipe is full, as it waits if the ring is.

A process that is gone, SIGKILLed too, is the end of file of its pipes, provided that nobody else holds the same ends:
each rank closes what is not its own (`Ring.leader`, `Ring.follower`), and a rank that forks closes them in its child.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import struct
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pronk.engine.channel import raise_gone
from pronk.engine.errors import LeaderGone

CAPACITY = 16 << 20
DEADLINE_SECONDS = 30.0
WORD = struct.Struct("<Q")
"""Lengths in the ring, and positions in the pipes. Shorter than PIPE_BUF: a pipe takes or gives all of it."""
READ_SIZE = 512 * WORD.size
GONE = "has ended"


class Pipe(NamedTuple):
    reader: int
    writer: int


def make_ring(num_followers: int, capacity: int = CAPACITY, deadline: float = DEADLINE_SECONDS) -> Ring:
    """To be called before the ranks 1 to num_followers are forked.

    capacity: in bytes, a multiple of 32; memory is taken from the system as it is first written. deadline: seconds that
    the leader waits for a follower that does not read.
    """
    if num_followers < 1 or capacity < 4 * WORD.size or capacity % (4 * WORD.size):
        raise ValueError("a ring has a follower and a multiple of 32 bytes")
    ranks = range(1, num_followers + 1)
    down = {rank: Pipe(*os.pipe()) for rank in ranks}
    up = {rank: Pipe(*os.pipe()) for rank in ranks}
    return Ring(mmap.mmap(-1, capacity), down, up, deadline)


class Ring:
    """All ends of the channel, for each process to take its own from. down, up: the pipes to and from each rank."""

    def __init__(self, memory: mmap.mmap, down: Mapping[int, Pipe], up: Mapping[int, Pipe], deadline: float) -> None:
        self.memory = memory
        self.down = down
        self.up = up
        self.deadline = deadline

    def leader(self) -> RingLeader:
        """The leader's end; closes all others in this process."""
        leader = RingEnd(self, 0).lead()
        self._close_all_but(
            {*(pipe.writer for pipe in self.down.values()), *(pipe.reader for pipe in self.up.values())}
        )
        return leader

    def follower(self, rank: int) -> RingFollower:
        """The end of this rank, 1 or higher; closes all others in this process."""
        end = RingEnd(self, rank)
        self._close_all_but({*end.descriptors})
        return end.follow()

    def close(self) -> None:
        """For a process that is none of the ranks, as one that only forks them."""
        self._close_all_but(set())
        self.memory.close()

    def _close_all_but(self, own: set[int]) -> None:
        for pipe in (*self.down.values(), *self.up.values()):
            for end in pipe:
                if end not in own:
                    os.close(end)


class RingEnd:
    """One rank's end of a ring before the rank has taken it up: what a process holds, and can give up."""

    def __init__(self, ring: Ring, rank: int) -> None:
        self._ring = ring
        self._rank = rank

    def lead(self) -> RingLeader:
        """Rank 0's end. Those of the other ranks must be closed in this process."""
        ring = self._ring
        down = {rank: pipe.writer for rank, pipe in ring.down.items()}
        up = {rank: pipe.reader for rank, pipe in ring.up.items()}
        return RingLeader(ring.memory, down, up, ring.deadline)

    def follow(self) -> RingFollower:
        """The end of another rank. Those of all others must be closed in this process."""
        ring = self._ring
        return RingFollower(ring.memory, ring.down[self._rank].reader, ring.up[self._rank].writer)

    def close(self) -> None:
        """Give it up, in this process."""
        for end in self.descriptors:
            os.close(end)

    @property
    def descriptors(self) -> list[int]:
        """Its ends of pipes."""
        down, up = self._ring.down, self._ring.up
        if self._rank:
            return [down[self._rank].reader, up[self._rank].writer]
        return [*(pipe.writer for pipe in down.values()), *(pipe.reader for pipe in up.values())]


def ring_ends(size: int) -> tuple[RingEnd, list[RingEnd]]:
    """A ring for the ranks of a group, before they are forked. -> rank 0's end, and the others' by their ranks."""
    ring = make_ring(size - 1)
    return RingEnd(ring, 0), [RingEnd(ring, rank) for rank in range(1, size)]


def wait(ends: Iterable[int], event: int, seconds: float) -> list[int]:
    """-> the file descriptors that this poll event, or the other side's end, has come to in so many seconds."""
    poll = select.poll()
    for end in ends:
        poll.register(end, event)
    return [end for end, _ in poll.poll(max(0.0, seconds) * 1000)]


class RingLeader:
    """Writes. See channel.Leader.

    down: where to write positions for each rank. up: where each rank's positions come from.
    """

    def __init__(self, memory: mmap.mmap, down: Mapping[int, int], up: Mapping[int, int], deadline: float) -> None:
        self._mapping = memory
        self._memory = memoryview(memory)
        self._capacity = len(memory)
        self._deadline = deadline
        self._down = dict(down)
        self._up = dict(up)
        self._written = 0
        self._read = dict.fromkeys(down, 0)
        """How far each follower has read at least."""
        self._gone: dict[int, str] = {}
        """Ranks that have ended, and why we say so: the others do not wait for them."""
        self._stuck: dict[int, str] = {}
        """Ranks that are there and do not read. Nothing is sent any more: it would overwrite what they may yet read."""
        for end in self._down.values():
            os.set_blocking(end, False)

    def send(self, message: bytes | memoryview) -> None:
        if self._stuck:
            raise_gone(self._gone | self._stuck)
        self._wait_for_room()
        WORD.pack_into(self._memory, self._written % self._capacity, len(message))
        self._written += WORD.size
        self._put(memoryview(message))
        self._written += -self._written % WORD.size
        self._tell()
        raise_gone(self._gone)

    def check(self) -> None:
        self._listen(0)
        raise_gone(self._gone | self._stuck)

    def close(self) -> None:
        for rank in list(self._down):
            self._forget(rank)
        self._memory.release()
        self._mapping.close()

    def _put(self, data: memoryview) -> None:
        """Write data as there is room for it; the followers are told of all but the last part.

        Positions are multiples of eight whenever anybody is told of them: room is one, and so is the memory's end. For
        that reason, there is also room for the padding, and a length never goes around the end.
        """
        while len(data):
            place = self._written % self._capacity
            size = min(len(data), self._wait_for_room(), self._capacity - place)
            self._memory[place : place + size] = data[:size]
            self._written += size
            data = data[size:]

    def _room(self) -> int:
        """-> bytes that no follower has yet to read, a multiple of eight."""
        return self._capacity - (self._written - min(self._read.values(), default=self._written))

    def _wait_for_room(self) -> int:
        """-> bytes that can be written, more than none. Raises GroupError at the deadline.

        It comes: a follower that has read all it was told of has kept less than a quarter of the ring to itself.
        """
        if room := self._room():
            return room
        self._tell()
        until = time.monotonic() + self._deadline
        while not (room := self._room()):
            if time.monotonic() >= until:
                self._give_up([rank for rank, read in self._read.items() if self._written - read == self._capacity])
            self._listen(until - time.monotonic())
        return room

    def _tell(self) -> None:
        """Let every follower know how far the ring is written. Raises GroupError at the deadline."""
        position = WORD.pack(self._written)
        waiting = [rank for rank in list(self._down) if not self._tell_one(rank, position)]
        until = time.monotonic() + self._deadline
        while waiting:  # for followers that are thousands of messages behind; the others have been told
            if time.monotonic() >= until:
                self._give_up(waiting)
            wait([self._down[rank] for rank in waiting], select.POLLOUT, until - time.monotonic())
            waiting = [rank for rank in waiting if not self._tell_one(rank, position)]

    def _tell_one(self, rank: int, position: bytes) -> bool:
        """-> whether that is done with: False if the pipe is full."""
        try:
            os.write(self._down[rank], position)
        except BlockingIOError:
            return False
        except BrokenPipeError:
            self._gone[rank] = GONE
            self._forget(rank)
        return True

    def _listen(self, seconds: float) -> None:
        """Wait until a follower says how far it has read, or has ended."""
        ranks = {end: rank for rank, end in self._up.items()}
        for end in wait(ranks, select.POLLIN, seconds):
            positions = os.read(end, READ_SIZE)
            if positions:
                (self._read[ranks[end]],) = WORD.unpack(positions[-WORD.size :])
            else:
                self._gone[ranks[end]] = GONE
                self._forget(ranks[end])

    def _give_up(self, ranks: list[int]) -> None:
        """Raises GroupError."""
        self._stuck.update(dict.fromkeys(ranks, f"has read nothing for {self._deadline:g} seconds"))
        raise_gone(self._gone | self._stuck)

    def _forget(self, rank: int) -> None:
        os.close(self._down.pop(rank))
        os.close(self._up.pop(rank))
        del self._read[rank]


class RingFollower:
    """Reads. See channel.Follower. down: where the leader's positions come from. up: where to write its own."""

    def __init__(self, memory: mmap.mmap, down: int, up: int) -> None:
        self._mapping = memory
        self._memory = memoryview(memory)
        self._capacity = len(memory)
        self._down = down
        self._up = up
        self._poll = select.poll()
        self._poll.register(down, select.POLLIN)
        self._written = 0
        """How far the leader says that the ring is written."""
        self._read = 0
        self._reported = 0
        """How far the leader has been told that we have read."""
        self._parts: list[bytes] = []
        """Of the message that has been begun."""
        self._missing: int | None = None
        """How many bytes it lacks; None between two messages."""

    def receive(self, timeout: float | None) -> bytes | None:
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            message = self._take()
            if message:
                return message
            if message is None and not self._listen(until):
                return None

    def close(self) -> None:
        os.close(self._down)
        os.close(self._up)
        self._memory.release()
        self._mapping.close()

    def _take(self) -> bytes | None:
        """-> the next message, if it has been written to its end."""
        if self._missing is None:
            if self._read == self._written:
                return None
            (self._missing,) = WORD.unpack_from(self._memory, self._read % self._capacity)
            self._read += WORD.size
            self._report()
        while self._missing and self._read < self._written:
            self._missing -= self._take_part(self._missing)
        if self._missing:
            return None
        message = b"".join(self._parts)
        self._parts.clear()
        self._missing = None
        return message

    def _take_part(self, size: int) -> int:
        """Copy as much of these many bytes as is written and lies in one piece. -> how much."""
        place = self._read % self._capacity
        size = min(size, self._written - self._read, self._capacity - place)
        self._parts.append(bytes(self._memory[place : place + size]))
        self._read += size + -size % WORD.size  # all parts but the last are multiples of eight
        self._report()
        return size

    def _report(self) -> None:
        """Let the leader write again what was read, a quarter of the ring at a time.

        The pipe is never full: the leader empties it before it goes on from a full ring, four reports after the last.
        """
        if self._read - self._reported >= self._capacity // 4:
            # Where the leader is gone, what it has sent before is still to be received.
            with contextlib.suppress(BrokenPipeError):
                os.write(self._up, WORD.pack(self._read))
            self._reported = self._read

    def _listen(self, until: float | None) -> bool:
        """Wait for news of the leader. -> whether there were any before `until` (monotonic). Raises LeaderGone."""
        seconds = None if until is None else max(0.0, until - time.monotonic())
        if not self._poll.poll(None if seconds is None else seconds * 1000):
            return False
        positions = os.read(self._down, READ_SIZE)
        if not positions:
            raise LeaderGone("the leader of the group has ended")
        (self._written,) = WORD.unpack(positions[-WORD.size :])
        return True
