"""The host: a process that imports what ranks need, once, and forks them whenever the server wants a group.

    python -m pronk.engine.host FD

FD is a connected socket, over which `control` goes. When its other end closes, the group is killed and this process
ends. So a group is up in tenths of a second plus the time to load a model, and comes back as fast when it died. Stays
of one thread and never touches a device, or a fork would not be safe. Knows processes; no model and no request.
"""

from __future__ import annotations

import gc
import select
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable

from pronk.engine import control, wire
from pronk.engine.errors import PronkError
from pronk.engine.group import Group, Launch, forked, make_seats, spawned
from pronk.engine.ring import ring_ends
from pronk.engine.seat import MakeOrders

READ_SIZE = 1 << 16
MAX_DESCRIPTORS = 8
"""In one read: one comes with each group that is started."""


class Disconnected(PronkError):
    """The server's end of the control socket is closed."""


class Host:
    """Starts one group after another, and says how each ended."""

    def __init__(
        self,
        connection: socket.socket,
        make_orders: MakeOrders,
        launch: Callable[[Callable[[], None]], Launch],
        *,
        is_watched: bool = True,
    ) -> None:
        """launch: is given what a new process has to give up of the host's. is_watched: whether ranks beat."""
        self._connection = connection
        self._make_orders = make_orders
        self._launch = launch(self._leave)
        self._is_watched = is_watched
        self._frames = wire.Frames(control.ToHost)
        self._links: deque[int] = deque()
        self._group: Group | None = None
        self._wake, self._alarm = socket.socketpair()

    def run(self) -> None:
        """Serve until the server is gone; nothing of a group is left then."""
        self._watch_children()
        try:
            while True:
                self._wait(self._connection)
                self._look()
                self._obey()
        except Disconnected:
            self._end()

    def _watch_children(self) -> None:
        """Wake `_wait` whenever a child ends."""
        self._wake.setblocking(False)
        self._alarm.setblocking(False)
        signal.set_wakeup_fd(self._alarm.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def _leave(self) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for end in (self._connection, self._wake, self._alarm):
            end.close()

    def _wait(self, *others: socket.socket) -> None:
        """Until a child ends, one of the others has something to read, or the group wants to be looked at."""
        timeout = None if self._group is None else self._group.tick
        readable, _, _ = select.select([self._wake, *others], [], [], timeout)
        if self._wake in readable:
            self._wake.recv(READ_SIZE)

    def _look(self) -> None:
        end = None if self._group is None else self._group.look()
        if end is not None:
            self._group = None
            self._send(end)

    def _obey(self) -> None:
        """Do what the server says, if it says something. Raises Disconnected."""
        readable, _, _ = select.select([self._connection], [], [], 0)
        for message in self._receive() if readable else ():
            if isinstance(message, control.StartGroup):
                self._start(message)
            elif isinstance(message, control.StopGroup) and self._group is not None:
                self._group.stop()

    def _start(self, order: control.StartGroup) -> None:
        if self._group is not None:
            raise PronkError("the host was asked for a group while it has one")
        link = socket.socket(fileno=self._links.popleft())
        link.set_inheritable(False)
        try:
            seats = make_seats(order.size, link, self._make_orders)
            self._group = Group(order, seats, self._launch, is_watched=self._is_watched)
        except OSError as error:
            self._send(control.GroupEnded(0, f"not all of its processes could be started: {error}"))
        else:
            self._send(control.GroupStarted(self._group.pids))

    def _end(self) -> None:
        """Kill the group, if there is one, and wait until it is gone."""
        if self._group is not None:
            self._group.stop()
            while self._group.look() is None:
                self._wait()

    def _receive(self) -> list[object]:
        """Raises Disconnected."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._connection, READ_SIZE, MAX_DESCRIPTORS)
        except ConnectionError as error:
            raise Disconnected("the server is gone") from error
        if not data:
            raise Disconnected("the server is gone")
        self._links.extend(descriptors)
        return self._frames.feed(data)

    def _send(self, message: control.FromHost) -> None:
        """Raises Disconnected."""
        try:
            self._connection.sendall(wire.encode(message))
        except ConnectionError as error:
            raise Disconnected("the server is gone") from error


def main() -> int:
    """-> exit code."""
    # The server decides when to stop, as it does for the ranks, which inherit this.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    if sys.platform != "linux":
        # What is imported there starts threads, and a fork of those is not safe. A rank by itself shares no memory.
        Host(connection, ring_ends, lambda leave: spawned, is_watched=False).run()
        return 0
    # Modules make no garbage: to look for it while they are imported takes a sixth of the time, and finds nothing.
    gc.disable()
    from pronk.engine.process import run_rank

    # What is there now stays for good: no collection writes to pages that all ranks share.
    gc.collect()
    gc.freeze()
    gc.enable()
    Host(connection, ring_ends, lambda leave: forked(run_rank, leave)).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
