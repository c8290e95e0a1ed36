"""A team of threads that run one compiled function over many items: who is free takes the next few.

The caller is one of the team. A member that has nothing to do looks for work for 10 to 100 microseconds, longer than
Python needs from one operation of a step to the next, and then sleeps: whoever waits longer would take a core from the
process that serves HTTP. What an item's result is never depends on who works on it.

Launches that are alike each time can be gathered, and then made one after the other without Python in between.

Functions have the form `f(arguments, first, last)`: the address of int64 arguments, and the items first to last - 1.
"""

from __future__ import annotations

import ctypes
import math
import platform
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from llvmlite import ir

from pronk.kernels.jit import emit
from pronk.kernels.jit.compiler import Library, load
from pronk.kernels.jit.emit import I32, I64, Function, Value

SHARES = 16
"""Pieces of the work for each thread."""
WORTH_TAKING = 15_000
"""Nanoseconds of a piece of the work at least: what it takes to wake a thread up, or to wait for it."""
LOOKS = 2000
"""How often a member looks for work before it sleeps. A look takes a pause of some 10 to 140 cycles."""

# Where things are in the team's memory, in bytes; in lines of the cache of their own, since all write to them.
ROUND, NEXT, ACTIVE, SLEEPERS, WORK = (line * 128 for line in range(5))
FUNCTION, ARGUMENTS, ITEMS, CHUNK, OPEN, STOPPED = (WORK + 8 * field for field in range(6))
BYTES = 6 * 128

FUTEX = {"x86_64": 202, "aarch64": 98}
"""The number of Linux's system call."""
LAUNCH = ("function", "arguments", "work")
"""Addresses, side by side in `Launches`."""
HAS_FUTEX = sys.platform == "linux" and platform.machine() in FUTEX
WAIT, WAKE = 128, 129
"""Its operations, within one process."""
SLEEP_MICROSECONDS = 50
"""Between looks, where there is no futex."""


class Work:
    """How many items a launch has, and how many a member takes at least. A launch that was gathered reads it anew."""

    def __init__(self, num_items: int = 0, cost: float = 1.0) -> None:
        self._numbers = (ctypes.c_int64 * 2)()
        self.address = ctypes.addressof(self._numbers)
        self.set(num_items, cost)

    def set(self, num_items: int, cost: float) -> None:
        """cost: nanoseconds of an item, roughly."""
        # So many that they are worth a thread's waking up.
        self._numbers[0], self._numbers[1] = num_items, math.ceil(WORTH_TAKING / max(cost, 1.0))


@dataclass(frozen=True)
class Launch:
    """One call of `Team.run`."""

    function: int
    """Its address."""
    arguments: Sequence[int]
    work: Work


class Launches:
    """Several, in order, as `Team.replay` takes them."""

    def __init__(self, launches: Sequence[Launch]) -> None:
        self.count = len(launches)
        self._work = [each.work for each in launches]
        self._arguments = np.array([number for each in launches for number in each.arguments], np.int64)
        place = self._arguments.ctypes.data
        rows = []
        for each in launches:
            rows.append((each.function, place, each.work.address))
            place += 8 * len(each.arguments)
        self._rows = np.array(rows, np.int64).reshape(-1, len(LAUNCH))
        self.address: int = self._rows.ctypes.data


class Team:
    """num_threads members, the caller among them; for one caller at a time. They go when it is closed, or forgotten."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        library = load("threads", [Path(__file__), Path(emit.__file__)], f"{SHARES}, {LOOKS}", write)
        memory = ctypes.create_string_buffer(BYTES + 128)
        self._place = -(-ctypes.addressof(memory) // 128) * 128
        self._run = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(library.address("run"))
        self._replay = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(library.address("replay"))
        members = [
            threading.Thread(target=_join, args=(library, memory, self._place), daemon=True, name="pronk-kernels")
            for _ in range(num_threads - 1)
        ]
        for member in members:
            member.start()
        # Neither code nor memory may go before the last member has. A team that was closed is its caller alone.
        self._kept = library, memory
        self.close = weakref.finalize(self, _stop, library, memory, self._place, members)

    def run(self, function: int, arguments: Sequence[int], work: Work) -> None:
        """function: its address. Returns when all items are done.

        Items are taken some at a time: so many that the work is worth a thread's waking up, and so few that whoever is
        held up leaves the rest to others.
        """
        packed = (ctypes.c_int64 * len(arguments))(*arguments)
        self._run(self._place, function, ctypes.addressof(packed), work.address, self.num_threads)

    def replay(self, launches: Launches) -> None:
        """`run` each."""
        self._replay(self._place, launches.address, launches.count, self.num_threads)


def _join(library: Library, memory: object, place: int) -> None:
    """A member's life."""
    ctypes.CFUNCTYPE(None, ctypes.c_int64)(library.address("join"))(place)
    del memory


def _stop(library: Library, memory: object, place: int, members: list[threading.Thread]) -> None:
    ctypes.CFUNCTYPE(None, ctypes.c_int64)(library.address("stop"))(place)
    for member in members:
        member.join()
    del memory


