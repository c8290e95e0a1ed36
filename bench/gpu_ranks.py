"""What ranks do together, timed and looked at: sums over NCCL on GPUs, or over gloo in a dry run. Two processes.

    python bench/gpu_ranks.py RANK SIZE PORT cuda|dry

is one of them; `ranks` starts all and hands on what rank 0 says. On GPUs the sums are captured in a graph, as in the
engine's steps: their first run makes NCCL's communicator, which could not be made during a capture, and `wait` of an
operation of NCCL holds up the stream and not the host, so a capture takes it as one more edge of the graph.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import gpu_device
import torch
from gpu_checks import Check

from pronk.engine.company import SeveralHosts
from pronk.engine.parallel import ALONE, Ranks, join
from pronk.engine.torchrun import Position

SIZE = 2
SECONDS = 120.0
ROWS = (1, 8, 64, 256, 4096)
"""Of hidden states, in steps of so many tokens."""
WIDTH = 2048


def alone(gpu: Any, where: torch.device, seed: int, *, dry: bool) -> Iterator[Check]:
    """One rank adds nothing to a step: a sum is its own argument, and costs the host less than a microsecond."""
    del gpu, seed
    x = torch.zeros(1, WIDTH, device=where)
    count = 1000
    begin = time.perf_counter()
    for _ in range(count):
        same = ALONE.all_reduce(x) is x
    microseconds = (time.perf_counter() - begin) / count * 1e6
    yield ("one rank sums nothing", same and (dry or microseconds < 1), f"{microseconds:.2f} µs of the host")


def ranks(*, dry: bool) -> Iterator[dict[str, Any]]:
    """-> what rank 0 found: {"check": [name, holds, figure]} or {"row": [name, seconds]}; nothing where there
    are fewer GPUs than ranks. Raises RuntimeError when a rank fails."""
    if not dry and torch.cuda.device_count() < SIZE:
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(SIZE), str(port), "dry" if dry else "cuda"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(SIZE)
    ]
    try:
        said = [process.communicate(timeout=2 * SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(process.returncode for process in processes):
        raise RuntimeError("a rank failed: its own words are above")
    yield from (json.loads(line) for line in said[0].splitlines() if line.startswith("{"))  # NCCL may speak as well


def main(rank: int, size: int, port: int, *, dry: bool) -> None:
    where = torch.device("cpu") if dry else torch.device("cuda", rank)
    if not dry:
        torch.cuda.set_device(where)
    position = Position(rank=rank, size=size, neighbours=size, host="127.0.0.1", port=port, has_store=False)
    company = SeveralHosts(position, SECONDS)  # keeps the store to the end
    place = company.place(step_timeout=SECONDS, start_timeout=SECONDS)
    group = join(place, where, beat=do_nothing, on_begin=do_nothing)
    device: Any = gpu_device.Dry() if dry else gpu_device.Cuda()
    for found in _found(group, device, dry=dry):
        if rank == 0:
            print(json.dumps(found))
    group.meet()


def do_nothing() -> None:
    pass


def _found(group: Ranks, device: Any, *, dry: bool) -> Iterator[dict[str, Any]]:
    repeats = 1 if dry else 200
    generator = torch.Generator().manual_seed(group.rank)
    for rows in ROWS[:3] if dry else ROWS:
        x = torch.randn(rows, WIDTH, generator=generator).to(torch.bfloat16).to(device.where if dry else "cuda")
        eager = group.all_reduce(x)
        kept: list[torch.Tensor] = []

        def run(x: torch.Tensor = x, kept: list[torch.Tensor] = kept) -> None:
            kept[:] = [group.all_reduce(x)]

        replay = device.graph(run)
        replay()
        device.synchronize()
        same = bool(kept) and torch.equal(kept[0], eager)
        yield {"check": [f"captured sum of {rows} rows over {group.size} ranks", same, "as launched one by one"]}
        first = group.all_reduce(x[:1].contiguous())
        yield {"check": [f"a row alone and among {rows}", torch.equal(first, eager[:1]), "bit for bit"]}
        # As often on every rank, whatever each measures: a sum is one operation of them all.
        begin = time.perf_counter()
        for _ in range(repeats):
            replay()
        device.synchronize()
        seconds = (time.perf_counter() - begin) / repeats
        yield {"row": [f"sum of {rows} rows over {group.size} ranks", seconds]}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), dry=sys.argv[4] == "dry")
