"""The host and its groups, for real, over ranks that only beat: whatever happens to one rank ends all of them, is told
with the rank's name, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pronk.engine import control, wire
from pronk.engine.control import GroupEnded, GroupStarted, StartGroup, StopGroup

DEADLINE = 60
PATIENCE = 0.5
RANKS = [(size, rank) for size in (1, 2, 4) for rank in range(size)]


class StubHost:
    """A host in a process of its own, and the server's end of its control socket."""

    def __init__(self, patience: float) -> None:
        self.connection, theirs = socket.socketpair()
        self.connection.settimeout(DEADLINE)
        with theirs:
            program = Path(__file__).with_name("stub_ranks.py")
            self.process = subprocess.Popen(
                [sys.executable, str(program), str(theirs.fileno()), str(patience)], pass_fds=[theirs.fileno()]
            )
        self._frames = wire.Frames(control.FromHost)
        self._messages: list[object] = []
        self.link: socket.socket | None = None

    def send(self, message: control.ToHost, *descriptors: int) -> None:
        socket.send_fds(self.connection, [wire.encode(message)], descriptors)

    def receive(self) -> object:
        while not self._messages:
            data = self.connection.recv(1 << 16)
            assert data, "the host is gone"
            self._messages += self._frames.feed(data)
        return self._messages.pop(0)

    def start(self, size: int, start_timeout: float = DEADLINE) -> list[psutil.Process]:
        """-> the processes of a group, by rank, when all have come up."""
        self.close_link()
        self.link, theirs = socket.socketpair()
        self.link.settimeout(DEADLINE)
        with theirs:
            self.send(StartGroup(size, start_timeout), theirs.fileno())
        started = self.receive()
        assert isinstance(started, GroupStarted)
        assert len(set(started.pids)) == size
        assert self.link.recv(1) == b"p"
        return [psutil.Process(pid) for pid in started.pids]

    def tell(self, byte: bytes) -> None:
        assert self.link is not None
        self.link.sendall(byte)

    def answers(self) -> bool:
        """Whether rank 0 does."""
        self.tell(b"p")
        assert self.link is not None
        return self.link.recv(1) == b"p"

    def descriptors(self) -> int:
        return psutil.Process(self.process.pid).num_fds()

    def close_link(self) -> None:
        if self.link is not None:
            self.link.close()

    def close(self) -> None:
        self.close_link()
        self.connection.close()
        assert self.process.wait(DEADLINE) is not None


MakeHost = Callable[[float], StubHost]


@pytest.fixture
def make_host() -> Iterator[MakeHost]:
    made: list[StubHost] = []

    def make(patience: float = PATIENCE) -> StubHost:
        made.append(StubHost(patience))
        return made[-1]

    yield make
    for host in made:
        host.close()


def are_gone(ranks: list[psutil.Process]) -> bool:
    return not any(rank.is_running() for rank in ranks)


def until(condition: Callable[[], bool]) -> None:
    expired = threading.Event()
    timer = threading.Timer(DEADLINE, expired.set)
    timer.start()
    try:
        while not condition():
            assert not expired.is_set()
            time.sleep(0.005)
    finally:
        timer.cancel()


@pytest.mark.parametrize("patience", [0, DEADLINE], ids=["starting", "serving"])
@pytest.mark.parametrize(("size", "rank"), RANKS)
def test_a_killed_rank_ends_all_is_named_and_they_come_back(
    make_host: MakeHost, size: int, rank: int, patience: float
) -> None:
    host = make_host(patience)
    ranks = host.start(size)
    ranks[rank].kill()
    assert host.receive() == GroupEnded(rank, f"rank {rank} was killed by signal 9")
    assert are_gone(ranks)
    assert psutil.Process(host.process.pid).children() == []
    again = host.start(size)
    assert host.answers()
    assert not are_gone(again)


@pytest.mark.parametrize("patience", [0, PATIENCE], ids=["starting", "serving"])
@pytest.mark.parametrize(("size", "rank"), RANKS)
def test_a_stopped_rank_counts_as_hung_and_they_come_back(
    make_host: MakeHost, size: int, rank: int, patience: float
) -> None:
    host = make_host(patience)
    ranks = host.start(size, PATIENCE)
    ranks[rank].send_signal(signal.SIGSTOP)
    told = "did not answer for 0.5 s" if patience else "made no progress for 0.5 s while it was starting"
    assert host.receive() == GroupEnded(rank, f"rank {rank} {told}")
    assert are_gone(ranks)
    host.start(size)
    assert host.answers()


@pytest.mark.parametrize(("size", "rank"), RANKS)
def test_a_rank_that_fails_is_named_and_not_those_that_lose_it(make_host: MakeHost, size: int, rank: int) -> None:
    host = make_host(DEADLINE)
    ranks = host.start(size)
    host.tell(str(rank).encode())
    assert host.receive() == GroupEnded(rank, f"rank {rank} ended with exit code 7")
    assert are_gone(ranks)


