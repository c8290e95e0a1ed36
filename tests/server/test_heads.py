"""What comes before a request's body: whatever it is, it is answered or refused, and costs little."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

from pronk.server import heads
from pronk.server.heads import MAX_HEAD_BYTES

from .conftest import Start
from .fakes import FakeEngine
from .running import BODY, Running

CHAT = json.dumps(BODY).encode()
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
CLOSING = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def post(*headers: bytes, body: bytes = CHAT) -> bytes:
    lines = [b"POST /v1/chat/completions HTTP/1.1", b"Host: x", *headers, b"Content-Length: %d" % len(body)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def exchange(port: int, parts: tuple[bytes, ...]) -> bytes:
    """Send the parts, one after the other, and read until the server closes."""
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(20)
        reply = b""
        try:
            for part in parts:
                client.sendall(part)
            while read := client.recv(1 << 16):
                reply += read
        except ConnectionError:  # it was closed while more was on its way
            pass
        return reply


async def ask(running: Running, *parts: bytes) -> list[tuple[int, bytes]]:
    """-> status and body of each answer."""
    reply = await asyncio.to_thread(exchange, running.port, parts)
    answers = []
    while reply:
        head, _, reply = reply.partition(b"\r\n\r\n")
        lengths = [line[15:] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
        answers.append((int(head.split()[1]), reply[: int(lengths[0])]))
        reply = reply[int(lengths[0]) :]
    return answers


@pytest.fixture
async def running(start: Start) -> Running:
    running = start(FakeEngine())
    await running.until_ready()
    return running


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",  # how TLS begins
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"BREW /health HTTP/1.1\r\n\r\n",
        b"CONNECT elsewhere:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /tokenize HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_what_is_no_http_is_refused_in_the_shape_of_every_error(running: Running, data: bytes) -> None:
    [(status, body)] = await ask(running, data)
    error = json.loads(body)["error"]
    assert (status, error["code"]) == (400, "invalid_http")
    assert sorted(error) == ["code", "message", "param", "type"]
    assert (await running.chat())[0] == 200


GET = b"GET /health HTTP/1.1\r\n"
CHUNKED = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS = {
    "a header": (GET + b"X: ", b"a"),
    "headers": (GET, b"X: a\r\n"),
    "a header's name": (GET, b"a"),
    "a trailer": (CHUNKED + b"0\r\nX: ", b"a"),
    "a chunk's extension": (CHUNKED + b"1;", b"a"),
}


@pytest.mark.parametrize(("begin", "more"), ENDLESS.values(), ids=ENDLESS.keys())
async def test_what_has_no_end_is_not_read_to_its_end(running: Running, begin: bytes, more: bytes) -> None:
    """The answer gets lost where a client goes on sending."""
    answers = await ask(running, begin, more * (1 << 22))
    assert [status for status, _ in answers] in ([], [431])
    assert (await running.chat())[0] == 200


async def test_a_head_that_is_too_long_is_refused_by_name(running: Running) -> None:
    [(status, body)] = await ask(running, (GET + b"X: " + b"a" * MAX_HEAD_BYTES)[: MAX_HEAD_BYTES + 1])
    assert (status, json.loads(body)["error"]["code"]) == (431, "head_too_long")


async def test_trailers_are_not_kept(running: Running) -> None:
    """Else they would be as many as a client likes."""
    trailers = b"0\r\n" + b"X: a\r\n" * 200_000 + b"\r\n"
    chunk = b"%x\r\n%s\r\n" % (len(CHAT), CHAT)
    answers = await ask(running, CHUNKED.replace(b"/tokenize", b"/v1/chat/completions") + chunk + trailers, CLOSING)
    assert [status for status, _ in answers] == [200, 200]


async def test_heads_of_a_usual_length_and_long_bodies_are_read(running: Running) -> None:
    long = json.dumps({**BODY, "user": "u" * (4 * MAX_HEAD_BYTES)}).encode()
    headers = [b"X-%d: %s" % (place, b"a" * 1000) for place in range(32)]
    answers = await ask(running, post(*headers, body=long), post(b"Connection: close", *headers))
    assert [status for status, _ in answers] == [200, 200]


@pytest.mark.parametrize("sent", [HEALTH[:20], b""])
async def test_a_head_that_does_not_come_is_not_waited_for(
    start: Start, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    running = start(FakeEngine())
    await running.until_ready()
    monkeypatch.setattr(heads, "HEAD_SECONDS", 0.05)
    answers = await ask(running, sent)
    assert [(status, json.loads(body)["error"]["code"]) for status, body in answers] == (
        [(408, "head_timeout")] if sent else []
    )
    answers = await ask(running, post(), HEALTH[:20])  # and not the second one of a connection either
    assert [status for status, _ in answers] == [200, 408]


UPGRADES = [b"Upgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\nConnection: Upgrade, HTTP2-Settings", b"Upgrade: websocket"]


@pytest.mark.parametrize("cut", [0, 30, -len(CHAT), -5])
async def test_an_upgrade_that_is_offered_is_not_taken(running: Running, cut: int) -> None:
    """Java's HTTP client offers one with every first request."""
    first = post(UPGRADES[0])
    answers = await ask(running, first[:cut], first[cut:], post(UPGRADES[1], b"Connection: upgrade, close"))
    assert [status for status, _ in answers] == [200, 200]
    assert all(json.loads(body)["object"] == "chat.completion" for _, body in answers)


async def test_many_requests_at_once_are_answered_in_their_order(running: Running) -> None:
    offer = b"GET /health HTTP/1.1\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n"
    bad = post(body=b"{")
    answers = await ask(running, offer * 300 + post() + bad + CLOSING)
    assert [status for status, _ in answers] == [200] * 301 + [400, 200]


async def test_nonsense_behind_a_request_is_never_part_of_its_answer(running: Running) -> None:
    stream = json.dumps({**BODY, "stream": True}).encode()
    running.engine.hold_after = 2
    with socket.create_connection(("127.0.0.1", running.port)) as client:
        client.settimeout(20)
        client.sendall(post(body=stream))
        reply = await asyncio.to_thread(client.recv, 1 << 16)
        client.sendall(b"nonsense\r\n\r\n")
        while read := await asyncio.to_thread(client.recv, 1 << 16):
            reply += read
    assert reply.count(b"HTTP/1.1") == 1
    assert reply.startswith(b"HTTP/1.1 200")
    await running.engine.until(lambda: not running.engine.running)
    assert len(running.engine.aborted) == 1
