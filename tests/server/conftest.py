"""What the server's tests share, over a fake engine: a client of an application, a server that runs, OpenAI's client of
it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest

from pronk.server.app import create_app
from pronk.server.config import ServerConfig
from pronk.server.service import Service

from .fakes import Client, FakeEngine, served
from .running import Running

if TYPE_CHECKING:
    import openai

Connect = Callable[..., Client]


@pytest.fixture
def connect() -> Connect:
    """`connect(engine, ready=True, defaults={}, **config)` -> a client of a new application."""

    def make(
        engine: FakeEngine | None = None, *, ready: bool = True, defaults: Mapping[str, Any] = {}, **config: Any
    ) -> Client:
        engine = engine or FakeEngine()
        settings = ServerConfig(**{"served_model_names": ("tiny", "meta/tiny"), **config})
        service = Service(settings.model_names, max_waiting=settings.max_waiting)
        app = create_app(service, settings)
        if ready:
            app.state.metrics.watch(engine)
            service.ready(served(engine, **defaults))
        return Client(app, service, engine)

    return make


Start = Callable[..., Running]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """`start(engine=..., **config)` -> a server that runs until the test ends."""
    started: list[Running] = []

    def make(engine: FakeEngine | None = None, **config: Any) -> Running:
        started.append(Running(engine or FakeEngine(), **config))
        return started[-1]

    yield make
    for running in started:
        running.loaded.set()
        running.engine.gate.set()
        if not running.task.done():
            running.signal()
            running.signal()
        await asyncio.gather(running.task, return_exceptions=True)


@pytest.fixture
async def running(start: Start) -> Running:
    """A server that answers, by the names tiny and meta/tiny."""
    server = start(served_model_names=("tiny", "meta/tiny"))
    await server.until_ready()
    return server


@pytest.fixture
async def sdk(running: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client of `running`; it does not try again."""
    import openai  # only here: it takes longer to import than most files of tests take to run

    url = f"http://127.0.0.1:{running.port}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=20) as connected:
        yield connected
