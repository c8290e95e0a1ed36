"""Collectives: what ranks that share a model must do together. Two operations; everything is made of them.

Sums are made in the order of the ranks, one after the other in float32, whatever the sizes: so a row of a step has the
same bits whoever shares the step (promise 1, at each number of ranks). A library's all-reduce adds in an order that
depends on where in the tensor a number lies, so what travels here is parts, and the adding is ours: small tensors go to
everyone whole (one shot); large ones are cut, each rank adds a piece for all, and the sums go to everyone (two shots).
Both give the same bits.

Knows tensors and ranks; no model, no request, no process.
"""

from __future__ import annotations

import datetime
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from pronk.engine.errors import GroupError

ONE_SHOT_BYTES = 1 << 18
"""Tensors up to this size go whole to every rank: what counts there is the number of messages, not their size."""

LOOK_SECONDS = 0.005
"""How often a rank that waits for others to load looks whether they have."""


@dataclass
class Counts:
    """What a group's operations amounted to so far."""

    all_reduces: int = 0
    all_gathers: int = 0
    seconds: float = 0.0
    """That the host spent in them. On a GPU they only begin then."""


class Collectives(Protocol):
    """The ranks that share a model, as one of them sees them. Every rank calls the same operations in the same order.

    All raise GroupError when another rank is gone, or does not answer in time.
    """

    @property
    def rank(self) -> int:
        """This one's number, from 0."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    @property
    def neighbours(self) -> int:
        """How many of them are on this host, this one included."""

    @property
    def counts(self) -> Counts:
        """What was done so far."""

    def meet(self) -> None:
        """Wait until every rank is here, however long one takes to load."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """x: of one shape and dtype on all ranks -> the sum of theirs, in rank order, rounded once to the dtype."""

    def all_gather(self, x: Tensor) -> Tensor:
        """x: of one shape and dtype on all ranks -> theirs, [size, *x.shape]."""


@dataclass(frozen=True)
class Alone:
    """One rank: nothing to exchange, and no cost."""

    rank: int = 0
    size: int = 1
    neighbours: int = 1

    @property
    def counts(self) -> Counts:
        """See `Collectives.counts`."""
        return Counts()

    def meet(self) -> None:
        """See `Collectives.meet`."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Collectives.all_reduce`."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """See `Collectives.all_gather`."""
        return x.unsqueeze(0)


ALONE = Alone()


class Exchange(Protocol):
    """How parts get from rank to rank. Nothing is calculated on the way. Raises GroupError."""

    def gather(self, x: Tensor) -> Tensor:
        """x: of one shape and dtype on all ranks -> everyone's, [size, *x.shape]."""

    def deal(self, x: Tensor) -> Tensor:
        """x [size, n]: a row for each rank -> the rows that all had for this one, [size, n]."""


