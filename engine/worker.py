"""A rank's part in its group: how it finds the others, and, for all but rank 0, its whole life. Load, then do as told.

    receive an order, carry it out

Rank 0 is `process`; it decides what a step holds, and what everybody does. Knows orders; no request and no server.
"""

from __future__ import annotations

import logging
import math
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from pronk.engine.channel import Follower
from pronk.engine.company import Company, OneHost, SeveralHosts
from pronk.engine.config import EngineConfig
from pronk.engine.errors import CheckpointNotFoundError, GroupError, LeaderGone, PronkError
from pronk.engine.orders import Begin, Order, Stop, decode
from pronk.engine.parallel import ALONE, Collectives, join
from pronk.engine.runner import choose_device, load_runner
from pronk.engine.seat import LOST_PEER, Pulse, Seat
from pronk.engine.torchrun import Position

BEAT_SECONDS = 0.25
"""The longest that a rank with nothing to do goes without a beat; a rank may count as hung after a second."""
STEP_TIMEOUT_SECONDS = {"cuda": 60.0, "cpu": 600.0}
"""A GPU's slowest step is one whose kernels have to be compiled first. A CPU may read long prompts through billions of
weights in one step, and `--max-num-batched-tokens` may make that longer still."""

log = logging.getLogger("pronk.engine")


def settle() -> None:
    """What every rank does first. The server decides when to stop: a Ctrl-C or a SIGTERM to the whole group must not
    cut off what it drains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")


def run_follower(config: EngineConfig, position: Position, seat: Seat) -> int:
    """The life of a rank that torchrun started, with RANK above 0. -> exit code, as that of `follow`.

    config: only its times count, until rank 0 has sent its own.
    """
    settle()
    return follow(seat, SeveralHosts(position, config.start_timeout), config.step_timeout or math.inf)


def follow(seat: Seat, company: Company, step_timeout: float = math.inf) -> int:
    """step_timeout: as `Company.follow` wants it. -> exit code: 0 when rank 0 said that it is over, LOST_PEER when
    another rank is gone, 1 after a failure."""
    try:
        _follow(seat, company, company.follow(step_timeout))
    except LeaderGone as error:
        if company.size > company.neighbours:  # else whoever started rank 0 here says how it ended
            log.error("rank %d: %s", seat.rank, error)
        return LOST_PEER
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


def company_of(seat: Seat, config: EngineConfig) -> Company | None:
    """For rank 0: the others; None where there are none."""
    if config.position is not None:
        return SeveralHosts(config.position, config.start_timeout)
    return None if seat.size == 1 else OneHost(seat)


def _follow(seat: Seat, company: Company, orders: Follower) -> None:
    begin = _next(orders, seat.pulse, BEAT_SECONDS)
    if not isinstance(begin, Begin):
        raise PronkError(f"the first order to rank {seat.rank} must be Begin, and is {type(begin).__name__}")
    config, folder = begin.config, Path(begin.config.model)
    if not folder.is_dir():
        raise CheckpointNotFoundError(
            f"{folder} is not on this host: the checkpoint must lie at the same path on each host of the group"
        )
    tp = join_group(company, config, beat=seat.pulse.beat, on_begin=seat.pulse.operate)
    runner = load_runner(config, folder, lambda done, total: seat.pulse.beat(), tp=tp)
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


def join_group(
    company: Company | None, config: EngineConfig, *, beat: Callable[[], None], on_begin: Callable[[], None]
) -> Collectives:
    """Find the other ranks. -> the group, when all are there. beat, on_begin: see `parallel.join`.

    Raises ConfigError and GroupError.
    """
    if company is None:
        return ALONE
    device = choose_device(config.device, rank=company.local_rank, neighbours=company.neighbours)
    place = company.place(step_timeout=step_timeout(config, device.type), start_timeout=config.start_timeout)
    return join(place, device, beat=beat, on_begin=on_begin)


def give_cores_to_kernels(device: torch.device) -> None:
    """The CPU's kernels have threads of their own, and torch's would wait for the same cores."""
    if device.type == "cpu":
        torch.set_num_threads(1)


def step_timeout(config: EngineConfig, device: str) -> float:
    """device: "cpu" or "cuda". -> seconds that a step may take before its rank counts as hung."""
    return config.step_timeout or STEP_TIMEOUT_SECONDS[device]
