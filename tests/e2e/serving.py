"""`pronk serve` in a process of its own, and OpenAI's own client of it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import openai
import psutil
from prometheus_client.parser import text_string_to_metric_families

SECONDS = 120
CONTEXT = 2048


class Server:
    """A running `pronk serve`."""

    def __init__(self, model: Path, *flags: str) -> None:
        command = [
            sys.executable, "-m", "pronk.server.cli", "serve", str(model), "--port", "0", "--served-model-name", "tiny",
            "--max-model-len", str(CONTEXT), "--kv-cache-memory", "32MiB", "--max-num-batched-tokens", "64", *flags,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.errors: list[str] = []
        # Read all along: a full pipe would stop the server.
        self._reader = threading.Thread(target=self.errors.extend, args=(self.process.stderr,), daemon=True)
        self._reader.start()
        self.table = ""
        for line in self.process.stdout:
            self.table += line
            if line.startswith("curl"):
                break
        address = re.search(r"http://[\d.:]+/v1", self.table)
        assert address is not None, "".join(self.errors)
        self.url = address[0]

    def get(self, path: str) -> tuple[int, str]:
        """path: from the root, not from /v1."""
        try:
            with urllib.request.urlopen(self.url.removesuffix("/v1") + path, timeout=SECONDS) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        wanted = {"model": "tiny", **labels}
        for family in text_string_to_metric_families(self.get("/metrics")[1]):
            for sample in family.samples:
                if sample.name == name and sample.labels == wanted:
                    return float(sample.value)
        raise KeyError(name)

    @property
    def host(self) -> psutil.Process:
        """What starts the ranks. The server may have other children, which judge grammars."""
        children = psutil.Process(self.process.pid).children()
        (host,) = [child for child in children if "pronk.engine.host" in child.cmdline()]
        return host

    @property
    def ranks(self) -> list[psutil.Process]:
        """In their order, which is the one in which they were started."""
        return sorted(self.host.children(), key=lambda rank: rank.pid)

    @property
    def engine(self) -> psutil.Process:
        """Rank 0, of a server with no other."""
        (rank,) = self.ranks
        return rank

    def processes(self) -> list[psutil.Process]:
        """All that it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait(self) -> int:
        """-> exit code."""
        code = self.process.wait(SECONDS)
        self._reader.join(SECONDS)
        return code

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


def until(condition: Callable[[], bool]) -> None:
    """Each look is a request of its own, so this does not spin. Raises AssertionError after a time."""
    expired = threading.Event()
    timer = threading.Timer(SECONDS, expired.set)
    timer.start()
    try:
        while not condition():
            assert not expired.is_set()
    finally:
        timer.cancel()


@contextlib.asynccontextmanager
async def client_of(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=server.url, api_key="any", max_retries=0, timeout=SECONDS) as client:
        yield client
