"""HostProcess: the host as the server's process sees it: starts it, asks it for groups, learns how they ended.

Lives on one asyncio event loop. Knows `control`'s messages; not what goes over a group's link, and no tensor.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import Sequence

import msgspec

from pronk.engine import control, wire
from pronk.engine.control import GroupEnded
from pronk.engine.newborn import PROGRAM, Newborn

READ_SIZE = 1 << 16
HANG_UP_SECONDS = 5.0
"""How long a group may stay after its end of the link is closed: its processes are ending, and that tells why."""
HOST_SECONDS = 20.0
"""How long the host may take to kill a group or to end; it takes tenths of a second, and waits ten for a stuck rank."""


class HostedGroup:
    """One group, by its link and its end."""

    def __init__(self, host: HostProcess, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.pids: list[int] = []
        """By rank; empty until they run."""
        self.ended: asyncio.Future[GroupEnded] = asyncio.get_running_loop().create_future()
        self._host = host

    def kill(self) -> None:
        """Every rank, at once."""
        if not self.ended.done():
            self._host.send(control.StopGroup())

    async def end(self) -> GroupEnded:
        """Wait for the end of a group that has hung up; if it does not end, it is killed. -> how it ended."""
        if not await self._ends_within(HANG_UP_SECONDS):
            self.kill()
            if not await self._ends_within(HOST_SECONDS):
                self._host.kill()
        return await self.ended

    async def _ends_within(self, seconds: float) -> bool:
        await asyncio.wait([self.ended], timeout=seconds)
        return self.ended.done()


class HostProcess:
    """Make one with `spawn`, or of a `Newborn`; end it with `close`."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        connection.setblocking(False)
        self.pid = process.pid
        self._process = process
        self._connection = connection
        self._group: HostedGroup | None = None
        self._listener = asyncio.create_task(self._listen(), name="host-listener")

    @classmethod
    def spawn(cls, program: Sequence[str] = PROGRAM) -> HostProcess:
        """Start the process. program: Python's arguments, for a host whose ranks do something else. Raises OSError."""
        return cls(*Newborn(program).take())

    @property
    def has_ended(self) -> bool:
        """Whether no group can be had of it any more."""
        return self._listener.done()

    async def start_group(self, size: int, start_timeout: float) -> HostedGroup:
        """size: ranks; start_timeout: seconds without a beat while they start. The group before this is ended.

        Says nothing of whether it starts: if it does not, it ends. Raises OSError.
        """
        if self._group is not None:
            self._group.kill()
            await self._group.end()
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours, limit=wire.READ_SIZE)
            self._group = HostedGroup(self, reader, writer)
            self.send(control.StartGroup(size, start_timeout), theirs.fileno())
        return self._group

    def send(self, message: control.ToHost, *descriptors: int) -> None:
        """To a host that is gone, nothing is sent: its group has ended, or is about to be told so."""
        with contextlib.suppress(ConnectionError):
            socket.send_fds(self._connection, [wire.encode(message)], descriptors)

    def kill(self) -> None:
        """At once, and with it every rank."""
        self._process.kill()

    async def close(self) -> None:
        """End the group and the process. When this returns, they are gone."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
        if self._group is None or not self._group.pids:
            self.kill()  # it may be importing, which nobody has to wait for
        await asyncio.wait([self._listener], timeout=HOST_SECONDS)
        self.kill()  # does nothing to a process that has ended
        await self._listener
        self._connection.close()

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        frames = wire.Frames(control.FromHost)
        try:
            while data := await loop.sock_recv(self._connection, READ_SIZE):
                for message in frames.feed(data):
                    self._hear(message)
        except (ConnectionError, msgspec.MsgspecError):
            self.kill()  # it is gone, or out of its mind
        code = await asyncio.to_thread(self._process.wait)
        self._hear(GroupEnded(0, f"the host of its processes {_how_it_ended(code)}"))

    def _hear(self, message: object) -> None:
        group = self._group
        if group is None or group.ended.done():
            return
        if isinstance(message, control.GroupStarted):
            group.pids = message.pids
        elif isinstance(message, GroupEnded):
            group.pids = []
            group.ended.set_result(message)


def _how_it_ended(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
