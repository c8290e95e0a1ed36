"""Is it right? Every kernel against its definition in float64 on fresh random inputs, and promise 1, bit for bit.

Each check yields (name, whether it holds, a figure in words). Knows `pronk.kernels.cases`, where the inputs and bounds
of the tests are; no timing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import gpu_inputs
import torch
from torch import Tensor

from pronk.kernels import cases, reference
from pronk.kernels.interface import LayerCache

Check = tuple[str, bool, str]
FORMATS = ("plain", "int8", "fp8", "int4")


def to(where: torch.device, thing: Any) -> Any:
    """A dataclass of tensors, or a tensor, moved."""
    if isinstance(thing, Tensor):
        return thing.to(where)
    if hasattr(thing, "__dataclass_fields__"):
        return type(thing)(**{name: to(where, getattr(thing, name)) for name in thing.__dataclass_fields__})
    return tuple(to(where, each) for each in thing) if isinstance(thing, tuple) else thing


def worst(actual: Tensor, expected: Tensor, bound: Tensor) -> tuple[bool, str]:
    """-> whether all of actual lies within bound of expected, and how near the worst comes to it."""
    error = (actual.double().cpu() - expected.cpu()).abs()
    share = (error / bound.cpu()).nan_to_num(torch.inf).max().item()
    return share <= 1, f"worst error {share:.2f} of its bound"


def correctness(gpu: Any, where: torch.device, seed: int, *, dry: bool) -> Iterator[Check]:
    """All of them in bfloat16."""
    dtype = torch.bfloat16
    shapes = (
        ((3, 48, 96), (17, 80, 64)) if dry else ((1, 3072, 2048), (5, 2048, 8192), (64, 3072, 2048), (300, 2048, 2048))
    )
    for rows, outputs, inputs in shapes:
        case = cases.LinearCase("", rows, inputs, outputs)
        x, weight = cases.linear_inputs(case, dtype, seed)
        for name in FORMATS:
            if name not in gpu.WEIGHT_FORMATS:
                continue
            packed = gpu.pack(weight.to(where), name)
            exact = reference.unpack(reference.pack(weight, name)).double()
            expected = x.double() @ exact.t()
            bound = cases.linear_bound(x, exact, expected, dtype)
            yield (f"linear {name} {rows}x{outputs}x{inputs}", *worst(gpu.linear(x.to(where), packed), expected, bound))
    yield from _attention(gpu, where, seed, dry=dry)
    yield from _rows(gpu, where, seed, dry=dry)
    yield from _argmax(gpu, where, seed, dry=dry)


def _attention(gpu: Any, where: torch.device, seed: int, *, dry: bool) -> Iterator[Check]:
    chosen = [case for case in cases.ATTENTION if case.name.startswith(("mixed", "chunks"))]
    if dry:
        heads = cases.Heads(64, 1, 4)
        chosen = [cases.AttentionCase("tiny", heads, 16, (cases.Chunk(1, 300), cases.Chunk(3, 20)))]
    for case in chosen:
        inputs = cases.attention_inputs(case, torch.bfloat16, seed)
        wide = LayerCache(inputs.cache.keys.double(), inputs.cache.values.double())
        plan = reference.plan_attention(inputs.queries, num_heads=case.heads.num_heads, cache=wide)
        expected = reference.attention(inputs.q.double(), wide, plan)
        actual = attend(gpu, to(where, inputs.q), to(where, inputs.cache), to(where, inputs.queries))
        # Probabilities are rounded to bfloat16 before they meet the values.
        bound = (
            cases.attention_bound(inputs, expected, torch.bfloat16)
            + 2.0**-8 * inputs.cache.values.nan_to_num().abs().max()
        )
        yield (f"attention {case.name}", *worst(actual, expected, bound))


def attend(gpu: Any, q: Tensor, cache: LayerCache, queries: Any) -> Tensor:
    plan = gpu.plan_attention(queries, num_heads=q.shape[1], cache=cache)
    out: Tensor = gpu.attention(q, cache, plan)
    return out


def _rows(gpu: Any, where: torch.device, seed: int, *, dry: bool) -> Iterator[Check]:
    source = cases.generator(seed)
    width = 96 if dry else 2048
    x, residual = (cases.normal(source, 5, width, dtype=torch.bfloat16) for _ in range(2))
    weight = cases.normal(source, width, dtype=torch.bfloat16)
    normed, total = gpu.add_rms_norm(x.to(where), residual.to(where), weight.to(where), cases.EPS)
    expected = reference.rms_norm(total.double().cpu(), weight.double(), cases.EPS)
    yield ("add_rms_norm", *worst(normed, expected, cases.norm_bound(expected, torch.bfloat16)))
    gate_up = cases.normal(source, 5, 2 * width, dtype=torch.bfloat16)
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = gate * torch.sigmoid(gate) * up
    bound = cases.silu_mul_bound(expected, up, torch.bfloat16)
    yield ("silu_mul", *worst(gpu.silu_mul(gate_up.to(where)), expected, bound))


def _argmax(gpu: Any, where: torch.device, seed: int, *, dry: bool) -> Iterator[Check]:
    source = cases.generator(seed)
    inputs, outputs = (64, 300) if dry else (2048, 128256)
    x = cases.normal(source, 4, inputs, dtype=torch.bfloat16).to(where)
    weight = gpu.pack(cases.normal(source, outputs, inputs, dtype=torch.bfloat16).to(where))
    ids, _ = gpu.linear_argmax(x, weight)
    plain = reference.largest(gpu.linear(x, weight))[0]
    yield "linear_argmax is the largest of linear", bool(torch.equal(ids, plain)), f"{ids.tolist()}"


def invariance(gpu: Any, where: torch.device, seed: int, *, dry: bool) -> Iterator[Check]:
    """A row alone, and in every company."""
    dtype = torch.bfloat16
    shapes = ((48, 96),) if dry else ((3072, 2048), (2048, 8192), (16384, 2048), (5120, 3072))
    counts = (1, 3, 20) if dry else (1, 2, 8, 16, 17, 32, 64, 65, 128, 256, 1000)
    for outputs, inputs in shapes:
        x, weight = cases.linear_inputs(cases.LinearCase("", max(counts), inputs, outputs), dtype, seed)
        x = x.to(where)
        for name in FORMATS:
            if name not in gpu.WEIGHT_FORMATS:
                continue
            packed = gpu.pack(weight.to(where), name)
            alone = gpu.linear(x[:1], packed)
            same = [bool(torch.equal(gpu.linear(x[:count], packed)[:1], alone)) for count in counts]
            last = bool(torch.equal(gpu.linear(x, packed)[-1:], gpu.linear(x[-1:], packed)))
            wrong = [count for count, equal in zip(counts, same, strict=True) if not equal]
            yield (
                f"linear {name} {outputs}x{inputs}: rows stand alone",
                not wrong and last,
                f"differs at {wrong or 'none'}",
            )
        packed = gpu.pack(weight.to(where))
        for count in counts:
            fused = gpu.linear_silu_mul(x[:count], packed)
            plain = gpu.silu_mul(gpu.linear(x[:count], packed))
            if not torch.equal(fused, plain):
                yield f"linear_silu_mul {outputs}x{inputs}, {count} rows: fused as unfused", False, "differs"
                break
        else:
            yield f"linear_silu_mul {outputs}x{inputs}: fused as unfused", True, f"{counts}"
    yield from _attention_invariance(gpu, where, seed, dry=dry)


def _attention_invariance(gpu: Any, where: torch.device, seed: int, *, dry: bool) -> Iterator[Check]:
    """A prompt whole, in chunks, and token by token: decode and prefill kernels, alone and in a batch."""
    lengths = (40, 270) if dry else (100, 700, 1500)
    for name in ("1B",) if dry else ("1B", "3B", "8B"):
        llama = gpu_inputs.config(name, dry=dry)
        for scaled in (False, True):
            cache_dtype = torch.float8_e4m3fn if scaled else torch.bfloat16
            for length in lengths:
                _, num_blocks = gpu_inputs.step([length], [length], where)
                cache = gpu_inputs.cache(llama, num_blocks, where, dtype=cache_dtype)
                q = torch.randn(length, llama.num_attention_heads, llama.head_dim, device=where).to(torch.bfloat16)
                whole = attend(gpu, q, cache, gpu_inputs.step([length], [length], where)[0].queries)
                wrong = []
                picks = random.Random(seed).sample(range(length), 3 if dry else 20)
                for position in [*picks, length - 1]:
                    one = gpu_inputs.step([1], [position + 1], where)[0].queries
                    # The same blocks, in the order of the whole.
                    tables = gpu_inputs.step([length], [length], where)[0].queries.block_tables
                    one = type(one)(**{**vars(one), "block_tables": tables})
                    if not torch.equal(attend(gpu, q[position : position + 1], cache, one)[0], whole[position]):
                        wrong.append(position)
                kind = "float8" if scaled else "bfloat16"
                yield (
                    f"attention {name} {kind}, {length} tokens: one by one as whole",
                    not wrong,
                    f"differs at {wrong or 'none'}",
                )
