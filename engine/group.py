"""Group: the ranks that share a model, as the host sees them: started together, watched, and ended together.

A rank that ends, for whatever reason, or that does not beat in time, ends all the others: none can go on alone. Knows
processes by their ids and exit codes; not what they do, and not who wants them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from pronk.engine.control import GroupEnded, StartGroup
from pronk.engine.seat import LOST_PEER, MakeOrders, Pulse, Seat, shared_memory

RunRank = Callable[[Seat], int]
"""What a rank does with its life. -> exit code."""
Launch = Callable[[Seat, Sequence[Seat]], int]
"""Start the process of one seat out of those of a group. -> its id."""

BLAME_SECONDS = 0.2
"""How long after one rank's end others are waited for, whose end may be the one to be named."""
SUSPECT_SHARE = 0.5
"""Of its patience: a rank that is silent so long may be what others wait for."""
KILL_SECONDS = 10.0
"""How long killed ranks may take to be gone: one that a driver holds on to must not keep a group from coming back."""
LONGEST_TICK_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Group:
    """One group, from its start to its end."""

    def __init__(self, order: StartGroup, seats: Sequence[Seat], launch: Launch, *, is_watched: bool) -> None:
        """seats: of `make_seats`; what they hold is the ranks' when this returns. is_watched: whether ranks beat.

        Raises OSError when a process cannot be started: those that could are gone then.
        """
        self._start_timeout = order.start_timeout
        self._is_watched = is_watched
        self._living: dict[int, int] = {}
        self._codes: dict[int, int] = {}
        self._stopped: set[int] = set()
        self._first_death = 0.0
        self._verdict: GroupEnded | None = None
        self._give_up = 0.0
        self._looked = time.monotonic()
        self._watches = {seat.rank: _Watch(seat.pulse) for seat in seats}
        try:
            for seat in seats:
                self._living[seat.rank] = launch(seat, seats)
        except OSError:
            self._abandon()
            raise
        finally:
            for seat in seats:
                close_seat(seat)
        self.pids = list(self._living.values())

    @property
    def codes(self) -> dict[int, int]:
        """The exit codes of the ranks that have ended."""
        return dict(self._codes)

    @property
    def tick(self) -> float:
        """Seconds after which `look` wants to be called again, if no child ends before."""
        if self._verdict is not None:
            return max(0.0, self._give_up - time.monotonic())
        if self._codes:
            return BLAME_SECONDS
        shortest = min(watch.patience(self._start_timeout) for watch in self._watches.values())
        return min(shortest / 8, LONGEST_TICK_SECONDS)

    def look(self) -> GroupEnded | None:
        """Reap and watch. -> how the group ended, when nothing of it is left; None while there is something."""
        self._reap()
        if self._verdict is None:
            self._judge()
        if self._verdict is None or (self._living and time.monotonic() < self._give_up):
            return None
        if self._living:
            stuck = ", ".join(f"rank {rank} (process {pid})" for rank, pid in self._living.items())
            return GroupEnded(self._verdict.rank, f"{self._verdict.reason}; {stuck} cannot be killed")
        return self._verdict

    def stop(self) -> None:
        """Kill every rank; `look` says when they are gone."""
        if self._verdict is None:
            self._condemn(0, "the group was stopped")

    def _reap(self) -> None:
        for rank, pid in list(self._living.items()):
            while rank in self._living:
                changed, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
                if not changed:
                    break
                self._note(rank, status)

    def _note(self, rank: int, status: int) -> None:
        """status: as the system spells that a process has stopped, gone on or ended."""
        if os.WIFSTOPPED(status):
            self._stopped.add(rank)
        elif os.WIFCONTINUED(status):
            self._stopped.discard(rank)
        else:
            del self._living[rank]
            self._codes[rank] = os.waitstatus_to_exitcode(status)
            self._first_death = self._first_death or time.monotonic()

    def _judge(self) -> None:
        """Find out whether the group has to end, and by whose fault."""
        if self._codes:
            rank = min(self._codes, key=lambda rank: (_blame(self._codes[rank]), rank))
            code = self._codes[rank]
            # What one rank meets, others may meet: rank 0 can say more of it, to the server.
            is_certain = code < 0 or (rank == 0 and code != LOST_PEER) or not self._living
            if is_certain or time.monotonic() >= self._first_death + BLAME_SECONDS:
                self._condemn(rank, f"rank {rank} {self._how_it_ended(rank)}")
        elif self._is_watched:
            self._find_hung()

    def _how_it_ended(self, rank: int) -> str:
        code, words = self._codes[rank], self._watches[rank].last_words()
        if code < 0:
            return f"was killed by signal {-code}"
        if code == LOST_PEER:
            return "lost another rank"
        return f"failed: {words}" if words else f"ended with exit code {code}"

    def _find_hung(self) -> None:
        now = time.monotonic()
        # A time in which this process did not run either, as in a machine that was frozen, is nobody's fault.
        elapsed = min(now - self._looked, 2 * self.tick)
        self._looked = now
        longest = 0.0
        silent = []
        for rank, watch in self._watches.items():
            watch.look(elapsed)
            share = watch.silence / watch.patience(self._start_timeout)
            longest = max(longest, share)
            if share >= SUSPECT_SHARE:
                silent.append(rank)
        if longest >= 1:
            rank = min(silent, key=self._innocence)
            self._condemn(rank, f"rank {rank} {self._watches[rank].describe(self._start_timeout)}")

    def _innocence(self, rank: int) -> tuple[bool, int, float]:
        """Of a rank that is silent: all are, where one hangs and the others wait for it. That one was stopped, or has
        begun the fewest of the operations that all do together, or else was the first to be silent."""
        watch = self._watches[rank]
        return rank not in self._stopped, watch.operations, watch.at

    def _condemn(self, rank: int, reason: str) -> None:
        self._verdict = GroupEnded(rank, reason)
        self._give_up = time.monotonic() + KILL_SECONDS
        for pid in self._living.values():
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the id is still this process's

    def _abandon(self) -> None:
        """Those of a group that did not become one: they are young, and hold nothing that could hold them."""
        for pid in self._living.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


