"""A server on a real socket, over a fake engine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from pronk.engine.config import EngineConfig
from pronk.engine.wire import Progress
from pronk.server.config import ServerConfig
from pronk.server.lifecycle import Server, bind
from pronk.server.service import ServedModel

from .fakes import FakeEngine, served

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "stressed"}]}


class Running:
    """A server that runs, over a fake engine; `loaded` lets its loading end."""

    def __init__(self, engine: FakeEngine, **config: Any) -> None:
        self.engine = engine
        self.listener = bind("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.loaded = asyncio.Event()
        self.failure: Exception | None = None
        settings = ServerConfig(**{"served_model_names": ("tiny",), "port": self.port, **config})
        self.task = asyncio.create_task(Server(settings, self.listener, load=self._load).run())

    async def _load(self, config: EngineConfig, on_progress: Callable[[Progress], None]) -> ServedModel:
        on_progress(Progress("loading weights", 512, 1024))
        await self.loaded.wait()
        if self.failure is not None:
            raise self.failure
        on_progress(Progress("loading weights", 1024, 1024))
        return served(self.engine)

    async def get(self, path: str) -> tuple[int, Any]:
        return await asyncio.to_thread(self._open, path, None)

    async def chat(self, **fields: Any) -> tuple[int, Any]:
        return await asyncio.to_thread(self._open, "/v1/chat/completions", json.dumps({**BODY, **fields}).encode())

    def _open(self, path: str, body: bytes | None) -> tuple[int, Any]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=body)
        try:
            with urllib.request.urlopen(request, timeout=20) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    async def until_ready(self) -> None:
        self.loaded.set()
        await self.until_health_is(200)

    async def until_health_is(self, status: int) -> None:
        async with asyncio.timeout(20):
            while (await self.get("/health"))[0] != status:
                continue

    def signal(self, number: int = signal.SIGTERM) -> None:
        os.kill(os.getpid(), number)

    async def code(self) -> int:
        """Wait for the end. -> exit code."""
        return await asyncio.wait_for(self.task, 20)
