"""From the leader of a group to its followers: every message, in order, bit for bit; and nobody waits for the dead."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from pronk.engine.channel import Follower, Leader
from pronk.engine.errors import GroupError, LeaderGone
from pronk.engine.ring import Ring, RingFollower, RingLeader, make_ring
from pronk.engine.sockets import LENGTH, MAX_STRANGERS, Address, SocketFollower, SocketLeader, listen

LONG = 60.0
"""Seconds that nothing here takes, unless something hangs."""
SHORT = 0.3
"""Seconds until a deadline that is meant to pass."""


# Processes and threads of tests.


class Rank:
    """A forked process that runs a function; what that says comes back."""

    def __init__(self, body: Callable[[Callable[[bytes], None]], None]) -> None:
        self._reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the children run nothing that threads could hold
            self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self._reader)
                body(lambda said: os.write(writer, said) and None)
            finally:
                os._exit(0)
        os.close(writer)

    def said(self, size: int) -> bytes:
        """-> the next bytes; fewer if the process ends."""
        data = b""
        while len(data) < size:
            assert select.select([self._reader], [], [], LONG)[0], "says nothing"
            more = os.read(self._reader, size - len(data))
            if not more:
                break
            data += more
        return data

    def kill(self) -> None:
        """Returns when it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.pid = 0

    def stop(self) -> None:
        """Returns when it stands still."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def clean_up(self) -> None:
        if self.pid:
            self.kill()
        if self._reader >= 0:
            os.close(self._reader)
            self._reader = -1


Fork = Callable[[Callable[[Callable[[bytes], None]], None]], Rank]


@pytest.fixture
def fork() -> Iterator[Fork]:
    with contextlib.ExitStack() as stack:

        def start(body: Callable[[Callable[[bytes], None]], None]) -> Rank:
            rank = Rank(body)
            stack.callback(rank.clean_up)
            return rank

        yield start


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def open_files() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd" if Path("/proc/self/fd").exists() else "/dev/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            os.fstat(int(name))
            found.add(int(name))
    return found


def shared_files() -> set[str]:
    return set(os.listdir("/dev/shm")) if Path("/dev/shm").exists() else set()


def ends(ring: Ring) -> tuple[RingLeader, list[RingFollower]]:
    """All ends in this process: none is closed."""
    down = {rank: pipe.writer for rank, pipe in ring.down.items()}
    up = {rank: pipe.reader for rank, pipe in ring.up.items()}
    followers = [RingFollower(ring.memory, ring.down[rank].reader, ring.up[rank].writer) for rank in ring.down]
    return RingLeader(ring.memory, down, up, ring.deadline), followers


def close_all(leader: RingLeader, followers: list[RingFollower]) -> None:
    """All views of the one mapping must go before it does."""
    for end in (leader, *followers):
        with contextlib.suppress(BufferError):
            end.close()


# The ring.


@settings(max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
class RingMachine(RuleBasedStateMachine):
    """Messages of any size, followers of any pace; the leader has a thread, for it waits where there is no room."""

    def __init__(self) -> None:
        super().__init__()
        self.executor = ThreadPoolExecutor(1)
        self.sends: list[Future[None]] = []
        self.messages: list[bytes] = []

    @initialize(
        capacity=st.sampled_from([32, 64, 96, 256, 4096, 1 << 16]),
        num_followers=st.integers(1, 3),
        seed=st.integers(0, 2**32),
    )
    def make(self, capacity: int, num_followers: int, seed: int) -> None:
        self.capacity = capacity
        self.random = random.Random(seed)
        self.leader, self.followers = ends(make_ring(num_followers, capacity, LONG))
        self.num_read = [0] * num_followers

    @rule(share=st.one_of(st.floats(0, 0.3), st.floats(0, 3)), is_view=st.booleans())
    def send(self, share: float, is_view: bool) -> None:
        """share: of the capacity. One in four messages is empty, or ends where the ring does."""
        size = self.random.choice([0, self.capacity - 8, *[int(share * self.capacity)] * 6])
        message = self.random.randbytes(size)
        self.sends.append(self.executor.submit(self.leader.send, memoryview(message) if is_view else message))
        if message:
            self.messages.append(message)

    @rule(which=st.integers(0, 2), count=st.integers(1, 10))
    def receive(self, which: int, count: int) -> None:
        for _ in range(count):
            self.read_one(which % len(self.followers))

    def read_one(self, which: int) -> None:
        are_sent = all(send.done() for send in self.sends)
        message = self.followers[which].receive(0)
        if message is None:
            # Nothing is lost between a message and the word of it: what was sent can be had without waiting.
            assert not are_sent or self.num_read[which] == len(self.messages)
        else:
            assert message == self.messages[self.num_read[which]]
            self.num_read[which] += 1

    def teardown(self) -> None:
        try:
            until = time.monotonic() + LONG
            while any(num < len(self.messages) for num in self.num_read) or not all(s.done() for s in self.sends):
                assert time.monotonic() < until, "a message is lost"
                for which in range(len(self.followers)):
                    self.read_one(which)
            for send in self.sends:
                send.result()
        finally:
            self.executor.shutdown()
            if hasattr(self, "leader"):
                close_all(self.leader, self.followers)


TestRing = RingMachine.TestCase


@pytest.mark.parametrize("capacity", [64, 4096, 1 << 20])
def test_processes_get_what_is_sent_in_order(fork: Fork, capacity: int) -> None:
    """With readers that sleep and wake as they like: the state machine's have one thread."""
    randomness = random.Random(capacity)
    messages = [randomness.randbytes(randomness.choice([1, 7, 8, 600, 5000])) for _ in range(3000)]
    ring = make_ring(3, capacity, LONG)

    def follow(number: int) -> Callable[[Callable[[bytes], None]], None]:
        def body(say: Callable[[bytes], None]) -> None:
            follower = ring.follower(number)
            if all(follower.receive(LONG) == message for message in messages):
                say(b"y")

        return body

    ranks = [fork(follow(number)) for number in (1, 2, 3)]
    leader = ring.leader()
    for message in messages:
        leader.send(message)
    assert [rank.said(1) for rank in ranks] == [b"y"] * 3
    leader.close()


