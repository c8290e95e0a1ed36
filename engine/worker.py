"""A rank's part in its group: how it finds the others, and, for all but rank 0, its whole life. Load, then do as told.

    receive an order, carry it out

Rank 0 is `process`; it decides what a step holds, and what everybody does. Knows orders; no request and no server.
"""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from typing import Any

import torch

from pronk.engine.channel import Follower
from pronk.engine.config import EngineConfig
from pronk.engine.errors import GroupError, LeaderGone, PronkError
from pronk.engine.orders import Begin, Order, Stop, decode
from pronk.engine.parallel import ALONE, Collectives, Place, join
from pronk.engine.ring import RingEnd
from pronk.engine.runner import choose_device, load_runner
from pronk.engine.seat import LOST_PEER, Pulse, Seat

BEAT_SECONDS = 0.25
"""The longest that a rank with nothing to do goes without a beat; a rank may count as hung after a second."""
STEP_TIMEOUT_SECONDS = {"cuda": 60.0, "cpu": 600.0}
"""A GPU's slowest step is one whose kernels have to be compiled first. A CPU may read long prompts through billions of
weights in one step, and `--max-num-batched-tokens` may make that longer still."""
OUTLASTS = 2.0
"""By so much a rank waits longer for others than the host waits for it: the host knows which of them hangs."""
LOCALHOST = "127.0.0.1"

log = logging.getLogger("pronk.engine")


def follow(seat: Seat) -> int:
    """-> exit code: 0 when rank 0 said that it is over, LOST_PEER when another rank is gone, 1 after a failure."""
    try:
        _follow(seat, ring_end(seat).follow())
    except LeaderGone:
        return LOST_PEER  # the host says how rank 0 ended
    except GroupError as error:
        log.error("rank %d: %s", seat.rank, error)
        return LOST_PEER
    except PronkError as error:
        seat.pulse.say(str(error))
        return 1
    except Exception as error:  # noqa: BLE001  the crash report: whatever it was, the server must learn of it
        log.error("rank %d failed:\n%s", seat.rank, "".join(traceback.format_exception(error)))
        seat.pulse.say(_last_words(error, is_serving=seat.pulse.read().patience > 0))
        return 1
    return 0


def _last_words(error: Exception, *, is_serving: bool) -> str:
    """Clients read them of a rank that serves, and an error that nobody raised on purpose may hold a path."""
    name = type(error).__name__
    return name if is_serving else f"{name}: {error}"


def ring_end(seat: Seat) -> RingEnd:
    """The rank's end of the ring that orders go through."""
    if not isinstance(seat.orders, RingEnd):
        raise PronkError(f"rank {seat.rank} of {seat.size} was given no end of a ring")
    return seat.orders


def _follow(seat: Seat, orders: Follower) -> None:
    begin = _next(orders, seat.pulse, BEAT_SECONDS)
    if not isinstance(begin, Begin):
        raise PronkError(f"the first order to rank {seat.rank} must be Begin, and is {type(begin).__name__}")
    config = begin.config
    tp = join_group(seat, config)
    runner = load_runner(config, Path(config.model), lambda done, total: seat.pulse.beat(), tp=tp)
    give_cores_to_kernels(runner.device)
    patience = step_timeout(config, runner.device.type)
    last = None
    while not isinstance(order := _next(orders, seat.pulse, min(BEAT_SECONDS, patience / 4)), Stop):
        last = runner.carry_out(order, last)
        # Not before its first step: that compiles what the others find ready, and belongs to the start.
        seat.pulse.serve(patience)


def _next(orders: Follower, pulse: Pulse, idle: float) -> Order:
    """Wait for it. Raises LeaderGone."""
    while True:
        message = orders.receive(idle)
        pulse.beat()
        if message is not None:
            return decode(message)


def join_group(seat: Seat, config: EngineConfig) -> Collectives:
    """Find the other ranks. -> the group, when all are there. Raises ConfigError and GroupError."""
    if seat.size == 1:
        return ALONE
    device = choose_device(config.device, rank=seat.rank, neighbours=seat.size)
    place = Place(
        rank=seat.rank,
        size=seat.size,
        neighbours=seat.size,
        store=_store(seat, OUTLASTS * config.start_timeout),
        address=LOCALHOST,
        timeout=OUTLASTS * step_timeout(config, device.type),
    )
    return join(place, device, beat=seat.pulse.beat, on_begin=seat.pulse.operate)


def _store(seat: Seat, timeout: float) -> Any:
    """Where ranks leave each other their addresses: it lives in rank 0's process. Raises GroupError."""
    from datetime import timedelta

    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    listener = None if seat.store_listener is None else seat.store_listener.detach()
    try:
        return TCPStore(
            LOCALHOST,
            seat.store_port,
            seat.size,
            is_master=listener is not None,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            master_listen_fd=listener,
        )
    except RuntimeError as error:
        raise GroupError(f"cannot reach rank 0 ({error})", (0,)) from error


def give_cores_to_kernels(device: torch.device) -> None:
    """The CPU's kernels have threads of their own, and torch's would wait for the same cores."""
    if device.type == "cpu":
        torch.set_num_threads(1)


def step_timeout(config: EngineConfig, device: str) -> float:
    """device: "cpu" or "cuda". -> seconds that a step may take before its rank counts as hung."""
    return config.step_timeout or STEP_TIMEOUT_SECONDS[device]
