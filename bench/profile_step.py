"""Where the time of a greedy decode step goes: schedule, batch, model, head, commit; then the link and HTTP on top.

    python bench/profile_step.py --model cria

The first five are timed inside one process (`LLM`'s core, step by step). The link is the wall time of the same steps
through `AsyncEngine`, less theirs. HTTP is the processor time of the server's process for a token, less the client's
half of the link.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

# As the engine's own process has it; it must be there before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import psutil
import serve
from models import model_folder

from pronk.engine import core
from pronk.engine.batch import BatchBuilder
from pronk.engine.client import AsyncEngine
from pronk.engine.config import EngineConfig, replace
from pronk.engine.llm import LLM
from pronk.engine.model.llama import Llama
from pronk.engine.request import Request, SamplingParams
from pronk.engine.scheduler import Scheduler
from pronk.kernels.cpu import CpuKernels

STAGES = ("schedule", "batch", "model", "head", "commit", "rest of the step")


def timed(stage: str, call: Callable[..., Any], spent: dict[str, list[float]]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = call(*args, **kwargs)
        spent[stage].append(time.perf_counter() - start)
        return result

    return wrapper


@contextlib.contextmanager
def stages_timed() -> Iterator[dict[str, list[float]]]:
    """Within it, every step adds its stages' seconds to the dictionary that is given."""
    spent: dict[str, list[float]] = defaultdict(list)
    places = [
        (Scheduler, "schedule", "schedule"),
        (BatchBuilder, "fill", "batch"),
        (Llama, "forward", "model"),
        (CpuKernels, "linear_argmax", "head"),
        (Scheduler, "commit", "commit"),
        (core.EngineCore, "step", "step"),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, stage in places:
            wrapped = timed(stage, getattr(owner, name), spent)
            stack.enter_context(mock.patch.object(owner, name, wrapped))
        yield spent


def requests(count: int, tokens: int) -> list[Request]:
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return [
        Request(request_id=str(i), prompt=[(i + place) % 200 for place in range(64)], params=params)
        for i in range(count)
    ]


def inside(llm: LLM, count: int, tokens: int) -> dict[str, float]:
    """-> median milliseconds of each stage over the steps in which all sequences decode."""
    with stages_timed() as spent:
        for request in requests(count, tokens):
            llm.core.add(request)
        while llm.core.has_work:
            llm.core.step()
    steps = len(spent["step"])
    decoding = slice(steps - tokens // 2, steps - 1)
    medians = {stage: statistics.median(values[decoding]) * 1e3 for stage, values in spent.items()}
    medians["rest of the step"] = medians["step"] - sum(medians[stage] for stage in STAGES[:-1])
    return medians


async def through_link(engine: AsyncEngine, count: int, tokens: int) -> tuple[float, float]:
    """-> (median milliseconds from step to step, this process's processor microseconds for a token)."""
    arrivals: list[float] = []
    engine.add_stats_listener(lambda step: arrivals.append(time.perf_counter()))

    async def drain(request: Request) -> None:
        async for _ in engine.generate(request):
            pass

    before = time.process_time()
    await asyncio.gather(*map(drain, requests(count, tokens)))
    cpu = time.process_time() - before
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    return statistics.median(gaps[-tokens // 2 :]) * 1e3, cpu / (count * tokens) * 1e6


def http_cpu(port: int, pid: int, count: int, tokens: int) -> float:
    """-> the server process's processor microseconds for a streamed token."""
    process = psutil.Process(pid)
    before = sum(process.cpu_times()[:2])
    asyncio.run(serve.load(port, "bench", count, 1, 16, tokens))
    return (sum(process.cpu_times()[:2]) - before) / (count * tokens) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cria", help="cria, dummy-1b, or a folder")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, flags = model_folder(asked.model, Path(scratch))
        load_format = "dummy" if "dummy" in flags else "auto"
        config = replace(EngineConfig(model=str(folder), load_format=load_format), memory="512MiB")
        print(f"`python bench/profile_step.py {' '.join(sys.argv[1:])}`, {datetime.date.today()}, {serve.machine()}\n")
        print("Milliseconds of a decode step, medians; HTTP in processor microseconds of the server for a token.\n")
        print(f"| sequences | step | {' | '.join(STAGES)} | link | HTTP, µs/token | client's link, µs/token |")
        print("|---" * (len(STAGES) + 5) + "|")
        rows = [inside_row(config, count, asked.tokens) for count in serve.CONCURRENCY]
        links = asyncio.run(link_rows(config, asked.tokens))
        https = http_rows(folder, flags, asked.tokens)
        for count, medians, (gap, client), http in zip(serve.CONCURRENCY, rows, links, https, strict=True):
            cells = [f"{medians[stage]:.3f}" for stage in ("step", *STAGES)]
            print(f"| {count} | {' | '.join(cells)} | {gap - medians['step']:.3f} | {http:.0f} | {client:.0f} |")


def inside_row(config: EngineConfig, count: int, tokens: int) -> dict[str, float]:
    return inside(LLM(config), count, tokens)


async def link_rows(config: EngineConfig, tokens: int) -> list[tuple[float, float]]:
    rows = []
    for count in serve.CONCURRENCY:
        engine = await AsyncEngine.start(config)
        rows.append(await through_link(engine, count, tokens))
        await engine.close()
    return rows


def http_rows(folder: Path, flags: list[str], tokens: int) -> list[float]:
    port = serve.free_port()
    server = serve.start_server(folder, flags, port)
    try:
        serve.wait_until_ready(server, port)
        asyncio.run(serve.ask(port, "bench", "warm up", 2))
        return [http_cpu(port, server.pid, count, tokens) for count in serve.CONCURRENCY]
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main()