def test_receive_waits_no_longer_than_it_is_told() -> None:
    leader, (follower,) = ends(make_ring(1, 4096))
    assert follower.receive(0) is None
    began = time.monotonic()
    assert follower.receive(0.05) is None
    assert time.monotonic() - began >= 0.05
    leader.send(b"")
    assert follower.receive(0.05) is None
    close_all(leader, [follower])


def test_what_was_sent_before_the_leader_closed_is_received() -> None:
    leader, (follower,) = ends(make_ring(1, 4096))
    leader.send(b"last words")
    leader.send(b"")
    with contextlib.suppress(BufferError):
        leader.close()
    assert follower.receive(None) == b"last words"
    with pytest.raises(LeaderGone):
        follower.receive(None)
    follower.close()


def echo(ring: Ring, rank: int) -> Callable[[Callable[[bytes], None]], None]:
    """A follower that says what it hears, and at the end that the leader is gone."""

    def body(say: Callable[[bytes], None]) -> None:
        follower = ring.follower(rank)
        try:
            while True:
                say(follower.receive(LONG) or b"nothing")
        except LeaderGone:
            say(b"gone")

    return body


def test_followers_see_that_the_leader_is_killed(fork: Fork) -> None:
    ring = make_ring(2)

    def lead(say: Callable[[bytes], None]) -> None:
        ring.leader().send(b"hello")
        signal.pause()

    leader = fork(lead)
    followers = [fork(echo(ring, 1)), fork(echo(ring, 2))]
    ring.close()
    assert [rank.said(5) for rank in followers] == [b"hello"] * 2
    killed = time.monotonic()
    leader.kill()
    assert [rank.said(4) for rank in followers] == [b"gone"] * 2
    assert time.monotonic() - killed < LONG / 4


