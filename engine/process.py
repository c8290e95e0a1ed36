"""The engine's own process: receive, step, send. Started by `client.AsyncEngine.start`, ended by it or with it.

    python -m pronk.engine.process FD

FD is a connected socket. When its other end closes, whoever wanted the answers is gone, and this process ends too.
Knows messages and the core; no HTTP, no text.
"""

from __future__ import annotations

import logging
import select
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch

from pronk.engine import wire
from pronk.engine.config import EngineConfig
from pronk.engine.core import EngineCore
from pronk.engine.errors import PronkError
from pronk.engine.request import Request, SamplingParams
from pronk.engine.runner import ModelRunner, load_runner
from pronk.engine.tokenizer import load_vocabulary

READ_SIZE = 1 << 20
PROGRESS_INTERVAL_SECONDS = 0.1

log = logging.getLogger("pronk.engine")


class Disconnected(PronkError):
    """The server's end of the socket is closed."""


class Link:
    """The engine's end of the socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._frames = wire.Frames(wire.ToEngine)

    def receive(self, *, wait: bool) -> list[object]:
        """The messages that have arrived; with `wait`, at least a part of one. Raises Disconnected."""
        messages: list[object] = []
        while True:
            readable, _, _ = select.select([self._connection], [], [], None if wait and not messages else 0)
            if not readable:
                return messages
            try:
                data = self._connection.recv(READ_SIZE)
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
    """-> exit code: 0 after a shutdown or when the server is gone, 1 after a failure that was reported."""
    # The server decides when to stop: a Ctrl-C or a SIGTERM to the whole group must not cut off what it drains.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    link = Link(socket.socket(fileno=int(sys.argv[1])))
    try:
        start = link.receive(wait=True)
        if len(start) != 1 or not isinstance(start[0], wire.Start):
            raise PronkError("the first message to the engine must be Start")
        serve(link, start[0].config)
    except Disconnected:
        return 0
    except Exception as error:  # noqa: BLE001  the crash report: whatever it was, the other side must learn of it
        return report(link, error)
    return 0


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


def serve(link: Link, config: EngineConfig) -> None:
    """Load, say so, then receive, step and send until told to stop."""
    folder = Path(config.model)
    link.send(wire.Progress("starting"))
    progress = _ProgressReporter(link)
    runner = load_runner(config, folder, progress)
    if runner.device.type == "cpu":
        # The kernels have threads of their own, and torch's would wait for the same cores.
        torch.set_num_threads(1)
    vocabulary = load_vocabulary(folder)
    core = EngineCore(config, runner, vocabulary)
    link.send(wire.Progress("warming up"))
    warm_up(core)
    core = EngineCore(config, runner, vocabulary)  # the warm-up leaves no trace in counters and cache
    link.send(engine_info(config, runner))
    may_prepare = True
    while True:
        may_prepare = may_prepare and (core.has_work or core.prepare())
        for message in link.receive(wait=not core.has_work and not may_prepare):
            if isinstance(message, wire.Add):
                core.add(message.request)
            elif isinstance(message, wire.Abort):
                core.abort(message.request_ids)
            elif isinstance(message, wire.CountCached):
                num_cached = core.num_cached(message.prompt, message.cache_salt)
                link.send(wire.CachedCount(message.query, num_cached))
            elif isinstance(message, wire.Shutdown):
                return
        if core.has_work:
            outputs = core.step()
            link.send(wire.Step(outputs, core.stats))


def warm_up(core: EngineCore) -> None:
    """Make one token: what cannot do that must not be called ready."""
    core.add(Request(request_id="warm-up", prompt=[0], params=SamplingParams(temperature=0, max_tokens=1)))
    while core.has_work:
        for output in core.step():
            if output.finish_reason == "error":
                raise PronkError(f"the model cannot make a token: {output.error}; are the weights damaged?")


def engine_info(config: EngineConfig, runner: ModelRunner) -> wire.EngineInfo:
    """What the server wants to know of a loaded engine."""
    model = runner.model
    return wire.EngineInfo(
        folder=config.model,
        num_parameters=model.config.num_parameters,
        dtype=str(runner.dtype).removeprefix("torch."),
        device=str(runner.device),
        kernels=model.kernels.describe(runner.dtype),
        weights_bytes=model.nbytes,
        kv_cache_bytes=runner.cache.nbytes,
        num_blocks=runner.plan.num_blocks,
        block_size=runner.block_size,
        max_model_len=runner.plan.max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=runner.max_num_batched_tokens,
        vocab_size=model.config.vocab_size,
        eos_token_ids=sorted(model.config.eos_token_ids),
        load_seconds=runner.load_seconds,
    )


class _ProgressReporter:
    """Sends at most ten messages a second, and the last."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self._next or done >= total:
            self._next = now + PROGRESS_INTERVAL_SECONDS
            self._link.send(wire.Progress("loading weights", done, total))


if __name__ == "__main__":
    sys.exit(main())
