"""How ranks that torchrun started find each other, over a real store and real sockets, and how rank 0 looks after them.
(Whole servers on two hosts are in tests/multi.)"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pronk.engine import leading
from pronk.engine.channel import Follower, Leader
from pronk.engine.company import Company, SeveralHosts
from pronk.engine.config import EngineConfig
from pronk.engine.errors import ConfigError, GroupError
from pronk.engine.leading import Leading
from pronk.engine.orders import Begin, Order, Stop, decode, encode
from pronk.engine.parallel import add_in_order, join
from pronk.engine.seat import Seat
from pronk.engine.torchrun import Position
from pronk.engine.worker import follow

SECONDS = 60.0
"""That nothing here takes, unless something hangs."""


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def do_nothing() -> None:
    pass


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def positions(size: int, **changes: Any) -> list[Position]:
    shared = {"size": size, "neighbours": size, "host": "127.0.0.1", "port": free_port(), "has_store": False, **changes}
    return [Position(rank=rank, **shared) for rank in range(size)]


def test_ranks_meet_get_orders_and_add(pool: ThreadPoolExecutor) -> None:
    """Rank 0 keeps the store itself here; under torchrun its agent does, which tests/multi sees."""
    parts = torch.randn(3, 40, generator=torch.Generator().manual_seed(3))

    companies = [SeveralHosts(position, SECONDS) for position in positions(3)]  # rank 0's keeps the store to the end

    def one(rank: int) -> tuple[bytes | None, Tensor]:
        company = companies[rank]
        said = None
        end: Leader | Follower
        if rank == 0:
            end = company.lead()
            end.send(b"hello")
        else:
            end = company.follow()
            said = end.receive(SECONDS)
        place = company.place(step_timeout=SECONDS, start_timeout=SECONDS)
        ranks = join(place, torch.device("cpu"), beat=do_nothing, on_begin=do_nothing)
        total = ranks.all_reduce(parts[rank])
        ranks.meet()  # nobody leaves while others still add
        end.close()
        return said, total

    results = list(pool.map(one, range(3)))
    assert [said for said, _ in results] == [None, b"hello", b"hello"]
    for _, total in results:
        assert torch.equal(total, add_in_order(parts))


def test_ranks_of_another_round_do_not_meet(pool: ThreadPoolExecutor) -> None:
    """What a group left in torchrun's store is none of the next one's."""
    from datetime import timedelta

    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=SECONDS), wait_for_workers=False)
    first = positions(2, port=store.port, has_store=True)[0]
    second = positions(2, port=store.port, has_store=True, round="1")[1]
    leading_on = pool.submit(SeveralHosts(first, 2.0).lead)
    with pytest.raises(GroupError, match="rank 1 waited for rank 0, which did not come"):
        SeveralHosts(second, 2.0).follow()
    with pytest.raises(GroupError, match="of the group's ranks on other hosts, 1 did not come"):
        leading_on.result(SECONDS)


def test_a_store_that_is_not_there_is_named() -> None:
    (_, position) = positions(2)
    with pytest.raises(GroupError, match=rf"rank 1 cannot reach 127\.0\.0\.1, port {position.port} .*--master-port"):
        SeveralHosts(position, 1.0).follow()


def test_an_address_that_other_hosts_cannot_reach_is_refused() -> None:
    position = positions(4, neighbours=2)[0]
    with pytest.raises(ConfigError, match=r"--master-addr 127\.0\.0\.1 is 127\.0\.0\.1 here"):
        SeveralHosts(position, 1.0).lead()


class Ends:
    """A company of which one end is played by the test."""

    size = 2
    local_rank = 1
    neighbours = 2

    def __init__(self, *orders: Order) -> None:
        self._orders = [encode(order) for order in orders]
        self.closed = False

    def follow(self, step_timeout: float = 0) -> Ends:
        return self

    def receive(self, timeout: float | None) -> bytes:
        return self._orders.pop(0)

    def close(self) -> None:
        self.closed = True


def test_a_checkpoint_that_is_not_on_this_host_is_told(tmp_path: Path) -> None:
    seat = Seat(rank=1, size=2)
    company: Company = Ends(Begin(EngineConfig(model=str(tmp_path / "nowhere"))))  # type: ignore[assignment]
    assert follow(seat, company) == 1
    assert "nowhere is not on this host: the checkpoint must lie at the same path" in seat.pulse.last_words()


class Recorder:
    """A leader's end."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.looks = 0
        self.gone: GroupError | None = None

    def send(self, message: bytes | memoryview) -> None:
        self.sent.append(bytes(message))

    def check(self) -> None:
        self.looks += 1
        if self.gone is not None:
            raise self.gone

    def close(self) -> None:
        raise AssertionError("nobody closes it")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [1000.0]

    def wait(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(leading.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(leading.time, "sleep", wait)
    return wait


def test_followers_hear_something_each_second_and_are_looked_at(clock: Callable[[float], None]) -> None:
    recorder = Recorder()
    voice = Leading(recorder)
    for _ in range(50):
        voice.keep()
        clock(0.1)
    assert recorder.sent == [b""] * 5
    assert recorder.looks == 5
    voice.tell(Stop())
    assert isinstance(decode(recorder.sent[-1]), Stop)
    recorder.gone = GroupError("rank 2 has closed its connection", [2])
    clock(1.0)
    with pytest.raises(GroupError, match="rank 2"):
        voice.keep()


def test_who_is_gone_is_told_and_no_address(clock: Callable[[float], None]) -> None:
    recorder = Recorder()
    voice = Leading(recorder)
    failed = GroupError("rank 0: another rank is gone (Connection closed by peer [10.0.0.2]:4711)")
    before = time.monotonic()
    assert "10.0.0.2" not in str(voice.blame(failed))
    assert before < time.monotonic() <= before + leading.BLAME_SECONDS + 0.1
    recorder.gone = GroupError("rank 2 has closed its connection", [2])
    assert voice.blame(failed) is recorder.gone
    known = GroupError("rank 1 has taken no message for 30 seconds", [1])
    assert voice.blame(known) is known


def test_where_nobody_follows_nobody_is_told() -> None:
    alone = Leading(None)
    alone.tell(Stop())
    alone.keep()
    error = GroupError("why")
    assert alone.blame(error) is error
