"""Streams and their clients: silence is filled with comments, slow readers get larger events, and who reads nothing is
dropped."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import pytest

from pronk.engine.client import check_request
from pronk.engine.inbox import Inbox
from pronk.engine.request import Output, Request
from pronk.server.connections import LOOKS, Watch
from pronk.server.sending import COMMENT, EventStream

from .conftest import Connect, Start
from .fakes import FakeEngine, fake_logprobs, outputs
from .running import Running

# Silence


class Wire:
    """Where a stream is sent to. While `gate` is not set, nobody reads."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.changed = asyncio.Event()
        self.asked = asyncio.Event()

    async def send(self, message: Any) -> None:
        self.asked.set()
        await self.gate.wait()
        self.sent.append(message.get("body", message.get("status")))
        self.changed.set()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(20):
            while len(self.sent) < count:
                self.changed.clear()
                await self.changed.wait()

    def stream(self, keep_alive: float) -> EventStream:
        return EventStream(self.send, self.send, keep_alive=keep_alive)


async def test_silence_before_the_first_event_begins_the_stream_with_a_comment() -> None:
    wire = Wire()
    async with wire.stream(0.01) as stream:
        assert not stream.has_begun
        await wire.until(3)
        assert stream.has_begun
        assert wire.sent[:3] == [200, COMMENT, COMMENT]
        await stream.send(b"data: 1\n\n", last=True)
    assert wire.sent.count(200) == 1
    assert wire.sent[-1] == b"data: 1\n\n"


async def test_silence_between_events() -> None:
    wire = Wire()
    async with wire.stream(0.01) as stream:
        await stream.send(b"data: 1\n\n")
        await wire.until(3)
        assert wire.sent[:3] == [200, b"data: 1\n\n", COMMENT]


async def test_no_comment_before_its_time_and_none_when_there_are_to_be_none() -> None:
    for interval in (3600.0, 0.0):
        wire = Wire()
        async with wire.stream(interval) as stream:
            for _ in range(20):
                await stream.send(b"data: 1\n\n")
            await stream.send(b"data: [DONE]\n\n", last=True)
        assert COMMENT not in wire.sent


async def test_a_comment_waits_behind_no_event_and_no_second_comment() -> None:
    """A client that does not read: what is waiting for it is one event, however long it takes."""
    wire = Wire()
    async with wire.stream(0.001) as stream:
        await stream.send(b"data: 1\n\n")
        wire.gate.clear()
        sending = asyncio.create_task(stream.send(b"data: 2\n\n"))
        await asyncio.sleep(0.02)
        before = len(wire.sent)
        tasks = len(asyncio.all_tasks())
        await asyncio.sleep(0.02)
        assert len(wire.sent) == before
        assert len(asyncio.all_tasks()) == tasks
        wire.gate.set()
        await sending
    assert [sent for sent in wire.sent if sent != COMMENT] == [200, b"data: 1\n\n", b"data: 2\n\n"]


async def test_an_event_waits_for_the_comment_that_begins_the_stream() -> None:
    wire = Wire()
    wire.gate.clear()
    async with wire.stream(0.001) as stream:
        await wire.asked.wait()
        sending = asyncio.create_task(stream.send(b"data: 1\n\n", last=True))
        await asyncio.sleep(0)
        wire.gate.set()
        await sending
    assert wire.sent == [200, COMMENT, b"data: 1\n\n"]


async def test_leaving_a_stream_leaves_nothing_behind() -> None:
    wire = Wire()
    wire.gate.clear()
    before = asyncio.all_tasks()
    async with wire.stream(0.001):
        await wire.asked.wait()
    assert asyncio.all_tasks() == before
    wire.gate.set()
    await asyncio.sleep(0.01)
    assert wire.sent == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "ab"}]}),
        ("/v1/completions", {"prompt": "ab"}),
        ("/v1/responses", {"input": "ab"}),
    ],
)
async def test_a_long_prefill_is_not_silent(connect: Connect, path: str, body: dict[str, Any]) -> None:
    client = connect(keep_alive=0.01)
    client.engine.gate.clear()

    def on_part(part: bytes) -> None:
        client.engine.gate.set()

    asked = json.dumps({"model": "tiny", "stream": True, **body}).encode()
    reply = await client.call("POST", path, asked, on_part=on_part)
    assert reply.status == 200
    assert reply.body.startswith(COMMENT)
    assert b": keep-alive" not in reply.body.replace(COMMENT, b"")
    assert b"error" not in reply.body.replace(b'"error":null', b"")


