"""What a streamed token costs the server's process: microseconds of its processor time.

    python bench/frontend.py                 an engine that only pretends: nothing but the front end runs
    python bench/frontend.py --model cria    the whole server with a model

Streams are read over bare sockets by this process; the server is another, the engine a third. Each figure is a slope:
the processor time of long answers less that of short ones, by the tokens between them, so that what a request costs
once (connection, JSON, template) is told apart. The least of several rounds stands: on a busy machine everything else
is somebody else's.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import functools
import json
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import serve
from models import model_folder

from pronk.engine import wire
from pronk.engine.client import AsyncEngine
from pronk.engine.config import EngineConfig
from pronk.engine.group import forked
from pronk.engine.host import Host, no_orders
from pronk.engine.host_process import HostProcess
from pronk.engine.request import Output, Request, Timing, TokenLogprobs
from pronk.engine.seat import Seat
from pronk.server.config import ServerConfig
from pronk.server.lifecycle import Server, bind
from pronk.server.loading import read_text_side
from pronk.server.service import ServedModel

STREAMS = (32, 128)
SHORT = 16
TEXT = b" a llama hums and walks on"
"""What the pretended engine says: bytes that are tokens of every vocabulary of this kind."""


# The engine that pretends


INFO = wire.EngineInfo(
    folder="pretended", num_parameters=0, dtype="none", device="none", kernels="none", weights_bytes=0,
    kv_cache_bytes=0, num_blocks=1, block_size=16, max_model_len=1 << 17, max_num_seqs=1024,
    max_num_batched_tokens=1024, vocab_size=1 << 17, eos_token_ids=[], load_seconds=0.0, ranks=[],
)  # fmt: skip


def pretend(descriptor: int, step_seconds: float) -> None:
    """A host whose rank has no model."""
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    rank = functools.partial(pretended_rank, step_seconds)
    Host(connection, no_orders, lambda leave: forked(rank, leave), is_watched=False).run()


def pretended_rank(step_seconds: float, seat: Seat) -> int:
    """Rank 0: every step_seconds, one token for each request, out of TEXT."""
    link = seat.link
    frames = wire.Frames(wire.ToEngine)
    running: dict[str, tuple[Request, int]] = {}
    due = time.monotonic()
    while True:
        wait = max(0.0, due - time.monotonic()) if running else None
        if select.select([link], [], [], wait)[0]:
            data = link.recv(1 << 20)
            if not data:
                return 0
            for message in frames.feed(data):
                if isinstance(message, wire.Start):
                    link.sendall(wire.encode(INFO))
                elif isinstance(message, wire.Add):
                    running[message.request.request_id] = (message.request, 0)
                elif isinstance(message, wire.Abort):
                    for request_id in message.request_ids:
                        running.pop(request_id, None)
                elif isinstance(message, wire.Shutdown):
                    return 0
        if running and time.monotonic() >= due:
            due = max(due + step_seconds, time.monotonic())
            link.sendall(wire.encode(wire.Step(pretended_outputs(running), wire.EngineStats(len(running)))))


def pretended_outputs(running: dict[str, tuple[Request, int]]) -> list[Output]:
    outputs = []
    for request_id, (request, place) in list(running.items()):
        last = place + 1 == request.params.max_tokens
        running[request_id] = (request, place + 1)
        if last:
            del running[request_id]
        top = request.params.logprobs
        outputs.append(
            Output(
                request_id=request_id,
                token_ids=[TEXT[place % len(TEXT)]],
                logprobs=None if top is None else [TokenLogprobs(-0.5, list(range(top)), [-0.5] * top)],
                finish_reason="length" if last else None,
                timing=Timing(0.0, 0.0, 0.0) if last else None,
            )
        )
    return outputs


async def pretended_model(step_seconds: float) -> ServedModel:
    folder, _ = model_folder("cria", Path())
    tokenizer, template, defaults = read_text_side(folder)
    program = (__file__, "--step-ms", str(step_seconds * 1e3), "--pretend")
    engine = await AsyncEngine.start(EngineConfig(), spawn=lambda: HostProcess.spawn(program))
    return ServedModel(engine, tokenizer, template, defaults, check_grammar=lambda grammar: None)


def serve_pretended(port: int, step_seconds: float) -> None:
    """The server's process, with everything of the real one but the engine behind it."""
    import uvloop

    async def load(config: EngineConfig, on_progress: object) -> ServedModel:
        return await pretended_model(step_seconds)

    config = ServerConfig(port=port, served_model_names=("bench",), log_level="warning")
    with bind(config.host, port) as listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(Server(config, listener, load=load).run())


