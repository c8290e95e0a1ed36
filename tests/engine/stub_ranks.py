"""A host whose ranks share no model: they beat, and do what a test tells them by one byte.

    python stub_ranks.py FD PATIENCE

PATIENCE: seconds, once a rank serves; 0: it starts for ever. What rank 0 reads from its link: "p" is answered, "q" ends
it with 0, and a digit makes the rank of that number fail. A rank that loses another one says so by its exit code; "l"
makes rank 0 do so a while before rank 1 is gone. "f" makes rank 1 fail, and rank 0 a while later. A capital letter
makes all of them hang, all but one in an operation that they wait in for that one: "A" for rank 0, "B" for rank 1, "Z"
for somebody else.
"""

from __future__ import annotations

import functools
import select
import signal
import socket
import sys
import time

from pronk.engine.group import forked
from pronk.engine.host import Host
from pronk.engine.seat import LOST_PEER, Seat

BEAT_SECONDS = 0.02
LATE_SECONDS = 0.05
FAILURE = 7


class Leader:
    """Sockets to the followers."""

    def __init__(self, ends: list[socket.socket]) -> None:
        self.ends = ends

    def close(self) -> None:
        for end in self.ends:
            end.close()


def make_orders(size: int) -> tuple[Leader, list[socket.socket]]:
    pairs = [socket.socketpair() for _ in range(1, size)]
    return Leader([pair[0] for pair in pairs]), [pair[1] for pair in pairs]


def run_rank(patience: float, seat: Seat) -> int:
    if patience:
        seat.pulse.serve(patience)
    return lead(seat, seat.link) if seat.link else follow(seat)


def lead(seat: Seat, link: socket.socket) -> int:
    followers = seat.orders.ends if isinstance(seat.orders, Leader) else []
    for end in followers:
        end.recv(1)
    link.sendall(b"p")
    while True:
        seat.pulse.beat()
        readable, _, _ = select.select([link, *followers], [], [], BEAT_SECONDS)
        if any(end in readable for end in followers):
            return LOST_PEER
        if link in readable:
            told = link.recv(1)
            if told in (b"q", b""):
                return 0
            if told == b"0":
                return FAILURE
            if told == b"p":
                link.sendall(told)
            elif told == b"l":
                followers[0].sendall(told)
                return LOST_PEER
            elif told == b"f":
                followers[0].sendall(told)
                time.sleep(LATE_SECONDS)
                return FAILURE
            elif told.isupper():
                for end in followers:
                    end.sendall(told)
                hang(seat, told)
            else:
                followers[int(told) - 1].sendall(told)


def follow(seat: Seat) -> int:
    assert isinstance(seat.orders, socket.socket)
    seat.orders.sendall(b"p")
    while True:
        seat.pulse.beat()
        readable, _, _ = select.select([seat.orders], [], [], BEAT_SECONDS)
        if readable:
            told = seat.orders.recv(1)
            if told == b"l":
                time.sleep(LATE_SECONDS)
            if told.isupper():
                hang(seat, told)
            return FAILURE if told else LOST_PEER


def hang(seat: Seat, told: bytes) -> None:
    """For ever; in an operation unless it is this rank that was told. "h" on the link says that all do."""
    if ord(told) - ord("A") != seat.rank:
        seat.pulse.operate()
    if isinstance(seat.orders, Leader) and seat.link:
        for end in seat.orders.ends:
            end.recv(1)
        seat.link.sendall(b"h")
    elif isinstance(seat.orders, socket.socket):
        seat.orders.sendall(b"h")
    signal.pause()


if __name__ == "__main__":
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    live = functools.partial(run_rank, float(sys.argv[2]))
    Host(connection, make_orders, lambda leave: forked(live, leave)).run()
