"""serve: a server's life, from the taken port to the exit code.

Bind, answer (503), load, be ready, drain, end. Knows signals, sockets and the order of things; no route and no field.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import uvicorn

from pronk.engine.config import EngineConfig
from pronk.engine.errors import PronkError
from pronk.engine.newborn import Newborn
from pronk.server.app import create_app
from pronk.server.config import ServerConfig
from pronk.server.connections import watched
from pronk.server.console import ProgressDisplay, base_url, start_table
from pronk.server.loading import load_model
from pronk.server.metrics import Metrics
from pronk.server.service import Engine, ServedModel, Service

Load = Callable[[EngineConfig, ProgressDisplay], Coroutine[Any, Any, ServedModel]]

logger = logging.getLogger(__name__)

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75
"""Longer than proxies keep a connection for its next request (nginx 60 or 75 s), so that none is closed under them."""
FLUSH_SECONDS = 1
"""What is left of an answer when its request has been cut gets this long to leave."""


class BindError(PronkError):
    """The address cannot be listened on."""


def serve(config: ServerConfig, newborn: Newborn) -> int:
    """Serve until told to stop. newborn: is to become the engine's host. -> exit code: 0 after a stop that was asked
    for, 1 when the engine was down at the end.

    Raises BindError, and what load_model raises.
    """
    configure_logging(config.log_level)
    with bind(config.host, config.port) as listener, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        load = functools.partial(load_model, newborn=newborn)
        return runner.run(Server(config, listener, load=load).run())


def bind(host: str, port: int) -> socket.socket:
    """-> a socket that listens, so that no one else can take the port while the model loads. Raises BindError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise BindError(f"--host {host}: there is no such address; give an address of this machine") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise BindError(_why_not_bound(error, host, port)) from None
    listener.setblocking(False)
    return listener


def _why_not_bound(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is taken: stop what listens there, or choose another port with --port"
    if error.errno == errno.EACCES:
        return f"port {port} needs rights that this user does not have: choose one above 1023 with --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host} is no address of this machine: choose another, or 0.0.0.0 for all of them"
    return f"cannot listen on {host}, port {port}: {error.strerror}"


class HTTPServer(uvicorn.Server):
    """uvicorn, with the signals left to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Signals:
    """Counts SIGINT and SIGTERM: the first asks to drain, the second to stop now."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def install(self, loop: asyncio.AbstractEventLoop) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.on_signal)

    def on_signal(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


class Server:
    """One run of `serve`."""

    def __init__(self, config: ServerConfig, listener: socket.socket, *, load: Load = load_model) -> None:
        """load: makes the model; what it raises ends the run."""
        self._config = config
        self._listener = listener
        self._load = load
        self._service = Service(config.model_names, max_waiting=config.max_waiting)
        self._app = create_app(self._service, config)
        self._signals = Signals()
        self._has_drained = False
        self._http = HTTPServer(
            uvicorn.Config(
                self._app,
                http=watched(config.stream_timeout, self._app.state.metrics.client_dropped),
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                lifespan="off",
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=FLUSH_SECONDS,
            )
        )

    async def run(self) -> int:
        """-> exit code."""
        self._signals.install(asyncio.get_running_loop())
        answering = asyncio.create_task(self._http.serve(sockets=[self._listener]), name="http")
        model = None
        try:
            model = await self._until_loaded()
            if model is None:
                logger.info("stopped while the model was loading")
                return 0
            self._announce(model)
            if not await self._until_stopped(model.engine):
                return 1
            return await self._drain(model.engine)
        finally:
            await self._end_http(answering)
            if model is not None:
                await self._close(model.engine)

    async def _until_loaded(self) -> ServedModel | None:
        """-> the model, or None when a signal came first."""
        progress = ProgressDisplay(sys.stderr)
        loading = asyncio.create_task(self._load(self._config.engine, progress), name="loading")
        stopping = asyncio.create_task(self._signals.first.wait())
        try:
            await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
            return loading.result() if loading.done() else None
        finally:
            progress.close()
            await _cancel(loading, stopping)

    async def _until_stopped(self, engine: Engine) -> bool:
        """-> True when a signal came; False when the engine is gone and somebody else has to start it again.

        Else a lost engine comes back by itself; until then the server stays, to say so to whoever asks.
        """
        stopping = asyncio.create_task(self._signals.first.wait())
        going = asyncio.create_task(engine.gone())
        await asyncio.wait((stopping, going), return_when=asyncio.FIRST_COMPLETED)
        stopped = stopping.done()
        await _cancel(stopping, going)
        if not stopped:
            logger.error("%s; this process ends, so that who started the ranks starts them again", engine.error)
        return stopped

    def _announce(self, model: ServedModel) -> None:
        metrics: Metrics = self._app.state.metrics
        metrics.watch(model.engine)
        self._service.ready(model)
        url = base_url(self._config.host, self._listener.getsockname()[1])
        needs_key = bool(self._config.api_keys)
        print(start_table(model.engine.info, names=self._service.names, url=url, needs_key=needs_key), flush=True)

    async def _drain(self, engine: Engine) -> int:
        """Let what runs end, within the time there is and until a second signal. -> exit code."""
        self._service.drain()
        deadline = time.monotonic() + self._config.shutdown_timeout
        logger.info(
            "shutting down: running requests have %g seconds to finish; a second signal stops at once",
            self._config.shutdown_timeout,
        )
        draining = asyncio.create_task(engine.drain(self._config.shutdown_timeout))
        stopping = asyncio.create_task(self._signals.second.wait())
        await asyncio.wait((draining, stopping), return_when=asyncio.FIRST_COMPLETED)
        drained = draining.done() and draining.result()
        await _cancel(draining, stopping)
        if engine.error is not None:
            logger.error("stopped while the engine was down: %s", engine.error)
            return 1
        if drained:
            self._has_drained = True
            # The engine is done; what it said may still be on its way to a client that reads slowly.
            self._http.config.timeout_graceful_shutdown = max(FLUSH_SECONDS, round(deadline - time.monotonic()))
        else:
            logger.warning("requests that are still running are cut")
            await engine.close()  # their streams end with an error event
        return 0

    async def _close(self, engine: Engine) -> None:
        """Where nobody was in a hurry so far, the engine may write what a later start maps; a second signal does not
        wait for that."""
        if not self._has_drained or self._signals.second.is_set():
            await engine.close()
            return
        closing = asyncio.create_task(engine.close(keeps=True))
        stopping = asyncio.create_task(self._signals.second.wait())
        await asyncio.wait((closing, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not closing.done():
            engine.kill()
        await _cancel(stopping)
        await closing

    async def _end_http(self, answering: asyncio.Task[None]) -> None:
        """Close the listener and the connections; a second signal does not wait for them."""
        self._http.should_exit = True
        stopping = asyncio.create_task(self._signals.second.wait())
        await asyncio.wait((answering, stopping), return_when=asyncio.FIRST_COMPLETED)
        self._http.force_exit = self._signals.second.is_set()
        await _cancel(stopping)
        await answering


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel, and wait until they have ended. What they raise has been seen or is of no interest any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def configure_logging(level: str) -> None:
    """Lines on standard error, which hold no prompt and no answer."""
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s", force=True
    )
    # Its lines about starting and stopping say nothing that ours do not.
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.getLogger().level))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it can be installed, else asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
