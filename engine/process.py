"""A rank's life. Rank 0 is the engine: receive, step, send. Forked by the host, and ended by it or by the server.

    python -m pronk.engine.process FD

is rank 0 of a group of its own, without a host. FD is a connected socket. When its other end closes, whoever wanted the
answers is gone, and this process ends too. Knows messages and the core; no HTTP, no text.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import select
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from pronk.engine import wire
from pronk.engine.company import Company, OneHost
from pronk.engine.config import EngineConfig
from pronk.engine.core import EngineCore
from pronk.engine.errors import GroupError, PronkError
from pronk.engine.leading import Leading
from pronk.engine.orders import Begin, Stop
from pronk.engine.request import Request, SamplingParams
from pronk.engine.runner import ModelRunner, check_size, load_runner
from pronk.engine.seat import LOST_PEER, Pulse, Seat
from pronk.engine.tokenizer import load_vocabulary
from pronk.engine.worker import (
    BEAT_SECONDS,
    company_of,
    follow,
    give_cores_to_kernels,
    join_group,
    settle,
    step_timeout,
)

PROGRESS_INTERVAL_SECONDS = 0.1
PARTING_SECONDS = 8.0
"""Of what a server waits for its engine to end."""

log = logging.getLogger("pronk.engine")


class Disconnected(PronkError):
    """The server's end of the socket is closed."""


class Link:
    """The engine's end of the socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._frames = wire.Frames(wire.ToEngine)

    def receive(self, *, wait: float = 0.0) -> list[object]:
        """The messages that have arrived, or that do within `wait` seconds. Raises Disconnected."""
        messages: list[object] = []
        while True:
            readable, _, _ = select.select([self._connection], [], [], 0 if messages else wait)
            if not readable:
                return messages
            try:
                data = self._connection.recv(wire.READ_SIZE)
            except ConnectionError as error:
                raise Disconnected("the server is gone") from error
            if not data:
                raise Disconnected("the server is gone")
            messages += self._frames.feed(data)

    def send(self, message: wire.FromEngine) -> None:
        """Raises Disconnected."""
        try:
            self._connection.sendall(wire.encode(message))
        except ConnectionError as error:
            raise Disconnected("the server is gone") from error


def main() -> int:
    """-> exit code."""
    return run_rank(Seat(link=socket.socket(fileno=int(sys.argv[1]))))


def run_rank(seat: Seat) -> int:
    """-> exit code: 0 after a shutdown or when the server is gone, LOST_PEER when another rank is, 1 after a failure
    that was reported."""
    settle()
    return follow(seat, OneHost(seat)) if seat.link is None else lead(seat, Link(seat.link))


def lead(seat: Seat, link: Link) -> int:
    """Rank 0's life. -> exit code."""
    try:
        serve(link, first_message(link, seat.pulse).config, seat)
    except Disconnected:
        return 0
    except GroupError as error:
        log.error("rank %d: %s", seat.rank, error)
        return LOST_PEER
    except Exception as error:  # noqa: BLE001  the crash report: whatever it was, the other side must learn of it
        return report(link, error)
    return 0


def first_message(link: Link, pulse: Pulse) -> wire.Start:
    """Wait for it. Raises Disconnected, and PronkError for another message."""
    while not (messages := link.receive(wait=BEAT_SECONDS)):
        pulse.beat()
    if len(messages) != 1 or not isinstance(messages[0], wire.Start):
        raise PronkError("the first message to the engine must be Start")
    return messages[0]


def report(link: Link, error: Exception) -> int:
    """Tell the server why the engine ends. -> exit code."""
    text = "".join(traceback.format_exception(error))
    if not isinstance(error, PronkError):
        log.error("the engine failed:\n%s", text)
    try:
        link.send(wire.Failed(type(error).__name__, str(error), text))
    except Disconnected:
        log.error("the engine failed, and nobody is there to be told: %s", error)
    return 1


def serve(link: Link, config: EngineConfig, seat: Seat) -> None:
    """Gather the ranks, load, say so, then receive, step and send until told to stop."""
    try:
        company = company_of(seat, config)
        link.send(wire.Progress("starting" if config.position is None else "waiting for the other ranks"))
        if company is not None:
            check_size(config, Path(config.model), company.size, company.neighbours)
        leading = Leading(None if company is None else company.lead(config.step_timeout or math.inf))
        try:
            lead_on(link, config, seat.pulse, company, leading)
        except GroupError as error:
            raise leading.blame(error) from error
    except GroupError as error:
        if config.position is not None:  # else the host of all ranks knows more
            report(link, error)
        raise