async def test_an_error_after_a_comment_is_an_event(connect: Connect) -> None:
    failed = Output(request_id="", finish_reason="error", error="it is not finite", error_kind="NonFiniteLogitsError")
    client = connect(FakeEngine(lambda request: [failed]), keep_alive=0.01)
    client.engine.gate.clear()
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": true}'
    reply = await client.call("POST", "/v1/chat/completions", body, on_part=lambda part: client.engine.gate.set())
    assert reply.status == 200
    events = reply.body.replace(COMMENT, b"").decode().split("\n\n")
    assert json.loads(events[-2][6:])["error"]["code"] == "nonfinite_logits"
    assert b"[DONE]" not in reply.body


async def test_what_is_refused_at_once_is_an_http_error(connect: Connect) -> None:
    reply = await connect(keep_alive=0.01).chat(stream=True, max_tokens=10**6)
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")


# Slow readers, over a real socket


class TirelessEngine(FakeEngine):
    """Makes tokens at its own pace, whether anybody reads them or not, as the real one does."""

    def __init__(self, script: Callable[[Request], Iterable[Output]]) -> None:
        super().__init__(max_model_len=1 << 20)
        self.tireless = script
        self.made = 0

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        check_request(request, self.info)
        self.requests.append(request)
        inbox = Inbox()
        making = asyncio.create_task(self._make(request, inbox))
        self._update(self.running.add, request.request_id)
        ended = False
        try:
            while not ended:
                output = await inbox.get()
                ended = output.finish_reason is not None
                yield output
        finally:
            making.cancel()
            if not ended:
                self.aborted.append(request.request_id)
            self._update(self.running.discard, request.request_id)

    async def _make(self, request: Request, inbox: Inbox) -> None:
        for output in self.tireless(request):
            await asyncio.sleep(0)
            inbox.put(output)
            self.made += 1
            self._changed.set()


TOKENS = 20_000
LETTERS = [ord("a") + place % 26 for place in range(TOKENS)]


def connect_and_ask(running: Running, **fields: Any) -> socket.socket:
    """-> a connection on which a stream was asked for, with little room in it."""
    running.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", running.port))
    client.settimeout(20)
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True, **fields}
    body = json.dumps(asked).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


def read_all(client: socket.socket) -> bytes:
    parts = []
    while part := client.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def choices_of(reply: bytes) -> list[Any]:
    """The choices of every event of a chunked response."""
    body, rest = b"", reply.partition(b"\r\n\r\n")[2]
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    events = body.decode().removesuffix("\n\n").split("\n\n")
    assert events.pop() == "data: [DONE]"
    return [choice for event in events for choice in json.loads(event[6:])["choices"]]


@pytest.mark.parametrize("n", [1, 2])
async def test_a_slow_reader_gets_larger_events_and_the_engine_does_not_wait(start: Start, n: int) -> None:
    engine = TirelessEngine(lambda request: outputs(LETTERS, finish="length"))
    running = start(engine, shutdown_timeout=20.0)
    await running.until_ready()
    client = await asyncio.to_thread(connect_and_ask, running, n=n)
    with client:
        await engine.until(lambda: engine.made == n * TOKENS)  # all of it, and nobody has read a byte
        choices = choices_of(await asyncio.to_thread(read_all, client))
    for index in range(n):
        mine = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == bytes(LETTERS).decode()
        assert [choice["finish_reason"] for choice in mine[-2:]] == [None, "length"]
    assert len(choices) < TOKENS / 4


async def test_no_log_probability_is_lost_or_told_twice(start: Start) -> None:
    engine = TirelessEngine(lambda request: outputs(LETTERS[:2000], finish="length", logprobs=2))
    running = start(engine)
    await running.until_ready()
    client = await asyncio.to_thread(connect_and_ask, running, logprobs=True, top_logprobs=2)
    with client:
        await engine.until(lambda: engine.made == 2000)
        choices = choices_of(await asyncio.to_thread(read_all, client))
    told = [entry["logprob"] for choice in choices for entry in (choice["logprobs"] or {}).get("content", ())]
    assert told == [fake_logprobs(token, 2).logprob for token in LETTERS[:2000]]
    assert len(choices) < 1000


