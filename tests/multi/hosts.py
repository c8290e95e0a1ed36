"""Two hosts on one machine: network namespaces, a cable between them, and processes that torchrun starts in each."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

SECONDS = 120
"""That nothing here takes, unless something hangs."""
CLONE_NEWNET = 0x40000000
PORT = 8000
MASTER_PORT = 29500
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=SECONDS).stdout


class Host:
    """One namespace. Nothing of it is left after `close`."""

    def __init__(self, name: str) -> None:
        self.name = name
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")

    def run(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], text=True, **options)

    def pids(self) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        """Every process, as when the power goes, but that the network says so."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def connect(self, port: int = PORT) -> socket.socket:
        """-> a connection from inside the namespace to a port of it; a socket stays where it was made."""

        def inside() -> socket.socket:
            with Path("/run/netns", self.name).open() as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            return socket.create_connection(("127.0.0.1", port), timeout=SECONDS)

        with ThreadPoolExecutor(1) as pool:  # a thread of its own, which ends with it
            return pool.submit(inside).result()

    def close(self) -> None:
        self.kill()
        ip("netns", "delete", self.name)


class Cable:
    """Between two hosts."""

    def __init__(self, hosts: tuple[Host, Host]) -> None:
        ip("-n", hosts[0].name, "link", "add", "cable", "type", "veth", "peer", "cable", "netns", hosts[1].name)
        for host, address in zip(hosts, ADDRESSES, strict=True):
            ip("-n", host.name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", host.name, "link", "set", "cable", "up")
        self._end = hosts[0]

    def cut(self) -> None:
        """Nobody is told: no connection is closed, packets are lost."""
        ip("-n", self._end.name, "link", "set", "cable", "down")


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host, Cable]]:
    if not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("network namespaces need root, and the command ip")
    with contextlib.ExitStack() as stack:
        try:
            hosts = []
            for number in (1, 2):
                hosts.append(Host(f"pronk-{os.getpid()}-{number}"))
                stack.callback(hosts[-1].close)
            pair = (hosts[0], hosts[1])
            cable = Cable(pair)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield *pair, cable


class Ranks:
    """What torchrun started on one host: a server on the first, a follower on the other."""

    def __init__(self, host: Host, number: int, model: Path, *flags: str) -> None:
        self.lines: list[str] = []
        self.process = host.run(
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
            "--node-rank", str(number), "--master-addr", ADDRESSES[0], "--master-port", str(MASTER_PORT),
            "--shutdown-timeout", str(SECONDS), "-m", "pronk", "serve", str(model),
            "--tensor-parallel-size", "2", "--port", str(PORT), *flags,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait(self) -> int:
        """-> exit code."""
        code = self.process.wait(SECONDS)
        self._reader.join(SECONDS)
        return code

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            self.lines.extend(stdout)


class Client:
    """Of a server, by connections that somebody makes."""

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        self._connect = connect

    def ask(self, **fields: Any) -> http.client.HTTPResponse:
        """A chat."""
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Once upon"}], "temperature": 0, **fields}
        return self._request("POST", "/v1/chat/completions", json.dumps(body))

    def is_ready(self) -> bool:
        try:
            with self._request("GET", "/health") as reply:
                return reply.status == 200
        except OSError:
            return False

    def _request(self, method: str, path: str, body: str | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("pronk")
        connection.sock = self._connect()
        connection.request(method, path, body, {"content-type": "application/json", "connection": "close"})
        return connection.getresponse()


def events(reply: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Of a stream, until it ends."""
    for line in reply:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield json.loads(line.removeprefix(b"data: "))


def until(condition: Callable[[], bool]) -> None:
    """Raises AssertionError after a time."""
    expired = threading.Event()
    timer = threading.Timer(SECONDS, expired.set)
    timer.start()
    try:
        while not condition():
            assert not expired.wait(0.02)
    finally:
        timer.cancel()
