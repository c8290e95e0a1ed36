"""The CPU kernels: how near do they come to what this machine can do?

    python bench/cpu.py [--threads N] [--only PART ...] [--model 1B] [--out FILE]

Ceilings come first, measured by the same threads in the same run: what they read from memory, and what they multiply
without leaving their registers. Then each operation at the shapes of the released models, with the bytes it must move
and the products it must make; then whole steps of a model with random weights. Medians; a machine that does other
things meanwhile shows it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import gpu_inputs
import numpy as np
import torch
from llvmlite import ir
from torch import Tensor

from pronk.kernels import cases
from pronk.kernels.cpu import CpuKernels
from pronk.kernels.cpu.cores import default_threads
from pronk.kernels.cpu.instructions import (
    configure_tiles,
    multiply_tiles,
    of_this_machine,
    release_tiles,
    tile_config,
    zero_tile,
)
from pronk.kernels.interface import LayerCache
from pronk.kernels.jit.compiler import load
from pronk.kernels.jit.emit import F32, I64, Function, vector
from pronk.kernels.jit.threads import Team, Work

CPU = torch.device("cpu")
BFLOAT16 = torch.bfloat16
PIECE = 1 << 20
"""Bytes that a thread reads at a time."""
CHAINS = 12
TURNS = 1 << 14


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    group: str
    name: str
    seconds: float
    nbytes: float = 0.0
    flops: float = 0.0
    tokens: float = 0.0
    on_tiles: bool = False


def median(call: Callable[[], object], at_least: float = 0.2) -> float:
    """Seconds of one call, after one to warm up."""
    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < at_least and len(times) < 50):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# Ceilings


def write_ceilings() -> ir.Module:
    module = ir.Module("ceilings")
    floats = vector(F32, 16)
    with Function(module, "read", ["arguments", "first", "last"]) as f:
        start = f.load(f.argument("arguments"), I64)
        out = f.stack(64)
        with f.loop(f.argument("first"), f.argument("last")) as piece:
            sums = [f.variable(f.value(0.0, floats)) for _ in range(8)]
            with f.loop(0, PIECE, 64 * len(sums)) as place:
                for number, total in enumerate(sums):
                    total.set(total.get() + f.load(start + piece * PIECE + place + 64 * number, floats))
            for total in sums:
                f.store(total.get() + f.load(out, floats), out)
        f.store(f.load(out, floats), f.load(f.argument("arguments") + 8, I64))
    with Function(module, "multiply", ["arguments", "first", "last"]) as f:
        factor = f.load(f.load(f.argument("arguments"), I64), floats)
        with f.loop(f.argument("first"), f.argument("last")):
            chains = [f.variable(factor) for _ in range(CHAINS)]
            with f.loop(0, TURNS):
                for chain in chains:
                    chain.set(f.fma(chain.get(), factor, factor))
            for chain in chains:
                f.store(chain.get(), f.load(f.argument("arguments") + 8, I64))
    if of_this_machine().tiles:
        for name, integers in (("tiles", False), ("integer_tiles", True)):
            with Function(module, name, ["arguments", "first", "last"]) as f:
                configure_tiles(f, f.load(f.argument("arguments"), I64))
                for tile in range(8):
                    zero_tile(f, tile)
                with f.loop(f.argument("first"), f.argument("last")), f.loop(0, TURNS):
                    for into in range(4):
                        multiply_tiles(f, into, 4 + into // 2, 6 + into % 2, integers=integers)
                release_tiles(f)
    return module


def ceilings(team: Team) -> dict[str, float]:
    """Bytes read a second, and operations (two a product) a second."""
    library = load("ceilings", [Path(__file__)], "", write_ceilings)
    data = np.ones((1 << 30) // 4, np.float32)
    out = np.zeros(16, np.float32)

    def rate(name: str, arguments: list[int], items: int, amount: float) -> float:
        return amount / median(lambda: team.run(library.address(name), arguments, Work(items, 1e6)))

    found = {
        "read": rate("read", [data.ctypes.data, out.ctypes.data], data.nbytes // PIECE, data.nbytes),
        "float32": rate("multiply", [data.ctypes.data, out.ctypes.data], 64, 64.0 * TURNS * CHAINS * 16 * 2),
    }
    if of_this_machine().tiles:
        config = np.frombuffer(tile_config([16] * 8), np.uint8).copy()
        for name, products in (("tiles", 16 * 16 * 32), ("integer_tiles", 16 * 16 * 64)):
            found[name] = rate(name, [config.ctypes.data], 64, 64.0 * TURNS * 4 * products * 2)
    return found


# Operations


def shapes(name: str) -> Iterator[tuple[str, int, int]]:
    """-> layer, outputs, inputs."""
    llama = gpu_inputs.config(name, dry=False)
    hidden, width = llama.hidden_size, llama.intermediate_size
    attended = llama.num_attention_heads * llama.head_dim
    yield "qkv", attended + 2 * llama.num_key_value_heads * llama.head_dim, hidden
    yield "o", hidden, attended
    yield "gate_up", 2 * width, hidden
    yield "down", hidden, width
    yield "head", llama.vocab_size, hidden


def products(kernels: CpuKernels, name: str) -> Iterator[Row]:
    tiles = of_this_machine().tiles
    for layer, outputs, inputs in shapes(name):
        weight = torch.randn(outputs, inputs).mul_(0.02).to(BFLOAT16)
        for format in ("plain", "int8"):
            packed = kernels.pack(weight, format)  # type: ignore[arg-type]
            for rows in (1, 8, 32, 256):
                x = torch.randn(rows, inputs).to(BFLOAT16)
                seconds = median(lambda x=x, packed=packed: kernels.linear(x, packed), 0.1)
                moved = packed.nbytes + rows * (inputs + outputs) * 2
                flops = 2.0 * rows * inputs * outputs
                yield Row("product", f"{name} {layer} {format}, {rows} rows", seconds, moved, flops, on_tiles=tiles)


def attention(kernels: CpuKernels, name: str) -> Iterator[Row]:
    llama = gpu_inputs.config(name, dry=False)
    cases_of = [([1], [1024]), ([1], [8192]), ([1] * 8, [1024] * 8), ([1] * 32, [256] * 32)]
    cases_of += [([256], [256]), ([256], [1024]), ([256], [8192])]
    for lens, contexts in cases_of:
        step, num_blocks = gpu_inputs.step(lens, contexts, CPU)
        cache = gpu_inputs.cache(llama, num_blocks, CPU, dtype=BFLOAT16)
        heads, head_dim = llama.num_attention_heads, llama.head_dim
        q = torch.randn(sum(lens), heads, head_dim).to(BFLOAT16)
        plan = kernels.plan_attention(step.queries, num_heads=heads, cache=cache)
        seconds = median(lambda q=q, cache=cache, plan=plan: kernels.attention(q, cache, plan), 0.1)
        seen = sum((context - n) * n + n * (n + 1) / 2 for n, context in zip(lens, contexts, strict=True))
        flops = 4.0 * seen * heads * head_dim
        moved = 4.0 * sum(contexts) * llama.num_key_value_heads * head_dim
        yield Row("attention", f"{name} {len(lens)} of {lens[0]}, context {contexts[0]}", seconds, moved, flops)


def rows_of_a_step(kernels: CpuKernels, name: str) -> Iterator[Row]:
    """What goes through each row by itself."""
    llama = gpu_inputs.config(name, dry=False)
    hidden, width = llama.hidden_size, llama.intermediate_size
    for rows in (1, 32, 256):
        x, residual = (torch.randn(rows, hidden).to(BFLOAT16) for _ in range(2))
        weight, gate_up = torch.ones(hidden, dtype=BFLOAT16), torch.randn(rows, 2 * width).to(BFLOAT16)
        seconds = median(lambda x=x, r=residual, w=weight: kernels.add_rms_norm(x, r, w, 1e-5), 0.05)
        yield Row("rows", f"{name} add_rms_norm, {rows}", seconds, rows * hidden * 8)
        seconds = median(lambda gate_up=gate_up: kernels.silu_mul(gate_up), 0.05)
        yield Row("rows", f"{name} silu_mul, {rows}", seconds, rows * width * 6)
        inputs = cases.rope_inputs(
            cases.RopeCase("", cases.Heads(llama.head_dim, 8, llama.num_attention_heads // 8), 16, rows), BFLOAT16, 1
        )
        cache = LayerCache(*(torch.zeros(inputs.cache_shape, dtype=BFLOAT16) for _ in range(2)))
        arguments = (inputs.qkv, inputs.positions, inputs.cos_sin, inputs.slots, cache)
        seconds = median(lambda arguments=arguments: kernels.rope_and_cache(*arguments), 0.05)
        yield Row("rows", f"{name} rope_and_cache, {rows}", seconds, inputs.qkv.nbytes * 2)


def sampler(kernels: CpuKernels, name: str) -> Iterator[Row]:
    vocabulary = gpu_inputs.config(name, dry=False).vocab_size
    for rows in (1, 32):
        logits = cases.language_like(rows, vocabulary, 1)
        for parameters in cases.SAMPLING[:5]:
            batch = cases.sampling_batch(rows, **parameters)  # type: ignore[arg-type]
            seconds = median(lambda logits=logits, batch=batch: kernels.sample(logits, batch), 0.05)
            yield Row("sampler", f"{parameters}, {rows}", seconds, rows * vocabulary * 2)


# Whole steps, as the engine runs them: recorded, or with their launches gathered

CHUNK = 128
"""Tokens of a prompt in a step."""


def steps(kernels: CpuKernels, name: str) -> Iterator[Row]:
    for format in ("plain", "int8"):
        yield from _steps_in(kernels, name, format)


def _steps_in(kernels: CpuKernels, name: str, format: str) -> Iterator[Row]:
    """One model, which is gone when this ends: two of the 3B would take 11 GB."""
    llama = gpu_inputs.config(name, dry=False)
    with torch.inference_mode():
        model = gpu_inputs.random_model(kernels, llama, CPU, format, num_positions=16384)
    table = model.embedding.table
    read = model.nbytes - model.cos_sin.nbytes - (0 if table is model.head.weight else table.nbytes)
    for rows, context in ((1, 128), (1, 1024), (8, 192), (32, 192)):
        whole = _step(model, llama, [1] * rows, [context] * rows)  # held: a recording knows its tensors' addresses
        with torch.inference_mode():
            run, _ = kernels.capture(whole)
            seconds = median(run)
        cached = 4.0 * rows * context * llama.num_key_value_heads * llama.head_dim * llama.num_hidden_layers
        yield Row("step", f"{name} {format}, {rows} rows, context {context}", seconds, read + cached, tokens=rows)
    for length in (128, 1024, 8192):
        chunks = [(min(CHUNK, length - start), start) for start in range(0, length, CHUNK)]
        runs = [_step(model, llama, [count], [start + count], head=False) for count, start in chunks]
        flops = (
            2.0
            * length
            * sum(
                weight.out_features * weight.in_features
                for layer in model.layers
                for weight in (layer.qkv, layer.o, layer.gate_up, layer.down)
            )
        )
        start = time.perf_counter()
        for run in runs:
            run()
        yield Row(
            "prompt", f"{name} {format}, {length} tokens", time.perf_counter() - start, flops=flops, tokens=length
        )


def _step(model, llama, lens: list[int], contexts: list[int], *, head: bool = True) -> Callable[[], object]:  # type: ignore[no-untyped-def]
    step, num_blocks = gpu_inputs.step(lens, contexts, CPU)
    cache = gpu_inputs.cache(llama, num_blocks, CPU, dtype=BFLOAT16)
    # One cache for all layers: what is read is the same, and 128,000 tokens of sixteen need not be there.
    layers = SimpleNamespace(layers=[dataclasses.replace(cache) for _ in range(llama.num_hidden_layers)])
    ids = torch.randint(llama.vocab_size, (sum(lens),))

    def run() -> Tensor | None:
        with torch.inference_mode():
            with model.kernels.gathering():
                hidden = model.forward(ids, step, layers)
            return model.kernels.linear_argmax(hidden[step.logit_rows], model.head.weight)[0] if head else None

    return run


PARTS = {"products": products, "attention": attention, "rows": rows_of_a_step, "sampler": sampler, "steps": steps}


def line(row: Row, limits: dict[str, float]) -> str:
    peak = limits["float32"]
    if row.on_tiles:
        peak = limits["integer_tiles" if "int8" in row.name else "tiles"]
    cells = [
        f"{row.group}: {row.name}",
        f"{row.seconds * 1e3:.3f}",
        f"{row.nbytes / row.seconds / 1e9:.1f}" if row.nbytes else "",
        f"{row.nbytes / row.seconds / limits['read']:.0%}" if row.nbytes else "",
        f"{row.flops / row.seconds / 1e9:.0f}" if row.flops else "",
        f"{row.flops / row.seconds / peak:.0%}" if row.flops and row.group != "prompt" else "",
        f"{row.tokens / row.seconds:.1f}" if row.tokens else "",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; may be repeated")
    parser.add_argument("--model", action="append", choices=("1B", "3B"), help="default: 1B")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    kernels = CpuKernels(asked.threads)
    out = open(asked.out, "w") if asked.out else None  # noqa: SIM115  it is open until the end

    def say(text: str) -> None:
        print(text, flush=True)
        if out is not None:
            out.write(text + "\n")
            out.flush()

    say(f"`python bench/cpu.py --threads {asked.threads}`, {datetime.date.today()}, {_processor()}")
    say(f"\n{kernels.describe(BFLOAT16)}\n")
    limits = ceilings(Team(asked.threads))
    for name, value in limits.items():
        say(f"- {name}: {value / 1e9:.1f} {'GB/s' if name == 'read' else 'GOP/s'}")
    say("\n| what | ms | GB/s | of read | GOP/s | of peak | tokens/s |\n|---|---|---|---|---|---|---|")
    for name in asked.model or ["1B"]:
        for part in asked.only or PARTS:
            for row in PARTS[part](kernels, name):
                say(line(row, limits))


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")


if __name__ == "__main__":
    main()