class _Watch:
    """One rank's beats, as the host has seen them."""

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self.at = pulse.read().at
        self.operations = 0
        self.silence = 0.0
        """Seconds that this was looked at without a new beat."""

    def look(self, elapsed: float) -> None:
        """elapsed: seconds since the last look."""
        beat = self._pulse.read()
        self.silence = self.silence + elapsed if beat.at == self.at else 0.0
        self.at, self.operations = beat.at, beat.operations

    def patience(self, start_timeout: float) -> float:
        """-> seconds that the rank may be silent."""
        return self._pulse.read().patience or start_timeout

    def last_words(self) -> str:
        return self._pulse.last_words()

    def describe(self, start_timeout: float) -> str:
        patience = self._pulse.read().patience
        if patience:
            return f"did not answer for {patience:g} s"
        return f"made no progress for {start_timeout:g} s while it was starting"


def make_seats(size: int, link: socket.socket, make_orders: MakeOrders) -> list[Seat]:
    """What the ranks of a group share, before there are any. link: rank 0's. Raises OSError, having closed it."""
    memory = shared_memory(size)
    pulses = [Pulse(memory, rank) for rank in range(size)]
    if size == 1:
        return [Seat(pulse=pulses[0], link=link)]
    with contextlib.ExitStack() as undo:
        undo.callback(link.close)
        listener = undo.enter_context(socket.create_server(("127.0.0.1", 0), backlog=size))
        leader, followers = make_orders(size)
        undo.pop_all()
    port = listener.getsockname()[1]
    return [
        Seat(size=size, pulse=pulses[0], link=link, store_listener=listener, store_port=port, orders=leader),
        *(
            Seat(rank=rank, size=size, pulse=pulses[rank], store_port=port, orders=end)
            for rank, end in enumerate(followers, 1)
        ),
    ]


def close_seat(seat: Seat) -> None:
    """Give up what a seat holds in this process."""
    for part in (seat.link, seat.store_listener, seat.orders):
        if part is not None:
            part.close()


def forked(run_rank: RunRank, leave: Callable[[], None]) -> Launch:
    """-> a Launch for a process of one thread, by which ranks have at once what it has imported.

    leave: give up in a rank what only the host needs.
    """

    def launch(seat: Seat, seats: Sequence[Seat]) -> int:
        host = os.getpid()
        _flush()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            _die_with(host)
            leave()
            for other in seats:
                if other is not seat:
                    close_seat(other)
            code = run_rank(seat)
        except BaseException:  # noqa: BLE001  nothing may climb into the host's own frames: this is another process
            traceback.print_exc()
        finally:
            _flush()
            os._exit(code)

    return launch


def spawned(seat: Seat, seats: Sequence[Seat]) -> int:
    """A Launch where a process that has imported much must not fork (macOS): a new interpreter, for a single rank."""
    if seat.link is None or len(seats) > 1:
        raise OSError("a group of several ranks is forked, and this system cannot do that safely")
    fd = seat.link.fileno()
    os.set_inheritable(fd, True)
    return os.posix_spawn(sys.executable, [sys.executable, "-m", "pronk.engine.process", str(fd)], os.environ)


def _die_with(host: int) -> None:
    """End this process when the host does, however that ends; at once if it has. Linux only."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl refuses to end a rank with its host")
    if os.getppid() != host:
        os._exit(1)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _blame(code: int) -> int:
    """-> the lower, the likelier is it that the others ended because of this one."""
    if code < 0:
        return 0
    return {0: 2, LOST_PEER: 3}.get(code, 1)
