"""Pronk beside other servers, as the same client sees them, in one run on one machine.

    python bench/checkpoint.py FOLDER
    python bench/peers.py --checkpoint FOLDER --peers bench/peers.toml --repeats 3

The file of peers says how to start each (bench/peers.toml is one, and says where its models come from). Systems take
turns, A B C A B C, so that a machine that changes meanwhile changes for all of them: each is started, measured and
stopped. A cell is the median of the repeats; a ratio is taken inside of a repeat first.

Each prompt is a list of token ids that differs from all others in its first token, so that no cache of prefixes helps
anybody; each system gets the same prompts. "Start to first token" is from the start of the process to the first token
of an answer to 8 tokens, with the files in the page cache. Each system is started twice: what the first start keeps for
later ones, the second finds; Pronk's packed weights are kept in a folder that is new for each repeat. Memory is the
proportional set size of all its processes after the load.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import psutil
from checkpoint import FIRST_SHOWN
from models import NUM_RANKS
from serve import CONCURRENCY, Stream, free_port, machine, quantile, wait_until_ready

FIRST, START, MEMORY = "first start to first token, s", "later start to first token, s", "memory, MiB"
Figures = dict[str, float]


@dataclass(frozen=True)
class System:
    """A server. weights: only systems with the same word here are compared. body: more fields of each request."""

    name: str
    weights: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Load:
    """What each system is asked for."""

    streams: list[int]
    prompts: list[int]
    samples: int
    rounds: int
    prompt: int
    tokens: int


def pronk(folder: Path, flags: str) -> Iterator[System]:
    command = [sys.executable, "-m", "pronk.server.cli", "serve", str(folder), "--port", "{port}", "--max-num-seqs"]
    command += ["32", "--served-model-name", "bench", "--weights-cache", "{scratch}", *flags.split()]
    yield System("Pronk bfloat16", "16 bits", command)
    yield System("Pronk int8", "8 bits", [*command, "--quantization", "int8"])


def read_peers(path: Path) -> list[System]:
    """Variables of the environment are put into commands."""
    peers = [System(**entry) for entry in tomllib.loads(path.read_text())["peer"]]
    for peer in peers:
        peer.command[:] = map(os.path.expandvars, peer.command)
    return peers


# One system


class Prompts:
    """Lists of ids, no two of which begin alike; the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._firsts = iter(self._random.sample(range(FIRST_SHOWN, NUM_RANKS), 10_000))

    def make(self, length: int) -> list[int]:
        return [next(self._firsts), *(self._random.randrange(FIRST_SHOWN, NUM_RANKS) for _ in range(length - 1))]