def test_the_leader_sees_that_a_follower_is_killed_and_serves_the_others(fork: Fork) -> None:
    ring = make_ring(3, deadline=LONG)
    followers = {rank: fork(echo(ring, rank)) for rank in (1, 2, 3)}
    leader = ring.leader()
    leader.send(b"hello")
    assert [rank.said(5) for rank in followers.values()] == [b"hello"] * 3
    leader.check()
    followers[2].kill()
    for message in (b"first", b"again"):
        with pytest.raises(GroupError, match=r"^rank 2 has ended$") as caught:
            leader.send(message)
        assert caught.value.ranks == (2,)
        assert followers[1].said(5) == followers[3].said(5) == message
    with pytest.raises(GroupError, match="rank 2"):
        leader.check()
    leader.close()
    assert followers[1].said(4) == followers[3].said(4) == b"gone"


def test_the_leader_sees_a_follower_s_end_without_sending(fork: Fork) -> None:
    ring = make_ring(2)
    followers = {rank: fork(echo(ring, rank)) for rank in (1, 2)}
    leader = ring.leader()
    leader.send(b"hello")  # when they have said it, they have closed each other's ends
    assert [rank.said(5) for rank in followers.values()] == [b"hello"] * 2
    followers[1].kill()
    with pytest.raises(GroupError, match="rank 1 has ended"):
        leader.check()
    leader.close()


def test_a_follower_that_does_not_read_is_named_at_the_deadline() -> None:
    leader, followers = ends(make_ring(2, 1024, SHORT))
    message = bytes(600)
    leader.send(message)
    assert followers[0].receive(0) == message
    with pytest.raises(GroupError, match=r"^rank 2 has read nothing for 0\.3 seconds$") as caught:
        leader.send(message)
    assert caught.value.ranks == (2,)
    # What it has not read stays as it was, whatever else is sent.
    for fails in (leader.check, lambda: leader.send(b"\1" * 600)):
        with pytest.raises(GroupError, match="rank 2 has read nothing"):
            fails()
    assert followers[1].receive(0) == message
    close_all(leader, followers)


def test_the_death_of_the_follower_that_it_waits_for_frees_the_leader(fork: Fork, pool: ThreadPoolExecutor) -> None:
    ring = make_ring(2, 1024, LONG)
    followers = {rank: fork(echo(ring, rank)) for rank in (1, 2)}
    leader = ring.leader()
    leader.send(b"hello")
    assert [rank.said(5) for rank in followers.values()] == [b"hello"] * 2
    followers[2].stop()
    message = random.Random(0).randbytes(5000)
    sent = pool.submit(leader.send, message)
    began = time.monotonic()
    assert followers[1].said(0) == b""
    followers[2].kill()
    with pytest.raises(GroupError, match="rank 2 has ended"):
        sent.result(LONG)
    assert time.monotonic() - began < LONG / 4
    assert followers[1].said(5000) == message
    leader.close()


@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="pipes here have one size")
def test_a_full_pipe_loses_nothing(pool: ThreadPoolExecutor) -> None:
    """512 positions fill it."""
    ring = make_ring(2, 1 << 20, LONG)
    for pipe in ring.down.values():
        fcntl.fcntl(pipe.writer, fcntl.F_SETPIPE_SZ, 4096)
    leader, followers = ends(ring)
    messages = [str(number).encode() for number in range(2000)]
    sent = pool.submit(lambda: [leader.send(message) for message in messages])
    for follower in followers:
        assert follower.receive(LONG) == messages[0]
    for number in range(1, 2000):
        assert [follower.receive(LONG) for follower in followers] == [messages[number]] * 2
    sent.result(LONG)
    close_all(leader, followers)


@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="pipes here have one size")
def test_a_follower_that_leaves_its_pipe_full_is_named_at_the_deadline() -> None:
    ring = make_ring(2, 1 << 20, SHORT)
    fcntl.fcntl(ring.down[1].writer, fcntl.F_SETPIPE_SZ, 4096)
    leader, followers = ends(ring)
    for number in range(512):
        leader.send(str(number).encode())
    with pytest.raises(GroupError, match="rank 1 has read nothing"):
        leader.send(b"too many")
    assert [followers[1].receive(0) for _ in range(513)][-1] == b"too many"
    close_all(leader, followers)


