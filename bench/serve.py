"""The whole server over HTTP, as a client sees it: TTFT, ITL and tokens per second by concurrency.

    python bench/serve.py --model cria
    python bench/serve.py --model dummy-1b --words 24 --tokens 32

Starts `pronk serve` on a free port, sends streams from this process, prints a Markdown table, and stops it. Each
request has a prompt of its own, so that no prefix is shared but the template's.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import itertools
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil
from models import model_folder

CONCURRENCY = (1, 8, 32)


@dataclass(frozen=True)
class Stream:
    """One request, as its client saw it. Seconds."""

    ttft: float
    gaps: list[float]
    prompt_tokens: int
    completion_tokens: int


async def ask(port: int, model: str, prompt: str, tokens: int) -> Stream:
    """One streamed chat completion over a bare socket: the client's own cost should not be measured."""
    body = json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    start = time.perf_counter()
    writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
    arrivals, usage = [], {}
    async for line in reader:
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            usage = chunk.get("usage") or usage
            if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                arrivals.append(time.perf_counter())
    writer.close()
    if not usage or not arrivals:
        raise RuntimeError("the stream ended without an answer")
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    return Stream(arrivals[0] - start, gaps, usage["prompt_tokens"], usage["completion_tokens"])


async def load(port: int, model: str, concurrency: int, rounds: int, words: int, tokens: int) -> str:
    """-> a row of the table: `concurrency` clients, each with `rounds` requests one after the other."""

    async def client(number: int) -> list[Stream]:
        streams = []
        for turn in range(rounds):
            prompt = " ".join(f"{number}x{turn}y{word}" for word in range(words))
            streams.append(await ask(port, model, prompt, tokens))
        return streams

    start = time.perf_counter()
    streams = [stream for batch in await asyncio.gather(*map(client, range(concurrency))) for stream in batch]
    seconds = time.perf_counter() - start
    ttfts = sorted(stream.ttft for stream in streams)
    gaps = sorted(gap for stream in streams for gap in stream.gaps)
    completed = sum(stream.completion_tokens for stream in streams)
    prompt = statistics.median(stream.prompt_tokens for stream in streams)
    return (
        f"| {concurrency} | {prompt:.0f} + {tokens} | {quantile(ttfts, 0.5):.1f} | {quantile(ttfts, 0.99):.1f} "
        f"| {quantile(gaps, 0.5):.2f} | {quantile(gaps, 0.99):.2f} | {completed / seconds:.1f} |"
    )


def quantile(values: list[float], share: float) -> float:
    """values in rising order, seconds -> milliseconds."""
    return values[min(len(values) - 1, int(share * len(values)))] * 1e3


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(folder: Path, flags: list[str], port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pronk.server.cli", "serve", str(folder), "--port", str(port)]
    command += ["--served-model-name", "bench", "--max-num-seqs", "32", *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except OSError:
            time.sleep(0.02)
    raise SystemExit(f"the server ended with exit code {server.returncode}")


def machine() -> str:
    """What it ran on, in one line."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    memory = psutil.virtual_memory().total / 2**30
    return f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}"


def memory_of(server: subprocess.Popen[bytes]) -> str:
    """Resident memory of the server's process, and of the engine's together: what they share is counted once."""
    process = psutil.Process(server.pid)
    infos = [child.memory_full_info() for child in process.children(recursive=True)]
    engine = sum(getattr(info, "pss", info.rss) for info in infos)  # only Linux says what is shared
    return f"{process.memory_info().rss / 2**20:.0f} MiB and {engine / 2**20:.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cria", help="cria, dummy-1b, or a folder")
    parser.add_argument("--words", type=int, default=16, help="words of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3, help="requests of each client, one after the other")
    parser.add_argument("--flags", default="", help="more flags for pronk serve, in one string")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, flags = model_folder(asked.model, Path(scratch))
        port = free_port()
        start = time.perf_counter()
        server = start_server(folder, flags + asked.flags.split(), port)
        try:
            wait_until_ready(server, port)
            ready = time.perf_counter() - start
            asyncio.run(ask(port, "bench", "warm up", 2))
            first = time.perf_counter() - start
            print(f"`python bench/serve.py {' '.join(sys.argv[1:])}`, {datetime.date.today()}, {machine()}\n")
            print("| streams | prompt + answer, tokens | TTFT p50, ms | p99 | ITL p50, ms | p99 | tokens/s |")
            print("|---|---|---|---|---|---|---|")
            for concurrency in CONCURRENCY:
                print(
                    asyncio.run(load(port, "bench", concurrency, asked.rounds, asked.words, asked.tokens)), flush=True
                )
            print(
                f"\nReady after {ready:.1f} s, first answer after {first:.1f} s. Memory of server and engine: ", end=""
            )
            print(memory_of(server))
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)


if __name__ == "__main__":
    main()