async def ask(port: int, system: System, prompt: list[int], tokens: int) -> Stream:
    """One streamed completion over a bare socket: the client's own cost should not be measured."""
    fields = {"model": "bench", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    fields |= {"stream": True, "stream_options": {"include_usage": True}} | system.body
    body = json.dumps(fields).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    start = time.perf_counter()
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    arrivals, usage, unread = [], {}, b""
    async for line in reader:
        if not line.startswith(b"data: {"):
            unread = line.strip() or unread
            continue
        now = time.perf_counter()
        chunk = json.loads(line[6:])
        usage = chunk.get("usage") or usage
        if chunk.get("choices") and chunk["choices"][0].get("text"):
            arrivals.append(now)
    writer.close()
    told = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    if told != (len(prompt), tokens) or not arrivals:
        raise RuntimeError(f"{len(prompt)} + {tokens} tokens were asked for, {told} came; last: {unread[:200]!r}")
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    return Stream(arrivals[0] - start, gaps, len(prompt), tokens)


async def first_token(port: int, system: System, prompts: list[list[int]]) -> float:
    """-> milliseconds, the median of the prompts, one after the other."""
    return statistics.median([(await ask(port, system, prompt, 2)).ttft for prompt in prompts]) * 1e3


async def together(port: int, system: System, clients: list[list[list[int]]], tokens: int) -> Figures:
    """clients: of each, the prompts that it sends one after the other."""

    async def client(prompts: list[list[int]]) -> list[Stream]:
        return [await ask(port, system, prompt, tokens) for prompt in prompts]

    start = time.perf_counter()
    streams = [stream for batch in await asyncio.gather(*map(client, clients)) for stream in batch]
    seconds = time.perf_counter() - start
    gaps = sorted(gap for stream in streams for gap in stream.gaps)
    completed = sum(stream.completion_tokens for stream in streams)
    title = f"{len(clients)} stream{'s' * (len(clients) > 1)}"
    return {
        f"{title}: tokens/s": completed / seconds,
        f"{title}: TTFT p50, ms": quantile(sorted(stream.ttft for stream in streams), 0.5),
        f"{title}: ITL p50, ms": quantile(gaps, 0.5),
        f"{title}: ITL p99, ms": quantile(gaps, 0.99),
        f"{title}: tokens a chunk": completed / (len(gaps) + len(streams)),
    }


async def figures(port: int, system: System, load: Load, prompts: Prompts) -> Figures:
    found: Figures = {}
    for length in load.prompts:
        chosen = [prompts.make(length) for _ in range(load.samples)]
        found[f"TTFT of {length} tokens, ms"] = await first_token(port, system, chosen)
    for streams in load.streams:
        clients = [[prompts.make(load.prompt) for _ in range(load.rounds)] for _ in range(streams)]
        found |= await together(port, system, clients, load.tokens)
    return found


def measure(system: System, load: Load, seed: int, log: Path) -> Figures:
    """Start it, ask once, stop it; then start it, ask, stop it. Raises RuntimeError, and what it said is in the log."""
    prompts = Prompts(seed)
    with tempfile.TemporaryDirectory() as scratch, log.open("wb") as said:
        with started(system, prompts, scratch, said) as (_, _, first_seconds):
            found = {FIRST: first_seconds}
        with started(system, prompts, scratch, said) as (server, port, seconds):
            found |= {START: seconds}
            found |= asyncio.run(figures(port, system, load, prompts))
            return found | {MEMORY: memory_of(server)}


@contextlib.contextmanager
def started(
    system: System, prompts: Prompts, scratch: str, said: BinaryIO
) -> Iterator[tuple[subprocess.Popen[bytes], int, float]]:
    """-> a running server, its port, and the seconds until its first token. Raises RuntimeError."""
    port = free_port()
    command = [part.replace("{port}", str(port)).replace("{scratch}", scratch) for part in system.command]
    start = time.perf_counter()
    server = subprocess.Popen(
        command, stdout=said, stderr=said, env={**os.environ, **system.env}, start_new_session=True
    )
    try:
        wait_until_ready(server, port)
        asyncio.run(ask(port, system, prompts.make(8), 1))
        yield server, port, time.perf_counter() - start
    except (SystemExit, OSError) as error:
        raise RuntimeError(str(error)) from error
    finally:
        stop(server)


def memory_of(server: subprocess.Popen[bytes]) -> float:
    """MiB of all its processes; what several hold is counted once."""
    process = psutil.Process(server.pid)
    family = [process, *process.children(recursive=True)]
    return float(sum(member.memory_full_info().pss for member in family)) / 2**20


def stop(server: subprocess.Popen[bytes]) -> None:
    """With all the processes that it started, which share its session."""
    server.send_signal(signal.SIGINT)
    try:
        server.wait(60)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


# All of them


def rows(systems: list[System], runs: dict[str, list[Figures]], cell: Callable[[System, str], str]) -> Iterator[str]:
    """A table: systems from left to right, figures from top to bottom."""
    yield "| |" + "".join(f" {system.name} |" for system in systems)
    yield "|---|" + "---|" * len(systems)
    for name in next(iter(runs.values()))[0]:
        yield f"| {name} |" + "".join(f" {cell(system, name)} |" for system in systems)


def compare(systems: list[System], runs: dict[str, list[Figures]]) -> Iterator[str]:
    ours = {system.weights: system for system in systems if system.name.startswith("Pronk")}
    peers = [system for system in systems if system.weights in ours and system is not ours[system.weights]]

    def middle(system: System, name: str) -> str:
        value = statistics.median(run[name] for run in runs[system.name])
        return f"{value:.2f}" if value < 100 else f"{value:.0f}"

    def ratio(peer: System, name: str) -> str:
        pairs = zip(runs[ours[peer.weights].name], runs[peer.name], strict=True)
        more = "tokens/s" in name
        times = sorted(mine[name] / its[name] if more else its[name] / mine[name] for mine, its in pairs)
        return f"{statistics.median(times):.2f} ({times[0]:.2f} to {times[-1]:.2f})"

    yield from rows(systems, runs, middle)
    if peers:
        yield "\nHow many times as fast, or as small, Pronk is with weights of as many bits: median (range)."
        yield "Below 1 the peer is ahead.\n"
        yield from rows(peers, {name: [_without_chunks(run) for run in of] for name, of in runs.items()}, ratio)


def _without_chunks(run: Figures) -> Figures:
    return {name: value for name, value in run.items() if "a chunk" not in name}


def take_turns(systems: list[System], load: Load, repeats: int, logs: Path) -> dict[str, list[Figures]]:
    """-> name -> the figures of each repeat. A system that fails once is left out from then on."""
    runs: dict[str, list[Figures]] = {system.name: [] for system in systems}
    for repeat in range(repeats):
        for system in systems:
            if system.name not in runs:
                continue
            log = logs / f"{system.name.replace(' ', '-')}-{repeat}.log"
            try:
                runs[system.name].append(measure(system, load, repeat, log))
                print(json.dumps({"system": system.name, **runs[system.name][-1]}), file=sys.stderr, flush=True)
            except RuntimeError as error:
                del runs[system.name]
                print(f"{system.name} failed: {error}\n{log.read_text()[-2000:]}", file=sys.stderr, flush=True)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="what Pronk serves: see bench/checkpoint.py")
    parser.add_argument("--peers", type=Path, help="a TOML file of the others")
    parser.add_argument("--only", action="append", help="systems whose name has this in it; may be repeated")
    parser.add_argument("--flags", default="", help="more flags for pronk serve, in one string")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=list(CONCURRENCY))
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 1024], help="lengths whose TTFT is taken")
    parser.add_argument("--samples", type=int, default=5, help="prompts of each length")
    parser.add_argument("--rounds", type=int, default=2, help="requests of each stream, one after the other")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a stream's prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a stream's answer")
    asked = parser.parse_args()
    load = Load(asked.streams, asked.prompts, asked.samples, asked.rounds, asked.prompt, asked.tokens)
    systems = [*pronk(asked.checkpoint, asked.flags), *(read_peers(asked.peers) if asked.peers else [])]
    systems = [each for each in systems if not asked.only or any(part in each.name for part in asked.only)]
    with tempfile.TemporaryDirectory() as logs:
        runs = take_turns(systems, load, asked.repeats, Path(logs))
    systems = [system for system in systems if system.name in runs]
    print(
        f"`python bench/peers.py`, {datetime.date.today()}, {machine()}; {asked.repeats} repeats; streams of", end=" "
    )
    print(f"{load.prompt} + {load.tokens} tokens, {load.rounds} each\n")
    if systems:
        print("\n".join(compare(systems, runs)))
    for system in systems:
        if system.note:
            print(f"\n- {system.name}: {system.note}", end="")
    print()


if __name__ == "__main__":
    main()
