"""Several ranks in one process: threads that exchange tensors over a barrier. What they compute is what ranks in
processes of their own do; only what goes between them does not leave the process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from pronk.engine.config import EngineConfig
from pronk.engine.orders import Order, Stop, decode, encode
from pronk.engine.parallel import ALONE, Collectives, Ranks
from pronk.engine.runner import ModelRunner, load_runner

T = TypeVar("T")
PATIENCE = 15
"""Seconds after which a rank that nobody meets gives up."""


@dataclass
class Table:
    """Where ranks lay down what the others take."""

    size: int
    barrier: threading.Barrier = field(init=False)
    places: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=PATIENCE)


@dataclass(frozen=True)
class ThreadExchange:
    """See `pronk.engine.parallel.Exchange`."""

    table: Table
    rank: int

    def gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._swap(x))

    def deal(self, x: Tensor) -> Tensor:
        return torch.stack([rows[self.rank] for rows in self._swap(x)])

    def _swap(self, x: Tensor) -> list[Tensor]:
        self.table.places[self.rank] = x.clone()
        self.table.barrier.wait()
        taken = [self.table.places[rank] for rank in range(self.table.size)]
        self.table.barrier.wait()
        return taken


def groups(size: int) -> list[Ranks]:
    """The ranks of one group, each for a thread of its own."""
    table = Table(size)
    return [Ranks(rank, size, size, ThreadExchange(table, rank)) for rank in range(size)]


def together(size: int, run: Callable[[Ranks], T]) -> list[T]:
    """Run it on each rank of a new group. -> the results, in the order of the ranks."""
    ranks = groups(size)

    def one(group: Ranks) -> T:
        try:
            return run(group)
        except BaseException:
            assert isinstance(group.exchange, ThreadExchange)
            group.exchange.table.barrier.abort()  # nobody waits for this one
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, ranks))


class Crew:
    """A loaded model shared by ranks: rank 0's runner is to be driven, the others follow its orders in threads."""

    def __init__(self, config: EngineConfig, folder: Path, size: int) -> None:
        self._orders: list[queue.SimpleQueue[bytes]] = [queue.SimpleQueue() for _ in range(size - 1)]
        ranks: Sequence[Collectives] = groups(size) if size > 1 else [ALONE]
        with ThreadPoolExecutor(size) as pool:
            runners = list(pool.map(lambda group: self._load(config, folder, group), ranks))
        self.runner = runners[0]
        self._threads = [
            threading.Thread(target=_follow, args=(runner, orders, ranks[0]), daemon=True)
            for runner, orders in zip(runners[1:], self._orders, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def _load(self, config: EngineConfig, folder: Path, group: Collectives) -> ModelRunner:
        return load_runner(config, folder, lambda done, total: None, tp=group, tell=self._tell)

    def _tell(self, order: Order) -> None:
        message = encode(order)
        for orders in self._orders:
            orders.put(message)

    def close(self) -> None:
        self._tell(Stop())
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()


def _follow(runner: ModelRunner, orders: queue.SimpleQueue[bytes], first: Collectives) -> None:
    last = None
    try:
        while not isinstance(order := decode(orders.get()), Stop):
            last = runner.carry_out(order, last)
    except BaseException:
        assert isinstance(first, Ranks)
        assert isinstance(first.exchange, ThreadExchange)
        first.exchange.table.barrier.abort()
        raise