async def test_a_client_that_reads_nothing_is_dropped(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    engine = TirelessEngine(lambda request: itertools.repeat(outputs([97, 98])[0]))
    running = start(engine, stream_timeout=1.0)
    await running.until_ready()
    client = await asyncio.to_thread(connect_and_ask, running)
    with client:
        await engine.until(lambda: bool(engine.aborted))
        assert not (await asyncio.to_thread(read_all, client)).endswith(b"0\r\n\r\n")
    assert not engine.running
    assert any("reads nothing" in record.message for record in caplog.records)
    _, text = await running.get("/metrics")
    assert b'pronk_slow_clients_dropped_total{model="tiny"} 1.0' in text
    assert b'pronk_requests_total{model="tiny",outcome="client_abort"} 1.0' in text


async def test_a_client_that_reads_nothing_of_a_whole_answer_is_dropped(start: Start) -> None:
    engine = FakeEngine(lambda request: outputs(LETTERS[:2000], finish="length", logprobs=5), max_model_len=1 << 20)
    running = start(engine, stream_timeout=1.0)
    await running.until_ready()
    client = await asyncio.to_thread(connect_and_ask, running, stream=False, logprobs=True, top_logprobs=5)
    with client:
        async with asyncio.timeout(20):
            while b'dropped_total{model="tiny"} 1.0' not in (await running.get("/metrics"))[1]:
                pass
        head, _, body = (await asyncio.to_thread(read_all, client)).partition(b"\r\n\r\n")
    assert len(body) < int(head.lower().split(b"content-length: ")[1].split()[0])


# The watch over a connection, by a clock that the test turns


class Timer:
    def __init__(self, timers: dict[Any, Any]) -> None:
        self.timers = timers

    def cancel(self) -> None:
        self.timers.pop(self, None)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.timers: dict[object, tuple[float, Callable[[], None]]] = {}

    def call_later(self, delay: float, callback: Callable[[], None], /) -> Any:
        timer = Timer(self.timers)
        self.timers[timer] = (self.now + delay, callback)
        return timer

    def turn(self, seconds: float) -> None:
        end = self.now + seconds
        while due := [(when, key) for key, (when, _) in self.timers.items() if when <= end]:
            self.now, key = min(due, key=lambda one: one[0])
            self.timers.pop(key)[1]()
        self.now = end


class Transport:
    def __init__(self, waits: int) -> None:
        self.waits = waits
        self.aborted = False

    def get_write_buffer_size(self) -> int:
        return self.waits

    def abort(self) -> None:
        self.aborted = True


def watch_over(transport: Transport) -> tuple[Watch, Clock, list[bool]]:
    clock, dropped = Clock(), []
    return Watch(clock, transport, 100.0, lambda: dropped.append(True)), clock, dropped


def test_who_reads_nothing_is_dropped_in_time_and_once() -> None:
    transport = Transport(70_000)
    watch, clock, dropped = watch_over(transport)
    watch.start()
    clock.turn(99)
    assert not transport.aborted
    clock.turn(100 / LOOKS)
    assert transport.aborted
    assert dropped == [True]
    assert not clock.timers


def test_who_reads_a_little_now_and_then_stays() -> None:
    transport = Transport(70_000)
    watch, clock, _ = watch_over(transport)
    watch.start()
    for _ in range(50):
        clock.turn(90)
        transport.waits -= 1
    assert not transport.aborted
    transport.waits = 0
    clock.turn(1000)
    assert not transport.aborted
    assert not clock.timers


def test_nobody_is_watched_who_has_read_all_or_is_being_written_to() -> None:
    transport = Transport(0)
    watch, clock, _ = watch_over(transport)
    watch.start()
    assert not clock.timers
    transport.waits = 5
    watch.start()
    watch.start()
    assert len(clock.timers) == 1
    watch.stop()
    clock.turn(1000)
    assert not transport.aborted
