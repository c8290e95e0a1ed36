"""A channel between hosts: one TCP connection from the leader to each follower that shares no memory with it.

Messages are frames: eight bytes of length, little-endian, then the message. A follower connects and says who it is in
the only frame that it ever sends: its rank in four bytes, then the token that the whole group was given. The leader
drops who says anything else, and sends its first frame, an empty one, when every expected rank has come. Both must be
on a network that others cannot listen to: nothing is encrypted. Does not know what a message says.

A host that disappears closes nothing. The leader notices by a deadline when it sends, and by the system's keep-alives
when it does not (`check`); a follower by silence, which is why the leader's caller sends an empty message about once a
second when there is nothing else to send.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import select
import selectors
import socket
import struct
import time
from collections.abc import Iterable

from pronk.engine.channel import raise_gone
from pronk.engine.errors import GroupError, LeaderGone

LENGTH = struct.Struct("<Q")
RANK = struct.Struct("<I")
MAX_HELLO = 1024
"""Bytes of a follower's frame: whoever says more is none."""
MAX_STRANGERS = 64
"""Connections that have not said yet who they are."""
READ_SIZE = 1 << 18
PATIENCE_SECONDS = 120.0
DEADLINE_SECONDS = 30.0
SILENCE_SECONDS = 30.0
RETRY_SECONDS = 0.2
ATTEMPT_SECONDS = 5.0

Address = tuple[str, int]
"""Host and port."""

log = logging.getLogger("pronk.engine")


