"""A process that torchrun started with RANK above 0: a rank that follows, and nothing else. It serves no HTTP.

It forks the rank and watches it, as the host does for those of the server (`host`), so a rank that hangs on this host
is ended here. The group does not come back by itself: who started it starts it again, on all hosts together, and learns
of its end by the exit code. Knows processes; no model and no request.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys

from pronk.engine.config import EngineConfig
from pronk.engine.control import GroupEnded, StartGroup
from pronk.engine.errors import ConfigError
from pronk.engine.group import Group, forked
from pronk.engine.seat import Pulse, Seat, shared_memory
from pronk.engine.torchrun import Position

FAILURE_EXIT = 1
_STOPS = (signal.SIGINT, signal.SIGTERM)

log = logging.getLogger("pronk.engine")


def follow_rank_0(config: EngineConfig, position: Position) -> int:
    """Be a rank until the group is over. -> exit code: 0 when rank 0 said that it is over, else 1.

    config: what is in it but `start_timeout` and `step_timeout` is rank 0's to say. Raises ConfigError.
    """
    if sys.platform != "linux":
        raise ConfigError("several processes share a model on Linux only: leave --tensor-parallel-size at 1")
    print(
        f"Rank {position.rank} of {position.size} follows the server at {position.host}, which alone answers HTTP.",
        flush=True,
    )
    # Read by numpy and OpenMP when they are imported; see `host_process`.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from pronk.engine.worker import run_follower

    # Taken up by `sigtimedwait`, never by a handler.
    signals = {*_STOPS, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    seat = Seat(rank=position.rank, size=position.size, pulse=Pulse(shared_memory(1), 0))
    launch = forked(
        functools.partial(run_follower, config, position),
        lambda: _leave(signals),
    )
    group = Group(StartGroup(1, config.start_timeout), [seat], launch, is_watched=True)
    end = _watch(group, signals)
    if group.codes.get(position.rank) == 0:
        return 0
    log.error("the group is over: %s", end.reason)
    print(f"pronk: the group is over: {end.reason}", file=sys.stderr, flush=True)
    return FAILURE_EXIT


def _leave(signals: set[signal.Signals]) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def _watch(group: Group, signals: set[signal.Signals]) -> GroupEnded:
    """Until nothing of it is left.

    A first signal to stop is not obeyed: rank 0 got one as well, and lets running requests finish, for which it needs
    this rank. A second one is.
    """
    num_stops = 0
    while (end := group.look()) is None:
        taken = signal.sigtimedwait(signals, group.tick)
        if taken is None or taken.si_signo not in _STOPS:
            continue
        num_stops += 1
        if num_stops == 1:
            print("pronk: rank 0 decides when to stop; a second signal stops this rank at once", file=sys.stderr)
        else:
            group.stop()
    return end