def test_a_ring_leaves_nothing_behind(fork: Fork) -> None:
    files, shared = open_files(), shared_files()
    ring = make_ring(2)

    def follow(say: Callable[[bytes], None]) -> None:
        follower = ring.follower(1)
        message = follower.receive(LONG)
        follower.close()
        say(message + bytes([len(open_files() - files)]) if message else b"")

    rank = fork(follow)
    leader = ring.leader()
    with contextlib.suppress(GroupError):  # nobody is rank 2
        leader.send(b"hello")
    assert rank.said(6) == b"hello\1"  # the pipe by which it says so
    leader.close()
    rank.clean_up()
    make_ring(3).close()
    assert open_files() == files
    assert shared_files() == shared


@pytest.mark.parametrize(("num_followers", "capacity"), [(0, 1024), (1, 0), (1, 1000)])
def test_a_ring_that_cannot_work_is_refused(num_followers: int, capacity: int) -> None:
    files = open_files()
    with pytest.raises(ValueError):
        make_ring(num_followers, capacity)
    assert open_files() == files


# Sockets.


def started(
    pool: ThreadPoolExecutor, ranks: list[int], *, token: str = "secret", patience: float = LONG, deadline: float = LONG
) -> tuple[Address, Future[SocketLeader]]:
    """-> where a leader waits for these ranks."""
    listener = listen(("127.0.0.1", 0))
    address = listener.getsockname()
    return address, pool.submit(SocketLeader, listener, ranks, token, patience=patience, deadline=deadline)


def joined(
    pool: ThreadPoolExecutor, ranks: list[int], *, deadline: float = LONG, silence: float = LONG
) -> tuple[SocketLeader, list[SocketFollower]]:
    address, leader = started(pool, ranks, deadline=deadline)
    followers = [pool.submit(SocketFollower, address, rank, "secret", silence=silence) for rank in ranks]
    return leader.result(LONG), [follower.result(LONG) for follower in followers]


def test_sockets_carry_messages_in_order(pool: ThreadPoolExecutor) -> None:
    files = open_files()
    leader, followers = joined(pool, [2, 3, 7])
    randomness = random.Random(0)
    messages = [randomness.randbytes(randomness.choice([1, 8, 600, 5000, 1 << 20])) for _ in range(200)]

    def send_all() -> None:
        for message in messages:
            leader.send(memoryview(message))
            leader.send(b"")

    sent = pool.submit(send_all)
    reads = [pool.submit(lambda f: [f.receive(LONG) for _ in messages], follower) for follower in followers]
    assert all(read.result(LONG) == messages for read in reads)
    sent.result(LONG)
    leader.check()
    assert followers[0].receive(0.01) is None
    leader.send(b"last words")
    leader.close()
    for follower in followers:
        assert follower.receive(LONG) == b"last words"
        with pytest.raises(LeaderGone):
            follower.receive(LONG)
        follower.close()
    assert open_files() == files


def test_a_follower_that_closes_is_seen(pool: ThreadPoolExecutor) -> None:
    leader, followers = joined(pool, [1, 2])
    followers[1].close()
    with pytest.raises(GroupError, match=r"^rank 2 ") as caught:
        checked_until_it_fails(leader)
    assert caught.value.ranks == (2,)
    with pytest.raises(GroupError, match=r"^rank 2 "):
        leader.send(b"still")
    assert followers[0].receive(LONG) == b"still"
    followers[0].close()
    leader.close()


def checked_until_it_fails(leader: Leader) -> None:
    """The end of a connection takes its time, even from this host to itself."""
    until = time.monotonic() + LONG
    while time.monotonic() < until:
        leader.check()


def received_until_it_fails(follower: Follower) -> None:
    while True:
        assert follower.receive(0.2) is None


