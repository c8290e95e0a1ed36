"""What ranks do together, timed and looked at: sums, and a model that they share, over NCCL on GPUs, or over gloo in a
dry run. Two processes.

    python bench/gpu_ranks.py RANK SIZE PORT cuda|dry

is one of them; `ranks` starts all and hands on what rank 0 says. On GPUs the sums are captured in a graph, as in the
engine's steps: their first run makes NCCL's communicator, which could not be made during a capture, and `wait` of an
operation of NCCL holds up the stream and not the host, so a capture takes it as one more edge of the graph.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import gpu_device
import gpu_inputs
import torch
from gpu_checks import Check
from torch import Tensor

from pronk.engine.company import SeveralHosts
from pronk.engine.parallel import ALONE, Collectives, Ranks, join
from pronk.engine.torchrun import Position
from pronk.kernels.interface import LayerCache

SIZE = 2
SECONDS = 120.0
ROWS = (1, 8, 64, 256, 4096)
"""Of hidden states, in steps of so many tokens."""
WIDTH = 2048
BATCHES = (1, 32, 256)
CONTEXT = 1024
REPEATS = 200
ACROSS_DEGREES = 0.03
"""Of the largest logit: how far bfloat16 may take one number of ranks from another in two layers."""


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
    if dry:
        from pronk.kernels import interpreter

        interpreter.install()
    from pronk.kernels import gpu

    for found in itertools.chain(_sums(group, device, dry=dry), _model(gpu, group, device, dry=dry)):
        if rank == 0:
            print(json.dumps(found))
    group.meet()


def do_nothing() -> None:
    pass


def _sums(group: Ranks, device: Any, *, dry: bool) -> Iterator[dict[str, Any]]:
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
        yield {"row": [f"sum of {rows} rows over {group.size} ranks", _seconds(replay, device)]}


def _seconds(replay: Callable[[], object], device: Any) -> float:
    """As often on every rank, whatever each measures: what they do together is one operation of them all."""
    repeats = 1 if device.is_dry else REPEATS
    device.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        replay()
    device.synchronize()
    return (time.perf_counter() - begin) / repeats


def _model(gpu: Any, group: Ranks, device: Any, *, dry: bool) -> Iterator[dict[str, Any]]:
    """Steps of a 1B that the ranks share: against one rank's, promise 1, graphs, and how long they take."""
    whole = gpu_inputs.config("1B", dry=dry)
    few = dataclasses.replace(whole, num_hidden_layers=1 if dry else 2)
    batch = 3 if dry else 64
    context = 40 if dry else CONTEXT
    with torch.inference_mode():
        shared = _Steps(gpu, few, device, group, batch, context)
        logits = shared.run(batch)
        together = group.all_gather(logits)  # padded alike on all ranks: 1B's vocabulary divides by 128
        alone = _Steps(gpu, few, device, ALONE, batch, context).run(batch)
        joined = together.transpose(0, 1).flatten(1)
        error = float((joined - alone).abs().max() / alone.abs().max())
        yield {
            "check": [f"logits of {group.size} ranks as of one", error < ACROSS_DEGREES, f"{error:.4f} of the largest"]
        }
        yield {"check": [f"a sequence alone as among {batch}", torch.equal(shared.run(1), logits[:1]), "bit for bit"]}
        chosen = shared.choose(batch).clone()
        replay = device.graph(lambda steps=shared, batch=batch: steps.choose(batch))
        shared.rewind()
        replay()
        device.synchronize()
        same = torch.equal(shared.tokens, chosen)
        yield {"check": [f"tokens of a captured step over {group.size} ranks", same, "as launched one by one"]}
        yield {"check": ["the ranks choose alike", bool((group.all_gather(chosen) == chosen).all()), f"{batch} tokens"]}
        del shared
        model = None
        for batch in (2,) if dry else BATCHES:
            steps = _Steps(gpu, whole, device, group, batch, context, model=model)
            model = steps.model
            replay = device.graph(lambda steps=steps, batch=batch: steps.choose(batch))
            name = f"1B over {group.size} ranks, batch {batch}, context {context}"
            yield {"row": [name, _seconds(replay, device)]}


class _Steps:
    """Decode steps of one token for each of up to `batch` sequences, which have `context` tokens each."""

    def __init__(
        self, gpu: Any, llama: Any, device: Any, tp: Collectives, batch: int, context: int, *, model: Any = None
    ) -> None:
        where = device.where if device.is_dry else torch.device("cuda", torch.cuda.current_device())
        self.model = model or gpu_inputs.random_model(gpu, llama, where, "plain", num_positions=context, tp=tp)
        self.tokens = torch.arange(batch, device=where)  # what the next step reads
        ends = [context] * batch
        tables, num_blocks = gpu_inputs.block_tables(ends)
        self._steps = {
            count: gpu_inputs.step([1] * count, ends[:count], where, tables=tables[:count])[0] for count in {1, batch}
        }
        # The keys and values of a whole model: a rank takes those of its own heads.
        source = torch.Generator(where).manual_seed(1)
        shape = (2, num_blocks, llama.num_key_value_heads, gpu_inputs.BLOCK_SIZE, llama.head_dim)
        kv = torch.randn(shape, device=where, dtype=torch.bfloat16, generator=source)
        split = self.model.split
        own = slice(split.first_kv_head, split.first_kv_head + split.config.num_key_value_heads)
        layers = [LayerCache(*(half.contiguous().clone() for half in kv[:, :, own])) for _ in self.model.layers]
        self._cache: Any = SimpleNamespace(layers=layers)

    def rewind(self) -> None:
        """To the tokens of the first step."""
        self.tokens.copy_(torch.arange(len(self.tokens)))

    def run(self, count: int) -> Tensor:
        """-> logits of the first sequences: this rank's columns of them."""
        return self.model.logits(self._hidden(count))

    def choose(self, count: int) -> Tensor:
        """-> the most likely tokens, which the next step reads."""
        chosen = self.model.head.largest(self._hidden(count))
        self.tokens[:count] = chosen.clamp(min=0)
        return chosen

    def _hidden(self, count: int) -> Tensor:
        return self.model.forward(self.tokens[:count], self._steps[count], self._cache)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), dry=sys.argv[4] == "dry")