def lead_on(link: Link, config: EngineConfig, pulse: Pulse, company: Company | None, leading: Leading) -> None:
    """`serve`, from where the other ranks listen."""

    def beat() -> None:
        pulse.beat()
        leading.keep()

    folder = Path(config.model)
    leading.tell(Begin(dataclasses.replace(config, position=None)))
    tp = join_group(company, config, beat=beat, on_begin=pulse.operate)
    progress = _ProgressReporter(link, beat, "loading weights" if tp.size == 1 else "loading rank 0's weights")
    runner = load_runner(config, folder, progress, tp=tp, tell=leading.tell)
    beat()
    give_cores_to_kernels(runner.device)
    vocabulary = load_vocabulary(folder)
    beat()
    core = EngineCore(config, runner, vocabulary)
    link.send(wire.Progress("warming up"))
    warm_up(core, beat)
    info = engine_info(config, runner, runtime_bytes=runner.runtime_bytes())
    core = EngineCore(config, runner, vocabulary)  # the warm-up leaves no trace in counters and cache
    patience = step_timeout(config, runner.device.type)
    pulse.serve(patience)
    link.send(info)
    idle = min(BEAT_SECONDS, patience / 4)
    may_prepare = True
    while True:
        may_prepare = may_prepare and (core.has_work or core.prepare())
        beat()
        for message in link.receive(wait=0.0 if core.has_work or may_prepare else idle):
            if isinstance(message, wire.Add):
                core.add(message.request)
            elif isinstance(message, wire.Abort):
                core.abort(message.request_ids)
            elif isinstance(message, wire.CountCached):
                num_cached = core.num_cached(message.prompt, message.cache_salt)
                link.send(wire.CachedCount(message.query, num_cached))
            elif isinstance(message, wire.Shutdown):
                if message.keeps:
                    _keep_weights(core, beat)
                leading.tell(Stop())
                return
        if core.has_work:
            outputs = core.step()
            link.send(wire.Step(outputs, core.stats))


def _keep_weights(core: EngineCore, beat: Callable[[], None]) -> None:
    """A server that was never idle has not kept all of them yet; few more seconds are spent on that."""
    end = time.monotonic() + PARTING_SECONDS
    if core.keep_weights():
        log.info("packed weights are written for later starts, for up to %g seconds", PARTING_SECONDS)
    while time.monotonic() < end and core.keep_weights():
        beat()


def warm_up(core: EngineCore, beat: Callable[[], None]) -> None:
    """Make one token: what cannot do that must not be called ready."""
    core.add(Request(request_id="warm-up", prompt=[0], params=SamplingParams(temperature=0, max_tokens=1)))
    while core.has_work:
        beat()
        for output in core.step():
            if output.finish_reason == "error":
                raise PronkError(f"the model cannot make a token: {output.error}; are the weights damaged?")


def engine_info(config: EngineConfig, runner: ModelRunner, *, runtime_bytes: int | None = None) -> wire.EngineInfo:
    """What the server wants to know of a loaded engine. runtime_bytes: see `wire.EngineInfo`."""
    model = runner.model
    return wire.EngineInfo(
        folder=config.model,
        num_parameters=model.config.num_parameters,
        dtype=str(runner.dtype).removeprefix("torch."),
        device=str(runner.device) if model.tp.size == 1 else runner.device.type,
        kernels=model.kernels.describe(runner.dtype),
        weights_bytes=sum(share.weights_bytes for share in runner.shares),
        kv_cache_bytes=sum(share.kv_cache_bytes for share in runner.shares),
        num_blocks=runner.plan.num_blocks,
        block_size=runner.block_size,
        max_model_len=runner.plan.max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=runner.max_num_batched_tokens,
        vocab_size=model.config.vocab_size,
        eos_token_ids=sorted(model.config.eos_token_ids),
        load_seconds=runner.load_seconds,
        ranks=runner.shares,
        weights_file=None if runner.shelf is None else str(runner.shelf.path),
        weights_mapped=runner.shelf is not None and runner.keeping is None,
        runtime_bytes=runtime_bytes,
    )


class _ProgressReporter:
    """Beats at each report; sends at most ten messages a second, and the last."""

    def __init__(self, link: Link, beat: Callable[[], None], phase: str) -> None:
        self._link = link
        self._beat = beat
        self._phase = phase
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        self._beat()
        now = time.monotonic()
        if now >= self._next or done >= total:
            self._next = now + PROGRESS_INTERVAL_SECONDS
            self._link.send(wire.Progress(self._phase, done, total))


if __name__ == "__main__":
    sys.exit(main())