def socket_follower(address: Address, rank: int) -> Callable[[Callable[[bytes], None]], None]:
    def body(say: Callable[[bytes], None]) -> None:
        follower = SocketFollower(address, rank, "secret", silence=LONG)
        try:
            while True:
                say(bytes([len(follower.receive(LONG) or b"") & 255]))
        except LeaderGone:
            say(b"gone")

    return body


def test_a_follower_that_stands_still_is_named_at_the_deadline(fork: Fork) -> None:
    listener = listen(("127.0.0.1", 0))
    address = listener.getsockname()
    ranks = {rank: fork(socket_follower(address, rank)) for rank in (1, 2)}
    leader = SocketLeader(listener, [1, 2], "secret", patience=LONG, deadline=2.0)
    leader.send(b"7 bytes")
    assert [rank.said(1) for rank in ranks.values()] == [b"\7"] * 2
    ranks[2].stop()
    with pytest.raises(GroupError, match=r"^rank 2 ") as caught:
        leader.send(bytes((64 << 20) + 9))  # more than its system takes for it
    assert caught.value.ranks == (2,)
    assert ranks[1].said(1) == b"\11"
    with pytest.raises(GroupError, match=r"^rank 2 "):
        leader.send(b"abc")
    assert ranks[1].said(1) == b"\3"
    leader.close()
    assert ranks[1].said(4) == b"gone"


def test_a_follower_that_is_killed_is_seen(fork: Fork) -> None:
    listener = listen(("127.0.0.1", 0))
    address = listener.getsockname()
    ranks = {rank: fork(socket_follower(address, rank)) for rank in (1, 2)}
    leader = SocketLeader(listener, [1, 2], "secret", patience=LONG, deadline=LONG)
    ranks[1].kill()
    with pytest.raises(GroupError, match=r"^rank 1 "):
        checked_until_it_fails(leader)
    leader.close()


def test_a_leader_is_known_by_its_sound(fork: Fork) -> None:
    """Its pings are heard; when it stands still, they are missed; when it is killed, that is seen at once."""
    listener = listen(("127.0.0.1", 0))
    address = listener.getsockname()

    def lead(say: Callable[[bytes], None]) -> None:
        leader = SocketLeader(listener, [1, 2], "secret", patience=LONG)
        while True:
            leader.send(b"")
            time.sleep(0.05)

    leader = fork(lead)
    listener.close()
    with ThreadPoolExecutor(2) as pool:
        joining = [pool.submit(SocketFollower, address, 1, "secret", silence=1.5)]
        joining += [pool.submit(SocketFollower, address, 2, "secret", silence=LONG)]
        impatient, patient = (follower.result(LONG) for follower in joining)
    assert impatient.receive(3.0) is None
    leader.stop()
    began = time.monotonic()
    with pytest.raises(LeaderGone, match=r"not been heard for 1\.5 seconds"):
        received_until_it_fails(impatient)
    assert time.monotonic() - began < LONG / 4
    assert patient.receive(0) is None
    leader.kill()
    with pytest.raises(LeaderGone):
        patient.receive(None)
    impatient.close()
    patient.close()


def test_time_spent_elsewhere_is_not_silence(pool: ThreadPoolExecutor) -> None:
    leader, (follower,) = joined(pool, [1], silence=0.2)
    threading.Event().wait(0.3)  # a long step, in which the leader waits for this rank and says nothing either
    assert follower.receive(0) is None
    with pytest.raises(LeaderGone, match="not been heard"):
        follower.receive(None)
    follower.close()
    leader.close()


