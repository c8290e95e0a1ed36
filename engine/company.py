"""Company: the other ranks of a group, as one of them finds them. What differs between one host and several is here.

On one host (`OneHost`) everything was made before the ranks were forked, and lies in the `Seat`: a listener for the
store, and an end of a ring. On several (`SeveralHosts`) ranks know an address, and find each other by the store there:
rank 0 leaves in it where it listens for the others, and a random token that they are to show.

Knows stores, channels and addresses; not what goes through them.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import secrets
import socket
from datetime import timedelta
from typing import Any, Protocol

from pronk.engine.channel import Follower, Leader
from pronk.engine.errors import ConfigError, GroupError, PronkError
from pronk.engine.parallel import Place
from pronk.engine.ring import RingEnd
from pronk.engine.seat import Seat
from pronk.engine.sockets import DEADLINE_SECONDS, SILENCE_SECONDS, SocketFollower, SocketLeader, listen
from pronk.engine.torchrun import Position

LOCALHOST = "127.0.0.1"
OUTLASTS = 2.0
"""By so much a rank waits longer for others than the host of all waits for it: that one knows which of them hangs."""
SHARE = 0.9
"""Of a time after which a rank is killed by a host that does not see the others: it gives up before that, and can say
for whom it has waited in vain."""
SHORTEST_SILENCE_SECONDS = 5.0
"""While it starts, rank 0 may be busy with something of its own for so long."""
ORDERS_KEY = "orders"
STORE_PORT_HINT = "is --master-addr an address of the first host, and does a firewall let --master-port through?"


class Company(Protocol):
    """The other ranks. All methods raise GroupError when they are not there in time."""

    @property
    def size(self) -> int:
        """How many ranks there are, this one included."""

    @property
    def local_rank(self) -> int:
        """This rank's number among those of this host."""

    @property
    def neighbours(self) -> int:
        """How many ranks this host has."""

    def place(self, *, step_timeout: float, start_timeout: float) -> Place:
        """For `parallel.join`. step_timeout, start_timeout: seconds after which a rank that does nothing is killed."""

    def lead(self, step_timeout: float = math.inf) -> Leader:
        """Rank 0's end of the channel for orders, when all the others have come."""

    def follow(self, step_timeout: float = math.inf) -> Follower:
        """The end of any other rank."""


class OneHost:
    """See `Company`. Forked together."""

    def __init__(self, seat: Seat) -> None:
        self.size = seat.size
        self.local_rank = seat.rank
        self.neighbours = seat.size
        self._seat = seat

    def place(self, *, step_timeout: float, start_timeout: float) -> Place:
        """See `Company`."""
        seat = self._seat
        return Place(
            rank=seat.rank,
            size=seat.size,
            neighbours=seat.size,
            store=self._store(OUTLASTS * start_timeout),
            address=LOCALHOST,
            timeout=OUTLASTS * step_timeout,
        )

    def lead(self, step_timeout: float = math.inf) -> Leader:
        """See `Company`."""
        del step_timeout
        return self._ring_end().lead()

    def follow(self, step_timeout: float = math.inf) -> Follower:
        """See `Company`."""
        del step_timeout
        return self._ring_end().follow()

    def _ring_end(self) -> RingEnd:
        seat = self._seat
        if not isinstance(seat.orders, RingEnd):
            raise PronkError(f"rank {seat.rank} of {seat.size} was given no end of a ring")
        return seat.orders

    def _store(self, timeout: float) -> Any:
        """Where ranks leave each other their addresses: it lives in rank 0's process."""
        seat = self._seat
        listener = None if seat.store_listener is None else seat.store_listener.detach()
        try:
            return _open_store(LOCALHOST, seat.store_port, timeout, listener=listener)
        except RuntimeError as error:
            raise GroupError(f"rank {seat.rank} cannot reach rank 0 ({error})", (0,)) from error


class SeveralHosts:
    """See `Company`. Started by torchrun, on hosts that may be several."""

    def __init__(self, position: Position, start_timeout: float) -> None:
        """start_timeout: seconds after which a rank that does not get on while it starts is killed."""
        self.size = position.size
        self.local_rank = position.local_rank
        self.neighbours = position.neighbours
        self._position = position
        self._patience = SHARE * start_timeout
        self._opened: Any = None

    def place(self, *, step_timeout: float, start_timeout: float) -> Place:
        """See `Company`. Raises ConfigError where the other hosts would not reach this one."""
        del start_timeout
        position = self._position
        return Place(
            rank=position.rank,
            size=position.size,
            neighbours=position.neighbours,
            store=self._store(),
            address=self._address(),
            timeout=SHARE * step_timeout,
        )

    def lead(self, step_timeout: float = math.inf) -> Leader:
        """See `Company`. Raises ConfigError where the other hosts would not reach this one."""
        address = self._address()
        listener = listen((address, 0))
        token = secrets.token_hex(16)
        with contextlib.ExitStack() as undo:
            undo.callback(listener.close)
            try:
                self._store().set(ORDERS_KEY, f"{address} {listener.getsockname()[1]} {token}")
            except RuntimeError as error:
                raise self._unreachable(error) from error
            undo.pop_all()
        return SocketLeader(
            listener,
            range(1, self._position.size),
            token,
            patience=self._patience,
            deadline=min(DEADLINE_SECONDS, SHARE * step_timeout),
        )

    def follow(self, step_timeout: float = math.inf) -> Follower:
        """See `Company`."""
        try:
            self._store().wait([ORDERS_KEY], timedelta(seconds=self._patience))
            host, port, token = self._store().get(ORDERS_KEY).decode().split()
        except RuntimeError as error:
            raise GroupError(f"rank {self._position.rank} waited for rank 0, which did not come", (0,)) from error
        silence = max(SHORTEST_SILENCE_SECONDS, min(SILENCE_SECONDS, step_timeout))
        return SocketFollower((host, int(port)), self._position.rank, token, patience=self._patience, silence=silence)

    def _address(self) -> str:
        """This host's, as the others reach it: the one from which it reaches the store."""
        position = self._position
        try:
            family, kind, _, _, target = socket.getaddrinfo(position.host, position.port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(target)  # sends nothing
                address: str = probe.getsockname()[0]
        except OSError as error:
            raise self._unreachable(error) from error
        if position.size > position.neighbours and ipaddress.ip_address(address).is_loopback:
            raise ConfigError(
                f"--master-addr {position.host} is {address} here, where the other hosts cannot reach rank "
                f"{position.rank}: give torchrun the first host's address in the network that they share"
            )
        return address

    def _store(self) -> Any:
        """Opened once: where rank 0 keeps it, it lives as long as this object."""
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> Any:
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        position = self._position
        hosts_it = position.rank == 0 and not position.has_store
        try:
            store = _open_store(position.host, position.port, self._patience, is_master=hosts_it)
        except RuntimeError as error:
            raise self._unreachable(error) from error
        return PrefixStore(f"pronk/{position.round}/", store)

    def _unreachable(self, error: Exception) -> GroupError:
        position = self._position
        return GroupError(
            f"rank {position.rank} cannot reach {position.host}, port {position.port} ({error}): {STORE_PORT_HINT}",
            (0,),
        )


def _open_store(host: str, port: int, timeout: float, *, listener: int | None = None, is_master: bool = False) -> Any:
    """listener: file descriptor of a socket that listens at host and port, for whoever is to keep the store. is_master:
    whether to keep it without one. timeout: in seconds. Raises RuntimeError."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(
        host,
        port,
        is_master=is_master or listener is not None,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        master_listen_fd=listener,
    )