def test_a_rank_that_lost_another_waits_for_that_one_to_be_named(make_host: MakeHost) -> None:
    host = make_host(DEADLINE)
    ranks = host.start(2)
    host.tell(b"l")
    assert host.receive() == GroupEnded(1, "rank 1 ended with exit code 7")
    assert are_gone(ranks)


SEVERAL = [(size, rank) for size, rank in RANKS if size > 1]


@pytest.mark.parametrize(("size", "rank"), SEVERAL)
def test_a_rank_that_all_others_wait_for_is_named(make_host: MakeHost, size: int, rank: int) -> None:
    host = make_host(PATIENCE)
    host.start(size)
    host.tell(bytes([ord("A") + rank]))
    assert host.receive() == GroupEnded(rank, f"rank {rank} did not answer for 0.5 s")


@pytest.mark.parametrize(("size", "rank"), SEVERAL)
def test_a_rank_that_was_stopped_while_all_wait_is_named(make_host: MakeHost, size: int, rank: int) -> None:
    host = make_host(PATIENCE)
    ranks = host.start(size)
    host.tell(b"Z")
    assert host.link is not None
    assert host.link.recv(1) == b"h"
    ranks[rank].send_signal(signal.SIGSTOP)
    assert host.receive() == GroupEnded(rank, f"rank {rank} did not answer for 0.5 s")


def test_a_rank_that_was_stopped_and_goes_on_is_not_to_blame(make_host: MakeHost) -> None:
    host = make_host(PATIENCE)
    ranks = host.start(2)
    ranks[0].send_signal(signal.SIGSTOP)
    until(lambda: ranks[0].status() == psutil.STATUS_STOPPED)
    ranks[0].send_signal(signal.SIGCONT)
    assert host.answers()
    host.tell(b"B")
    assert host.receive() == GroupEnded(1, "rank 1 did not answer for 0.5 s")


def test_what_all_ranks_meet_is_told_by_rank_0(make_host: MakeHost) -> None:
    host = make_host(DEADLINE)
    host.start(4)
    host.tell(b"f")
    assert host.receive() == GroupEnded(0, "rank 0 ended with exit code 7")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_an_orderly_end_of_rank_0_ends_all(make_host: MakeHost, size: int) -> None:
    host = make_host(DEADLINE)
    ranks = host.start(size)
    host.tell(b"q")
    assert host.receive() == GroupEnded(0, "rank 0 ended with exit code 0")
    assert are_gone(ranks)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_group_can_be_stopped_at_any_time(make_host: MakeHost, size: int) -> None:
    host = make_host(DEADLINE)
    ranks = host.start(size)
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)
    host.send(StopGroup())
    host.send(StopGroup())
    assert host.receive() == GroupEnded(0, "the group was stopped")
    assert are_gone(ranks)
    host.send(StopGroup())
    host.start(size)
    assert host.answers()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_that_beat_are_left_alone(make_host: MakeHost, size: int) -> None:
    host = make_host(PATIENCE)
    host.start(size)
    end = time.monotonic() + 3 * PATIENCE
    while time.monotonic() < end:
        assert host.answers()


@pytest.mark.parametrize("size", [1, 4])
def test_a_time_in_which_nobody_ran_does_not_count(make_host: MakeHost, size: int) -> None:
    host = make_host(PATIENCE)
    ranks = host.start(size)
    frozen = [psutil.Process(host.process.pid), *ranks]
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)
    time.sleep(PATIENCE / 4)  # the host looks once or twice
    frozen[0].send_signal(signal.SIGSTOP)
    time.sleep(3 * PATIENCE)  # this time is what is tested
    for process in frozen:
        process.send_signal(signal.SIGCONT)
    end = time.monotonic() + 2 * PATIENCE
    while time.monotonic() < end:
        assert host.answers()
    assert not are_gone(frozen)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_without_the_server_nothing_is_left(make_host: MakeHost, size: int) -> None:
    host = make_host(DEADLINE)
    ranks = host.start(size)
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)  # they cannot see for themselves that it is gone
    host.connection.close()
    assert host.process.wait(DEADLINE) == 0
    assert are_gone(ranks)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_no_rank_outlives_a_killed_host(make_host: MakeHost, size: int) -> None:
    host = make_host(DEADLINE)
    ranks = host.start(size)
    host.process.kill()
    host.process.wait(DEADLINE)
    until(lambda: are_gone(ranks))


def test_twenty_groups_leave_nothing_behind(make_host: MakeHost) -> None:
    host = make_host(DEADLINE)
    host.start(4)
    host.send(StopGroup())
    host.receive()
    before = host.descriptors()
    shared = sorted(os.listdir("/dev/shm"))
    for round_ in range(20):
        ranks = host.start(4)
        # Standard input, output and error, and what is a rank's own: link, listener and three ends, or one end.
        assert [rank.num_fds() for rank in ranks] == [8, 4, 4, 4]
        ranks[round_ % 4].kill()
        host.receive()
    assert host.descriptors() == before
    assert sorted(os.listdir("/dev/shm")) == shared
    assert psutil.Process(host.process.pid).children() == []