def listen(address: Address) -> socket.socket:
    """-> a socket for SocketLeader. Port 0: any that is free. Raises GroupError."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    try:
        return socket.create_server(address, family=family)
    except OSError as error:
        raise GroupError(f"cannot listen for the group's other hosts on {spell(address)}: {error}", (0,)) from error


class SocketLeader:
    """See channel.Leader.

    listener: is closed when every rank has come. ranks: which must come, in `patience` seconds. deadline: in seconds,
    for a follower to take a message. Raises GroupError, which names the ranks that did not come.
    """

    def __init__(
        self,
        listener: socket.socket,
        ranks: Iterable[int],
        token: str,
        *,
        patience: float = PATIENCE_SECONDS,
        deadline: float = DEADLINE_SECONDS,
    ) -> None:
        self._deadline = deadline
        self._gone: dict[int, str] = {}
        """Ranks whose connection is closed, and why."""
        self._connections = _Reception(listener, ranks, token).receive(patience)
        for connection in self._connections.values():
            tune(connection, deadline)
        self.send(b"")

    def send(self, message: bytes | memoryview) -> None:
        frame = LENGTH.pack(len(message)) + message
        unsent = self._push(dict.fromkeys(self._connections, memoryview(frame)))
        until = time.monotonic() + self._deadline
        while unsent:
            seconds = until - time.monotonic()
            if seconds <= 0:
                self._forget(unsent, f"has taken no message for {self._deadline:g} seconds")
                break
            self._wait(unsent, select.POLLOUT, seconds)
            unsent = self._push(unsent)
        raise_gone(self._gone)

    def check(self) -> None:
        for rank in self._wait(self._connections, select.POLLIN, 0):
            try:
                said = self._connections[rank].recv(READ_SIZE)
            except BlockingIOError:
                continue
            except OSError as error:
                self._forget([rank], f"is lost: {error.strerror}")
            else:
                self._forget([rank], "speaks out of turn" if said else "has closed its connection")
        raise_gone(self._gone)

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def _push(self, unsent: dict[int, memoryview]) -> dict[int, memoryview]:
        """Send what can be sent at once. -> what is left for each rank, where anything is."""
        left = {}
        for rank, data in unsent.items():
            try:
                rest = data[self._connections[rank].send(data) :]
            except BlockingIOError:
                rest = data
            except OSError as error:
                self._forget([rank], f"is lost: {error.strerror}")
                continue
            if rest:
                left[rank] = rest
        return left

    def _wait(self, ranks: Iterable[int], event: int, seconds: float) -> list[int]:
        """-> those of these ranks whose sockets are ready for this poll event, or at an end."""
        poll = select.poll()
        by_descriptor = {self._connections[rank].fileno(): rank for rank in ranks}
        for descriptor in by_descriptor:
            poll.register(descriptor, event)
        return [by_descriptor[descriptor] for descriptor, _ in poll.poll(seconds * 1000)]

    def _forget(self, ranks: Iterable[int], reason: str) -> None:
        for rank in ranks:
            self._connections.pop(rank).close()
            self._gone[rank] = reason


class _Reception:
    """Takes connections until every expected rank has come, however others behave."""

    def __init__(self, listener: socket.socket, ranks: Iterable[int], token: str) -> None:
        self._listener = listener
        self._expected = frozenset(ranks)
        self._token = token.encode()
        self._strangers: dict[socket.socket, bytearray] = {}
        """What each has said so far; the oldest first."""
        self._arrived: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()

    def receive(self, patience: float) -> dict[int, socket.socket]:
        """-> the connection of each rank. Closes the listener and all other connections. Raises GroupError."""
        until = time.monotonic() + patience
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        try:
            while missing := self._expected - self._arrived.keys():
                if time.monotonic() >= until:
                    names = ", ".join(map(str, sorted(missing)))
                    raise GroupError(f"of the group's ranks on other hosts, {names} did not come", missing)
                self._turn(until - time.monotonic())
        except BaseException:
            for connection in self._arrived.values():
                connection.close()
            raise
        finally:
            for connection in self._strangers:
                connection.close()
            self._listener.close()
            self._selector.close()
        return self._arrived

    def _turn(self, seconds: float) -> None:
        for key, _ in self._selector.select(max(0.0, seconds)):
            connection = key.fileobj
            if connection is self._listener:
                self._admit()
            elif isinstance(connection, socket.socket) and connection.fileno() >= 0:  # not dropped in this very turn
                self._hear(connection)

    def _admit(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # it has gone again
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ)
        self._strangers[connection] = bytearray()
        if len(self._strangers) > MAX_STRANGERS:
            self._drop(next(iter(self._strangers)), "it says nothing")

    def _hear(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(MAX_HELLO)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        said = self._strangers.get(connection)
        if not data:
            self._drop(connection, "it has closed")
        elif said is None:
            self._drop(connection, "it speaks out of turn")
        else:
            said += data
            self._judge(connection, bytes(said))

    def _judge(self, connection: socket.socket, said: bytes) -> None:
        """Decide who a stranger is, if it has said it to the end."""
        if len(said) < LENGTH.size:
            return
        (length,) = LENGTH.unpack_from(said)
        hello = said[LENGTH.size :]
        if not RANK.size <= length <= MAX_HELLO or len(hello) > length:
            self._drop(connection, "it is no follower")
        elif len(hello) == length:
            (rank,) = RANK.unpack_from(hello)
            if not hmac.compare_digest(hello[RANK.size :], self._token):
                self._drop(connection, "its token is wrong")
            elif rank not in self._expected or rank in self._arrived:
                self._drop(connection, f"it says that it is rank {rank}, which is not expected")
            else:
                self._arrived[rank] = connection
                del self._strangers[connection]

    def _drop(self, connection: socket.socket, reason: str) -> None:
        with contextlib.suppress(OSError):
            log.warning("dropped a connection to the group from %s: %s", connection.getpeername()[0], reason)
        self._selector.unregister(connection)
        self._strangers.pop(connection, None)
        self._arrived = {rank: other for rank, other in self._arrived.items() if other is not connection}
        connection.close()


class SocketFollower:
    """See channel.Follower.

    address: the leader's. patience: seconds to get through to it, and for the whole group to come. silence: seconds of
    listening without a sign of life, after which `receive` raises LeaderGone. Raises LeaderGone when it does not come
    about.
    """

    def __init__(
        self,
        address: Address,
        rank: int,
        token: str,
        *,
        patience: float = PATIENCE_SECONDS,
        silence: float = SILENCE_SECONDS,
    ) -> None:
        until = time.monotonic() + patience
        self._silence = silence
        self._silent = 0.0
        """Seconds spent listening since something was heard. Time that the caller spends elsewhere says nothing about
        the leader, which may have been waiting for that very rank."""
        self._buffer = bytearray()
        self._connection = connect(address, until)
        try:
            self._enter(address, rank, token, until)
        except BaseException:
            self._connection.close()
            raise

    def receive(self, timeout: float | None) -> bytes | None:
        """Raises LeaderGone also after `silence` seconds in which not even an empty message has come."""
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            while (message := self._cut()) is not None:
                if message:
                    return message
            if not self._listen(until) and until is not None and time.monotonic() >= until:
                return None

    def close(self) -> None:
        self._connection.close()

    def _enter(self, address: Address, rank: int, token: str, until: float) -> None:
        """Say who we are, and wait for the first sign of life."""
        hello = RANK.pack(rank) + token.encode()
        try:
            tune(self._connection, self._silence)
            self._connection.send(LENGTH.pack(len(hello)) + hello)  # a new connection has room for it
        except OSError as error:
            raise LeaderGone(f"the leader at {spell(address)} is lost: {error.strerror}") from error
        self._poll = select.poll()
        self._poll.register(self._connection, select.POLLIN)
        if not self._poll.poll(max(0.0, until - time.monotonic()) * 1000):
            raise LeaderGone(f"the leader at {spell(address)} did not begin: have all other ranks been started?")
        try:
            self._listen(until)
        except LeaderGone as error:
            raise LeaderGone(
                f"the leader at {spell(address)} turned rank {rank} away, or has ended: does it expect this rank, "
                "and have both the same token?"
            ) from error

    def _cut(self) -> bytes | None:
        """-> the next message, if all of it has arrived."""
        if len(self._buffer) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._buffer)
        end = LENGTH.size + length
        if len(self._buffer) < end:
            return None
        message = bytes(memoryview(self._buffer)[LENGTH.size : end])
        del self._buffer[:end]
        return message

    def _listen(self, until: float | None) -> bool:
        """Wait for bytes, at most until then (monotonic). -> whether any have come. Raises LeaderGone."""
        began = time.monotonic()
        seconds = self._silence - self._silent
        if until is not None:
            seconds = min(seconds, until - began)
        if not self._poll.poll(max(0.0, seconds) * 1000):
            self._silent += time.monotonic() - began
            if self._silent >= self._silence:
                raise LeaderGone(f"the leader of the group has not been heard for {self._silence:g} seconds")
            return False
        try:
            data = self._connection.recv(READ_SIZE)
        except BlockingIOError:
            return False
        except OSError as error:
            raise LeaderGone(f"the leader of the group is lost: {error.strerror}") from error
        if not data:
            raise LeaderGone("the leader of the group has closed its connection")
        self._buffer += data
        self._silent = 0.0
        return True


def connect(address: Address, until: float) -> socket.socket:
    """-> a connection, tried for again and again until then (monotonic). Raises LeaderGone."""
    while True:
        seconds = max(0.001, min(ATTEMPT_SECONDS, until - time.monotonic()))
        try:
            connection = socket.create_connection(address, timeout=seconds)
            if connection.getsockname() != connection.getpeername():
                return connection
            # While nobody listens on a port of this host, the system may connect a socket to itself.
            connection.close()
            reason = "nobody listens"
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() >= until:
            raise LeaderGone(f"no leader of the group answers at {spell(address)}: {reason}")
        time.sleep(max(0.0, min(RETRY_SECONDS, until - time.monotonic())))


def tune(connection: socket.socket, deadline: float) -> None:
    """Send at once, never block, and count a peer as lost that acknowledges nothing for these seconds, where the system
    can do that."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    interval = max(1, round(deadline / 4))
    for name, value in (
        ("TCP_USER_TIMEOUT", max(1, round(deadline * 1000))),
        ("TCP_KEEPIDLE", interval),
        ("TCP_KEEPINTVL", interval),
        ("TCP_KEEPCNT", 3),
    ):
        option: int | None = getattr(socket, name, None)
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def spell(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
