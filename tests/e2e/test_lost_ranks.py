"""Ranks of a running server that are killed or stand still, at any moment: whoever waits gets an error that names the
rank, whoever asks meanwhile a 503, and then it serves as before; of what was there, nothing is left over."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from pronk.server.loading import embedded_folder

from .serving import SECONDS, Server, client_of, until

STEP_TIMEOUT = 1.5
START_TIMEOUT = 3.0
NOT_AGAIN = "the engine could not be started again"
START_SECONDS = 0.1
"""Of each rank, less than it takes them to start: one that is lost then may be doing anything."""
Stream = AsyncIterator[Any]


def serve(size: int) -> Server:
    timeouts = ("--step-timeout", str(STEP_TIMEOUT), "--start-timeout", str(START_TIMEOUT))
    return Server(embedded_folder(), "--tensor-parallel-size", str(size), *timeouts)


@dataclass(frozen=True)
class Loss:
    """What happens in one round."""

    when: str
    rank: int
    signal: signal.Signals

    @property
    def reason(self) -> str:
        """What clients are told, unless it happens while the ranks start."""
        if self.signal is signal.SIGKILL:
            return f"the engine died: rank {self.rank} was killed by signal 9"
        return f"the engine died: rank {self.rank} did not answer for {STEP_TIMEOUT:g} s"


@dataclass(frozen=True)
class Outcome:
    loss: Loss
    noticed: float
    """Seconds until the first client was told; of a start, those who ask are told at once."""
    back: float
    """Seconds until a request was answered again."""
    health: int
    """What it was right after the first client was told."""


def losses(size: int, rounds: int) -> list[Loss]:
    """So many, at random: each kind as often as any other, in another order each time."""
    chance = random.Random(rounds)
    kinds = [
        Loss(when, rank, number)
        for when, rank, number in itertools.product(
            ("idle", "asked", "streaming", "starting"), range(size), (signal.SIGKILL, signal.SIGSTOP)
        )
    ]
    drawn: list[Loss] = []
    while len(drawn) < rounds:
        drawn += chance.sample(kinds, len(kinds))
    return drawn[:rounds]


def question(**changes: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": "What is Pronk?"}], "temperature": 0, "max_tokens": 12}
    return {"model": "tiny", **asked, **changes}


ENDLESS: dict[str, Any] = question(max_tokens=1900, extra_body={"ignore_eos": True})


async def answer(client: openai.AsyncOpenAI) -> str:
    text: str | None = (await client.chat.completions.create(**question())).choices[0].message.content
    assert text
    return text


async def answer_or_refusal(client: openai.AsyncOpenAI) -> str | openai.InternalServerError:
    try:
        return await answer(client)
    except openai.InternalServerError as error:
        return error


async def drain(stream: Stream) -> None:
    async for _ in stream:
        continue


def successors(server: Server, before: list[psutil.Process]) -> list[psutil.Process]:
    """-> the ranks that come after these, when all of them have been forked."""
    found: list[psutil.Process] = []

    def are_there() -> bool:
        nonlocal found
        found = server.ranks  # looked at once: they come and go
        return len(found) == len(before) and not set(before) & set(found)

    until(are_there)
    return found


async def lose(server: Server, client: openai.AsyncOpenAI, loss: Loss, right: str, moment: float) -> Outcome:
    """right: what the question is answered. moment: between 0 and 1, of a start. -> what came of it."""
    waiting: list[tuple[asyncio.Task[Any], bool]] = []
    victims = server.ranks
    if loss.when == "streaming":
        stream = aiter(await client.chat.completions.create(**ENDLESS, stream=True))
        await anext(stream)
        whole = asyncio.create_task(client.chat.completions.create(**ENDLESS))
        waiting = [(asyncio.create_task(drain(stream)), True), (whole, False)]
        await asyncio.to_thread(until, lambda: server.metric("pronk_requests_running") == 2)
    elif loss.when == "starting":
        victims[0].kill()
        victims = await asyncio.to_thread(successors, server, victims)
        await asyncio.sleep(moment * START_SECONDS * len(victims))  # the moment is what is tested
    began = time.monotonic()
    victims[loss.rank].send_signal(loss.signal)
    for task, is_stream in waiting:
        with pytest.raises(openai.APIError) as caught:
            await task
        assert caught.value.body["message"] == loss.reason  # type: ignore[index]
        assert caught.value.body["code"] == "engine_down"  # type: ignore[index]
        assert is_stream or caught.value.status_code == 503  # type: ignore[attr-defined]
    if loss.when == "idle":  # nobody asks it for anything
        victim = victims[loss.rank]  # where this looks so seldom that it misses the 503, the rank is gone all the same
        await asyncio.to_thread(until, lambda: server.get("/health")[0] == 503 or not victim.is_running())
    noticed = time.monotonic() - began if waiting or loss.when == "idle" else None
    health = 0 if noticed is None else (await asyncio.to_thread(server.get, "/health"))[0]
    while isinstance(found := await answer_or_refusal(client), openai.InternalServerError):
        if noticed is None:
            noticed = time.monotonic() - began
            health = (await asyncio.to_thread(server.get, "/health"))[0]
        assert (found.status_code, found.code) == (503, "engine_down")
        assert loss.when == "starting" or found.body["message"].startswith(loss.reason)  # type: ignore[index]
    back = time.monotonic() - began
    assert found == right
    assert not any(victim.is_running() for victim in victims)
    assert len(server.ranks) == len(victims)
    return Outcome(loss, back if noticed is None else noticed, back, health)


def belongings(server: Server) -> dict[str, Any]:
    """What the server and all that it has started hold."""
    started = server.processes()
    listening = [each for process in started for each in process.net_connections() if each.status == "LISTEN"]
    return {
        "processes": len(started),
        "files of the server": psutil.Process(server.process.pid).num_fds(),
        "files of the host": server.host.num_fds(),
        "files of ranks": [rank.num_fds() for rank in server.ranks],
        "sockets that listen": len(listening),
        "shared memory": sorted(os.listdir("/dev/shm")),
    }


def hold_the_same(server: Server, before: dict[str, Any]) -> None:
    """Within some time: connections of clients that are gone are closed a moment later."""
    now: dict[str, Any] = {}

    def is_so() -> bool:
        nonlocal now
        now = belongings(server)
        return now == before

    try:
        until(is_so)
    except AssertionError:
        assert now == before


async def stop(server: Server) -> None:
    """What runs may end."""
    processes = server.processes()
    async with client_of(server) as client:
        asked = {**ENDLESS, "max_tokens": 60}
        stream = aiter(await client.chat.completions.create(**asked, stream=True))
        await anext(stream)
        server.process.send_signal(signal.SIGTERM)
        *_, last = [chunk async for chunk in stream]
    assert last.choices[0].finish_reason == "length"
    assert await asyncio.to_thread(server.wait) == 0
    assert not any(process.is_running() for process in processes)


async def survive(size: int, rounds: int) -> tuple[list[Outcome], list[str]]:
    """As many losses, one after another, of one server. -> what came of each, and the log."""
    server = serve(size)
    try:
        chance = random.Random(size)
        outcomes = []
        async with client_of(server) as client:
            right = await answer(client)
        before = belongings(server)
        for loss in losses(size, rounds):
            async with client_of(server) as client:
                outcomes.append(await lose(server, client, loss, right, chance.random()))
        await asyncio.to_thread(hold_the_same, server, before)
        await stop(server)
    finally:
        server.end()
    assert {outcome.health for outcome in outcomes} <= {200, 503}
    # It may be up again before it is asked.
    assert sum(outcome.health == 503 for outcome in outcomes) >= len(outcomes) / 2
    check_log(server.errors, size, rounds)
    return outcomes, server.errors


def check_log(lines: list[str], size: int, rounds: int) -> None:
    """For an operator: a line that says what happened, at most one more of each rank that lost others, and no more."""
    deaths = [line for line in lines if "ERROR the engine died: " in line]
    others = [line for line in lines if "ERROR" in line and line not in deaths and NOT_AGAIN not in line]
    assert rounds <= len(deaths) <= 2 * rounds
    assert len(others) <= (size - 1) * 2 * rounds
    assert all(len(line) < 400 for line in lines)
    assert not [line for line in lines if "Traceback" in line or "[c10d]" in line]


async def test_a_few_losses() -> None:
    await survive(size=2, rounds=5)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "rounds"), [(2, 50), (4, 24)])
async def test_many_losses(size: int, rounds: int) -> None:
    outcomes, log = await survive(size, rounds)
    starts = [outcome for outcome in outcomes if outcome.loss.when == "starting"]
    failed = sum(NOT_AGAIN in line for line in log)
    print(f"{size} ranks: {failed} of {len(starts)} ranks were lost before they had started")
    assert failed >= len(starts) / 4
    for outcome in outcomes:
        loss = outcome.loss
        print(
            f"{size} ranks: rank {loss.rank} {loss.signal.name} {loss.when:9} "
            f"told after {outcome.noticed:.3f} s, back after {outcome.back:.3f} s, health {outcome.health}"
        )
        if loss.when != "starting":
            allowed = 0.0 if loss.signal is signal.SIGKILL else STEP_TIMEOUT
            assert outcome.noticed < allowed + 1


@pytest.fixture
def two() -> Any:
    running = serve(2)
    yield running
    running.end()


async def test_a_host_that_stands_still_or_is_killed_and_a_server_that_is(two: Server) -> None:
    async with client_of(two) as client:
        right = await answer(client)
        host = two.host
        host.send_signal(signal.SIGSTOP)
        end = time.monotonic() + STEP_TIMEOUT + 0.5
        while time.monotonic() < end:  # this time is what is tested: nobody watches, and nobody minds
            assert await answer(client) == right
        host.send_signal(signal.SIGCONT)
        assert await answer(client) == right
        assert two.metric("pronk_engine_restarts_total") == 0
        stream = aiter(await client.chat.completions.create(**ENDLESS, stream=True))
        await anext(stream)
        ranks = two.ranks
        host.kill()
        with pytest.raises(openai.APIError, match="the host of its processes was killed by signal 9"):
            await drain(stream)
        await asyncio.to_thread(until, lambda: two.get("/health")[0] == 200)
        assert await answer(client) == right
        until_gone(ranks)
        # And now without the server itself; a rank that stands still cannot see that all are gone.
        processes = two.processes()
        assert len(processes) == 3
        shared = sorted(os.listdir("/dev/shm"))
        two.ranks[1].send_signal(signal.SIGSTOP)
        two.process.kill()
    until_gone(processes)
    assert sorted(os.listdir("/dev/shm")) == shared


def until_gone(processes: list[psutil.Process]) -> None:
    """Whoever has inherited them reaps them soon."""
    until(lambda: not any(process.is_running() for process in processes))


def test_a_rank_that_is_lost_at_the_first_start_is_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pronk.server.cli", "serve", "--port", "0", "--tensor-parallel-size", "2"]
    errors = tmp_path / "errors"
    with errors.open("w") as out, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=out) as server:
        process = psutil.Process(server.pid)
        ranks = wait_for_ranks(process, 2)
        ranks[1].kill()
        assert server.wait(SECONDS) == 1
    lines = errors.read_text().splitlines()
    assert lines[-1] == "pronk: the engine ended while it was starting: rank 1 was killed by signal 9"
    assert not [line for line in lines if "Traceback" in line]
    assert not any(each.is_running() for each in ranks)


def wait_for_ranks(process: psutil.Process, size: int) -> list[psutil.Process]:
    def ranks() -> list[psutil.Process]:
        started = process.children(recursive=True)
        return sorted(started[1:], key=lambda rank: rank.pid)

    until(lambda: len(ranks()) == size)
    return ranks()