# The measurement


@dataclass(frozen=True)
class Load:
    """Streams, all at once, were read to their end."""

    cpu: float
    """Seconds of the server's process."""
    seconds: float
    events: int


async def stream(port: int, number: int, tokens: int, fields: dict[str, object]) -> int:
    """-> how many events came."""
    body = json.dumps(
        {
            "model": "bench",
            "messages": [{"role": "user", "content": f"Tell me about llama number {number}."}],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            **fields,
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
    text = bytearray()
    while data := await reader.read(1 << 16):
        text += data
    writer.close()
    if not text.startswith(b"HTTP/1.1 200") or b"data: [DONE]" not in text:
        raise RuntimeError(f"not a whole stream: {bytes(text[:300])!r}")
    return text.count(b"data: {")


async def load(port: int, pid: int, streams: int, tokens: int, fields: dict[str, object]) -> Load:
    before, start = cpu_seconds(pid), time.perf_counter()
    events = await asyncio.gather(*(stream(port, number, tokens, fields) for number in range(streams)))
    return Load(cpu_seconds(pid) - before, time.perf_counter() - start, sum(events))


def cpu_seconds(pid: int) -> float:
    """Processor time of a process's threads that live, to the nanosecond."""
    spent = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        spent += int((task / "schedstat").read_text().split()[0])
    return spent / 1e9


def rows(port: int, pid: int, asked: argparse.Namespace) -> None:
    fields = json.loads(asked.fields)
    long = SHORT + asked.tokens
    print("| streams | tokens/s | events a token | server, µs a token | µs a request, once |")
    print("|---|---|---|---|---|", flush=True)
    asyncio.run(load(port, pid, 4, SHORT, fields))
    for streams in STREAMS:
        slopes, once, rates, events = [], [], [], 0.0
        for _ in range(asked.rounds):
            short = asyncio.run(load(port, pid, streams, SHORT, fields))
            full = asyncio.run(load(port, pid, streams, long, fields))
            slopes.append((full.cpu - short.cpu) / (streams * asked.tokens) * 1e6)
            once.append(short.cpu / streams * 1e6 - SHORT * slopes[-1])
            rates.append(streams * long / full.seconds)
            events = (full.events - short.events) / (streams * asked.tokens)
        print(f"| {streams} | {max(rates):.0f} | {events:.2f} | {min(slopes):.1f} | {min(once):.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="cria, dummy-1b, or a folder; none: an engine that pretends")
    parser.add_argument("--tokens", type=int, default=200, help="tokens between a short answer and a long one")
    parser.add_argument("--step-ms", type=float, default=20.0, help="milliseconds of a pretended step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fields", default="{}", help="more fields of the request, as JSON")
    parser.add_argument("--pretend", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.pretend is not None:
        return pretend(asked.pretend, asked.step_ms / 1e3)
    if asked.serve is not None:
        return serve_pretended(asked.serve, asked.step_ms / 1e3)
    with tempfile.TemporaryDirectory() as scratch:
        port = serve.free_port()
        if asked.model is None:
            command = [sys.executable, __file__, "--serve", str(port), "--step-ms", str(asked.step_ms)]
            server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        else:
            folder, flags = model_folder(asked.model, Path(scratch))
            flags += ["--max-num-seqs", str(max(STREAMS)), "--log-level", "warning"]
            server = serve.start_server(folder, flags, port)
        try:
            serve.wait_until_ready(server, port)
            print(f"`python bench/frontend.py {' '.join(sys.argv[1:])}`, {datetime.date.today()}, {serve.machine()}\n")
            rows(port, server.pid, asked)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)


if __name__ == "__main__":
    main()