@dataclass(frozen=True)
class Ranks:
    """Several ranks. Make one with `join`."""

    rank: int
    size: int
    neighbours: int
    exchange: Exchange
    meeting: Callable[[], None] = lambda: None
    """Returns when all ranks have called it."""
    on_begin: Callable[[], None] = lambda: None
    """Is called before each operation."""
    counts: Counts = field(default_factory=Counts)

    def meet(self) -> None:
        """See `Collectives.meet`."""
        self.meeting()

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Collectives.all_reduce`."""
        self.on_begin()
        started = time.monotonic()
        with record_function("all_reduce"):
            summed = self._one_shot(x) if x.nbytes <= ONE_SHOT_BYTES else self._two_shots(x)
        self.counts.all_reduces += 1
        self.counts.seconds += time.monotonic() - started
        return summed

    def all_gather(self, x: Tensor) -> Tensor:
        """See `Collectives.all_gather`."""
        self.on_begin()
        started = time.monotonic()
        with record_function("all_gather"):
            gathered = self.exchange.gather(x)
        self.counts.all_gathers += 1
        self.counts.seconds += time.monotonic() - started
        return gathered

    def _one_shot(self, x: Tensor) -> Tensor:
        return add_in_order(self.exchange.gather(x))

    def _two_shots(self, x: Tensor) -> Tensor:
        """Each rank adds one piece for all: twice the bytes of x travel, however many ranks there are."""
        piece = -(-x.numel() // self.size)
        padded = x.new_zeros(self.size * piece)
        padded[: x.numel()] = x.flatten()
        own = add_in_order(self.exchange.deal(padded.view(self.size, piece)))
        return self.exchange.gather(own).flatten()[: x.numel()].view(x.shape)


@dataclass(frozen=True)
class TorchExchange:
    """Over one of torch's process groups, without torch's registry of them."""

    backend: Any
    """ProcessGroupGloo or ProcessGroupNCCL."""
    rank: int
    size: int

    def gather(self, x: Tensor) -> Tensor:
        """See `Exchange.gather`."""
        out = x.new_empty((self.size, *x.shape))
        self._wait(lambda: self.backend._allgather_base(_bytes(out), _bytes(x.contiguous())))
        return out

    def deal(self, x: Tensor) -> Tensor:
        """See `Exchange.deal`."""
        out = torch.empty_like(x)
        self._wait(lambda: self.backend.alltoall_base(_bytes(out), _bytes(x), [], []))
        return out

    def _wait(self, begin: Callable[[], Any]) -> None:
        try:
            begin().wait()
        except RuntimeError as error:
            why, _, _ = str(error).partition(". ")  # what comes after gives advice for other programs
            raise GroupError(f"another rank is gone, or does not answer ({why})") from error


def _bytes(x: Tensor) -> Tensor:
    """Not every backend knows every dtype."""
    return x.view(-1).view(torch.uint8)


def add_in_order(parts: Tensor) -> Tensor:
    """parts [size, ...] -> the first plus the second, plus the third and so on: in float32, or float64 if they are;
    rounded once."""
    wide = torch.promote_types(parts.dtype, torch.float32)
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part
    return total.to(parts.dtype)


@dataclass(frozen=True)
class Place:
    """Where a rank finds the others."""

    rank: int
    size: int
    neighbours: int
    store: Any
    """A torch.distributed store that all ranks reach."""
    address: str
    """This host's, as the other ranks reach it."""
    timeout: float
    """Seconds that an operation may take. Of those that are replayed from a captured step NCCL sees nothing: the host
    of the ranks does."""


def join(place: Place, device: torch.device, *, beat: Callable[[], None], on_begin: Callable[[], None]) -> Ranks:
    """Meet the other ranks. -> the group, when all are there. Raises GroupError.

    beat: is called while this rank waits for one that still loads. on_begin: see `Ranks`.
    """

    def meeting() -> None:
        try:
            _meet(place, f"meeting {next(numbers)}", beat)
        except RuntimeError as error:
            raise GroupError(f"waited for ranks that did not come ({error})") from error

    numbers = itertools.count()
    meeting()
    try:
        backend = _backend(place, device)
    except RuntimeError as error:
        raise GroupError(f"cannot reach the other ranks ({error})") from error
    exchange = TorchExchange(backend, place.rank, place.size)
    return Ranks(place.rank, place.size, place.neighbours, exchange, meeting, on_begin)


def _meet(place: Place, name: str, beat: Callable[[], None]) -> None:
    """Wait for as long as it takes: whoever watches the ranks knows which of them gets on with its loading."""
    place.store.set(f"{name}, rank {place.rank}", "")
    keys = [f"{name}, rank {rank}" for rank in range(place.size)]
    # Not `wait`: that prints warnings when it waits in vain, and here it does whenever one rank is slower.
    while not place.store.check(keys):
        beat()
        time.sleep(LOOK_SECONDS)


def _backend(place: Place, device: torch.device) -> Any:
    from torch.distributed import distributed_c10d

    groups: Any = distributed_c10d
    bound = datetime.timedelta(seconds=place.timeout)
    if device.type == "cuda":
        options = groups.ProcessGroupNCCL.Options()
        options._timeout = bound
        return groups.ProcessGroupNCCL(place.store, place.rank, place.size, options)
    options = groups.ProcessGroupGloo._Options()
    options._timeout = bound
    options._threads = 1
    options._devices = [groups.ProcessGroupGloo.create_device(hostname=place.address)]
    return groups.ProcessGroupGloo(place.store, place.rank, place.size, options)
