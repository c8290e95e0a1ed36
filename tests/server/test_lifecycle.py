"""From the taken port to the exit code, over a real socket: loading, signals, draining, an engine that dies."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import signal
import socket
import urllib.request

import pytest

from pronk.engine.errors import CheckpointNotFoundError
from pronk.server import cli
from pronk.server.lifecycle import BindError, bind

from .conftest import Start
from .fakes import CONTEXT


async def test_it_answers_while_it_loads_then_serves_then_drains(
    start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    running = start()
    status, body = await running.get("/health")
    assert (status, json.loads(body)) == (503, {"status": "loading"})
    status, body = await running.chat()
    assert (status, json.loads(body)["error"]["code"]) == (503, "loading")
    await running.until_ready()
    assert (await running.chat())[0] == 200

    running.engine.gate.clear()
    call = asyncio.create_task(running.chat(stream=True))
    await running.engine.until(lambda: bool(running.engine.running))
    running.signal(signal.SIGINT)
    await running.until_health_is(503)
    status, body = await running.chat()
    assert (status, json.loads(body)["error"]["code"]) == (503, "draining")
    running.engine.gate.set()
    status, body = await call
    assert status == 200
    assert body.endswith(b"data: [DONE]\n\n")
    assert await running.code() == 0
    assert running.engine.closed == 1

    output = capfd.readouterr()
    assert "loading weights: 50% of 1.0 KiB" in output.err
    assert "Pronk" in output.out
    for fact in ("1.24 billion", "bfloat16", "2.0 GiB", "100 blocks of 16 tokens", str(CONTEXT)):
        assert fact in output.out
    assert f"http://127.0.0.1:{running.port}/v1" in output.out


async def test_who_is_in_no_hurry_leaves_time_for_weights_to_be_kept(start: Start) -> None:
    running = start()
    await running.until_ready()
    running.signal(signal.SIGINT)
    assert await running.code() == 0
    assert running.engine.kept is True


async def test_a_second_signal_does_not_wait_for_weights_to_be_kept(start: Start) -> None:
    running = start()
    await running.until_ready()
    running.engine.is_slow_to_keep = True
    running.signal(signal.SIGINT)
    await running.engine.until(lambda: bool(running.engine.closed))
    assert not running.engine.killed.is_set()
    running.signal(signal.SIGINT)
    assert await running.code() == 0
    assert running.engine.killed.is_set()


async def test_who_cuts_requests_off_is_in_a_hurry(start: Start) -> None:
    running = start()
    await running.until_ready()
    running.engine.gate.clear()
    call = asyncio.create_task(running.chat(stream=True))
    await running.engine.until(lambda: bool(running.engine.running))
    running.signal(signal.SIGINT)
    await running.until_health_is(503)
    running.signal(signal.SIGINT)
    assert await running.code() == 0
    await call
    assert running.engine.kept is False


async def test_the_curl_line_can_be_pasted(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    running = start()
    await running.until_ready()
    line = re.search(r"^curl .*$", capfd.readouterr().out, re.MULTILINE)
    assert line is not None
    words = shlex.split(line[0])
    request = urllib.request.Request(words[1], data=words[words.index("-d") + 1].encode())
    reply = await asyncio.to_thread(urllib.request.urlopen, request)
    with reply:
        assert json.loads(reply.read())["choices"][0]["message"]["content"] == "!olleH"


async def test_a_second_signal_does_not_wait(start: Start) -> None:
    running = start()
    await running.until_ready()
    running.engine.gate.clear()
    call = asyncio.create_task(running.chat(stream=True))
    await running.engine.until(lambda: bool(running.engine.running))
    running.signal()
    running.signal()
    status, body = await call
    assert (status, json.loads(body)["error"]["code"]) == (503, "engine_down")
    assert await running.code() == 0


async def test_what_does_not_end_in_time_is_cut_with_an_error(start: Start) -> None:
    running = start(shutdown_timeout=0.0)
    await running.until_ready()
    running.engine.gate.clear()
    call = asyncio.create_task(running.chat())
    await running.engine.until(lambda: bool(running.engine.running))
    running.signal()
    status, body = await call
    assert (status, json.loads(body)["error"]["code"]) == (503, "engine_down")
    assert await running.code() == 0


async def test_a_signal_while_loading_ends_at_once(start: Start) -> None:
    running = start()
    await running.get("/health")
    running.signal()
    assert await running.code() == 0


async def test_a_dead_engine_leaves_a_server_that_says_so_and_serves_when_it_is_back(start: Start) -> None:
    running = start()
    await running.until_ready()
    running.engine.die()
    assert (await running.chat())[0] == 503
    status, body = await running.get("/health")
    assert (status, json.loads(body)["status"]) == (503, "failed")
    running.engine.come_back()
    await running.until_health_is(200)
    assert (await running.chat())[0] == 200
    running.signal()
    assert await running.code() == 0


async def test_a_server_that_is_stopped_while_its_engine_is_down_says_so_by_its_exit_code(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    running = start()
    await running.until_ready()
    running.engine.die()
    running.signal()
    assert await running.code() == 1
    (line,) = [record.message for record in caplog.records if "killed by signal 9" in record.message]
    assert line.startswith("stopped while the engine was down")


async def test_a_server_whose_engine_is_gone_for_good_tells_its_clients_and_ends(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    running = start()
    await running.until_ready()
    running.engine.gate.clear()
    call = asyncio.create_task(running.chat(stream=True))
    await running.engine.until(lambda: bool(running.engine.running))
    running.engine.go()
    status, body = await call
    assert (status, json.loads(body)["error"]["code"]) == (503, "engine_down")
    assert await running.code() == 1
    assert running.engine.closed == 1
    assert any("killed by signal 9; this process ends" in record.message for record in caplog.records)


async def test_an_engine_that_cannot_start_ends_the_server(start: Start) -> None:
    running = start()
    running.failure = CheckpointNotFoundError("no such folder")
    running.loaded.set()
    with pytest.raises(CheckpointNotFoundError):
        await running.code()


def test_a_taken_port_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--port", str(port)], {}) == 1
    error = capsys.readouterr().err
    assert (
        error
        == f"pronk: port {port} on 127.0.0.1 is taken: stop what listens there, or choose another port with --port\n"
    )


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7", "x" * 70 + ".invalid", "\u0000"])
def test_addresses_that_are_not_ours(host: str) -> None:
    with pytest.raises(BindError, match="--host"):
        bind(host, 0)


def test_a_model_that_is_not_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "/no/such/folder", "--port", "0"], {}) == 1
    error = capsys.readouterr().err
    assert "/no/such/folder" in error
    assert "Traceback" not in error


def test_bind_listens_on_ipv6() -> None:
    if not socket.has_ipv6:
        return
    with bind("::1", 0) as listener:
        assert listener.family == socket.AF_INET6