def write() -> ir.Module:
    module = ir.Module("threads")
    with Function(module, "run", ["team", "function", "arguments", "work", "threads"]) as f:
        _write_run(f, {name: f.argument(name) for name in LAUNCH})
    with Function(module, "replay", ["team", "launches", "count", "threads"]) as f, f.loop(0, f.argument("count")) as n:
        place = f.argument("launches") + n * (8 * len(LAUNCH))
        _write_run(f, {name: f.load(place + 8 * field, I64) for field, name in enumerate(LAUNCH)})
    with Function(module, "join", ["team"]) as f:
        _write_join(f)
    with Function(module, "stop", ["team"]) as f:
        team = f.argument("team")
        f.atomic_store(1, team + STOPPED)
        f.atomic_add(team + ROUND, 1)
        _wake(f, team + ROUND)
    return module


def _write_run(f: Function, launch: Mapping[str, Value]) -> None:
    """Open the round, work, close it, and wait for those who are still at work. A member that comes late finds it
    closed, or finds the next one open, and nobody waits for it."""
    team, threads = f.argument("team"), f.argument("threads")
    items, least = f.load(launch["work"], I64), f.load(launch["work"] + 8, I64)
    pieces = threads * SHARES
    chunk = f.larger((items + pieces - 1) // pieces, least)
    f.atomic_store(0, team + NEXT)
    for field, value in (
        (FUNCTION, launch["function"]),
        (ARGUMENTS, launch["arguments"]),
        (ITEMS, items),
        (CHUNK, chunk),
    ):
        f.store(value, team + field)
    with f.when((items > chunk) & (threads > 1)):
        f.atomic_store(1, team + OPEN)
        f.atomic_add(team + ROUND, 1)
        with f.when(f.atomic_load(team + SLEEPERS) > 0):
            _wake(f, team + ROUND)
    _work(f, team)
    f.atomic_store(0, team + OPEN)
    looks = f.variable(0)
    with f.repeat_while() as repeat:
        repeat.stop_when(f.atomic_load(team + ACTIVE).equals(0))
        _pause(f)
        looks.set(looks.get() + 1)
        # Whoever is waited for may be waiting for this core.
        with f.when(looks.get() > LOOKS):
            f.instruction("sched_yield", I32)


def _write_join(f: Function) -> None:
    """Until the team is closed: look for a round, sleep if there is none for long, work."""
    team = f.argument("team")
    seen = f.variable(0)
    with f.repeat_while() as life:
        looks = f.variable(0)
        with f.repeat_while() as search:
            now = f.atomic_load(team + ROUND)
            is_new = f.select(now.equals(seen.get()), f.value(0), 1)
            search.stop_when(is_new.equals(1))
            _pause(f)
            looks.set(looks.get() + 1)
            with f.when(looks.get() > LOOKS):
                f.atomic_add(team + SLEEPERS, 1)
                _sleep_while(f, team + ROUND, now)
                f.atomic_add(team + SLEEPERS, -1)
        seen.set(f.atomic_load(team + ROUND))
        life.stop_when(f.atomic_load(team + STOPPED).equals(1))
        f.atomic_add(team + ACTIVE, 1)
        with f.when(f.atomic_load(team + OPEN).equals(1)):
            _work(f, team)
        f.atomic_add(team + ACTIVE, -1)


def _work(f: Function, team: Value) -> None:
    """Take items until there are none. Whoever finds none left has nothing to say: another may still be at work."""
    items, chunk = f.load(team + ITEMS, I64), f.load(team + CHUNK, I64)
    function, arguments = f.load(team + FUNCTION, I64), f.load(team + ARGUMENTS, I64)
    with f.repeat_while() as repeat:
        first = f.atomic_add(team + NEXT, chunk)
        repeat.stop_when(first >= items)
        f.call(function, arguments, first, f.smaller(first + chunk, items))


def _pause(f: Function) -> None:
    """Tell the processor that this thread only looks."""
    if platform.machine() == "aarch64":
        f.instruction("llvm.aarch64.hint", ir.VoidType(), f.value(1, I32))
    elif platform.machine() == "x86_64":
        f.instruction("llvm.x86.sse2.pause", ir.VoidType())


def _sleep_while(f: Function, place: Value, value: Value) -> None:
    """Sleep until somebody wakes who sleeps at this place, unless it has another value by now."""
    if HAS_FUTEX:
        number = f.value(FUTEX[platform.machine()])
        f.instruction("syscall", I64, number, place, f.value(WAIT), value, f.value(0), f.value(0), f.value(0))
    else:
        f.instruction("usleep", I32, f.value(SLEEP_MICROSECONDS, I32))


def _wake(f: Function, place: Value) -> None:
    if HAS_FUTEX:
        number = f.value(FUTEX[platform.machine()])
        f.instruction(
            "syscall", I64, number, place, f.value(WAKE), f.value(1 << 30), f.value(0), f.value(0), f.value(0)
        )