@pytest.mark.parametrize(
    ("rank", "token"), [(1, "guess"), (1, ""), (1, "secret and more"), (3, "secret"), (1, "x" * 2000)]
)
def test_who_is_not_expected_is_dropped_and_the_group_comes_together(
    pool: ThreadPoolExecutor, rank: int, token: str
) -> None:
    address, leading = started(pool, [1, 2])
    with pytest.raises(LeaderGone, match=f"turned rank {rank} away"):
        SocketFollower(address, rank, token, patience=LONG)
    followers = [pool.submit(SocketFollower, address, number, "secret") for number in (1, 2)]
    leader = leading.result(LONG)
    leader.send(b"hello")
    for follower in followers:
        assert follower.result(LONG).receive(LONG) == b"hello"
        follower.result().close()
    leader.close()


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1\r\n\r\n", LENGTH.pack(2) + b"ab", LENGTH.pack(2**60), LENGTH.pack(10) + bytes(11)]
)
def test_strangers_hold_up_nobody(pool: ThreadPoolExecutor, said: bytes) -> None:
    address, leading = started(pool, [1])
    strangers = [socket.create_connection(address) for _ in range(MAX_STRANGERS + 20)]
    for stranger in strangers:
        with contextlib.suppress(ConnectionError):
            stranger.sendall(said)
    follower = SocketFollower(address, 1, "secret", patience=LONG)
    leader = leading.result(LONG)
    for stranger in strangers:
        stranger.settimeout(LONG)
        with contextlib.suppress(ConnectionError):
            assert stranger.recv(1) == b""
        stranger.close()
    leader.send(b"hello")
    assert follower.receive(LONG) == b"hello"
    follower.close()
    leader.close()


def test_a_rank_that_leaves_before_all_have_come_may_come_again(pool: ThreadPoolExecutor) -> None:
    address, leading = started(pool, [1, 2])
    with pytest.raises(LeaderGone, match="have all other ranks been started"):
        SocketFollower(address, 1, "secret", patience=SHORT)
    followers = [pool.submit(SocketFollower, address, number, "secret") for number in (1, 2)]
    leader = leading.result(LONG)
    for follower in followers:
        follower.result(LONG).close()
    leader.close()


def test_a_rank_that_is_there_already_does_not_come_twice(pool: ThreadPoolExecutor) -> None:
    address, leading = started(pool, [1, 2])
    twins = [pool.submit(SocketFollower, address, 1, "secret") for _ in range(2)]
    until = time.monotonic() + LONG
    while not any(twin.done() for twin in twins) and time.monotonic() < until:
        time.sleep(0.01)
    other = SocketFollower(address, 2, "secret")
    leader = leading.result(LONG)
    results = [twin.exception(LONG) for twin in twins]
    assert sorted(result is None for result in results) == [False, True]
    assert any(isinstance(result, LeaderGone) for result in results)
    for follower in [other, *(twin.result() for twin in twins if twin.exception() is None)]:
        follower.close()
    leader.close()


def test_ranks_that_do_not_come_are_named(pool: ThreadPoolExecutor) -> None:
    files = open_files()
    address, leading = started(pool, [1, 2, 3], patience=1.0)
    with pytest.raises(LeaderGone):
        SocketFollower(address, 2, "secret", patience=LONG)
    with pytest.raises(GroupError, match=r"^of the group's ranks on other hosts, 1, 3 did not come$") as caught:
        leading.result(LONG)
    assert caught.value.ranks == (1, 3)
    assert open_files() == files


def test_a_leader_that_is_not_there_is_named() -> None:
    listener = listen(("127.0.0.1", 0))
    address = listener.getsockname()
    listener.close()
    with pytest.raises(LeaderGone, match=rf"^no leader of the group answers at 127\.0\.0\.1:{address[1]}: "):
        SocketFollower(address, 1, "secret", patience=SHORT)


def test_a_follower_that_is_early_tries_again(pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    address, leading = started(pool, [1])
    create_connection = socket.create_connection
    refusals = iter([ConnectionRefusedError(111, "Connection refused"), socket.gaierror(-2, "Name not known")])

    def refuse_twice(*args: object, **options: object) -> socket.socket:
        for refusal in refusals:
            raise refusal
        return create_connection(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("pronk.engine.sockets.socket.create_connection", refuse_twice)
    SocketFollower(address, 1, "secret", patience=LONG).close()
    leading.result(LONG).close()


def test_an_address_that_cannot_be_listened_on_is_named() -> None:
    with listen(("127.0.0.1", 0)) as taken, pytest.raises(GroupError, match=r"cannot listen .* on 127\.0\.0\.1:"):
        listen(taken.getsockname())
