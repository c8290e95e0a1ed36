"""A model shared by ranks on two hosts, which torchrun starts: real servers, a real torchrun, a network that is cut."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .hosts import Cable, Client, Host, Ranks, events, two_hosts, until

pytestmark = [pytest.mark.multi, pytest.mark.slow]

FLAGS = (
    "--served-model-name", "tiny", "--max-model-len", "2048", "--kv-cache-memory", "32MiB", "--cpu-threads", "1",
    "--step-timeout", "4",
)  # fmt: skip
CHATS: tuple[dict[str, Any], ...] = (
    {"max_tokens": 24, "logprobs": True, "top_logprobs": 3},
    {"max_tokens": 24, "temperature": 1.0, "seed": 7, "logprobs": True},
    {"max_tokens": 24, "temperature": 0.8, "seed": 8, "top_p": 0.9, "presence_penalty": 0.5},
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Any, tiny_llama: Any) -> Path:
    folder: Path = write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tiny_llama("1b"))
    return folder


class Group:
    """A server on the first host and a follower on the second."""

    def __init__(self, hosts: tuple[Host, Host], cable: Cable, model: Path) -> None:
        self.hosts = hosts
        self.cable = cable
        self.ranks = [Ranks(host, number, model, *FLAGS) for number, host in enumerate(hosts)]
        self.client = Client(hosts[0].connect)

    def start(self) -> None:
        """Returns when it can be asked."""
        until(self._is_ready)

    def close(self) -> None:
        for host in self.hosts:
            host.kill()
        for ranks in self.ranks:
            ranks.wait()

    def _is_ready(self) -> bool:
        for ranks in self.ranks:
            assert ranks.process.poll() is None, ranks.output
        return self.client.is_ready()

    def begin(self, max_tokens: int = 1900) -> tuple[http.client.HTTPResponse, Iterator[dict[str, Any]]]:
        """-> a stream that has begun, and what follows."""
        reply = self.client.ask(stream=True, max_tokens=max_tokens, ignore_eos=True)
        assert reply.status == 200
        stream = events(reply)
        for event in stream:
            if event["choices"][0]["delta"].get("content"):
                break
        return reply, stream

    def is_gone(self) -> bool:
        return not any(host.pids() for host in self.hosts)


@pytest.fixture
def group(model: Path) -> Iterator[Group]:
    with two_hosts() as (first, second, cable):
        group = Group((first, second), cable, model)
        try:
            group.start()
            yield group
        finally:
            group.close()


@contextlib.contextmanager
def one_host(model: Path) -> Iterator[Client]:
    """Two ranks of one server."""
    command = [sys.executable, "-m", "pronk", "serve", str(model), "--tensor-parallel-size", "2", "--port", "0", *FLAGS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        found = None
        while found is None:
            line = server.stdout.readline()
            assert line, "it ended"
            found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)
        port = int(found[1])
        yield Client(lambda: socket.create_connection(("127.0.0.1", port)))
        server.terminate()


def choices(client: Client, chat: dict[str, Any]) -> list[dict[str, Any]]:
    with client.ask(**chat) as reply:
        answer = json.load(reply)
    assert reply.status == 200, answer
    found: list[dict[str, Any]] = answer["choices"]
    return found


def test_two_hosts_answer_as_two_ranks_of_one_host(group: Group, model: Path) -> None:
    """Bit for bit: sums are made in the ranks' order, wherever they are."""
    with one_host(model) as client:
        for chat in CHATS:
            assert choices(group.client, chat) == choices(client, chat)
    assert "Rank 1 of 2 follows the server at 10.213.7.1" in group.ranks[1].output
    assert "is ready" not in group.ranks[1].output


def test_a_cut_cable_ends_streams_with_an_error_and_both_sides(group: Group) -> None:
    reply, stream = group.begin()
    group.cable.cut()
    *_, last = stream
    assert "the engine died: another rank does not answer" in last["error"]["message"]
    reply.close()
    assert [ranks.wait() for ranks in group.ranks] == [1, 1]
    until(group.is_gone)


def test_a_cut_cable_is_noticed_while_nobody_asks(group: Group) -> None:
    group.cable.cut()
    assert [ranks.wait() for ranks in group.ranks] == [1, 1]
    assert "rank 1 has taken no message for" in group.ranks[0].output or "rank 1 is lost" in group.ranks[0].output
    assert "the group is over: rank 1 " in group.ranks[1].output
    until(group.is_gone)


def test_a_killed_host_is_named_and_ends_the_group(group: Group) -> None:
    reply, stream = group.begin()
    group.hosts[1].kill()
    *_, last = stream
    assert re.search(r"the engine died: rank 1 (has closed its connection|is lost)", last["error"]["message"])
    reply.close()
    assert group.ranks[0].wait() == 1
    until(group.is_gone)


def test_a_killed_rank_of_the_other_host_ends_the_group(group: Group) -> None:
    """While nobody asks. torchrun on that host lives, and says so by its exit code."""
    newest = max(group.hosts[1].pids())
    os.kill(newest, signal.SIGKILL)
    assert [ranks.wait() for ranks in group.ranks] == [1, 1]
    assert "the group is over: rank 1 was killed by signal 9" in group.ranks[1].output
    until(group.is_gone)


def test_a_killed_server_ends_the_followers(group: Group) -> None:
    reply, _ = group.begin()
    group.hosts[0].kill()
    reply.close()
    assert group.ranks[1].wait() == 1
    until(group.is_gone)


def test_a_stop_of_all_lets_running_requests_finish(group: Group) -> None:
    """As when Kubernetes deletes the group: every torchrun gets SIGTERM, and passes it on."""
    reply, stream = group.begin(max_tokens=300)
    for ranks in group.ranks:
        ranks.process.terminate()
    *_, last = stream
    assert last["choices"][0]["finish_reason"] == "length"
    reply.close()
    for ranks in group.ranks:
        ranks.wait()
    assert "the group is over" not in group.ranks[1].output
    until(group.is_gone)
