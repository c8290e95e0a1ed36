"""Is it right? Every kernel against its definition in float64 on fresh random inputs, and promise 1, bit for bit.

Each check yields (name, whether it holds, a figure in words). Knows `pronk.kernels.cases`, where the inputs and bounds
of the tests are; no timing.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from types import SimpleNamespace
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
    yield from _rope(gpu, where, seed, dry=dry)
    yield from _argmax(gpu, where, seed, dry=dry)
    yield from _sampling(gpu, where, seed, dry=dry)


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


def _rope(gpu: Any, where: torch.device, seed: int, *, dry: bool) -> Iterator[Check]:
    for case in cases.ROPE[:1] if dry else cases.ROPE:
        inputs = cases.rope_inputs(case, torch.bfloat16, seed)
        table = inputs.cos_sin[inputs.positions].double()
        heads = inputs.qkv.view(case.num_tokens, -1, case.heads.head_dim)
        q, k, v = heads.split([case.heads.num_heads, case.heads.num_kv_heads, case.heads.num_kv_heads], dim=1)
        cache = LayerCache(*(torch.zeros(inputs.cache_shape, dtype=torch.bfloat16, device=where) for _ in range(2)))
        places = [tensor.to(where) for tensor in (inputs.qkv, inputs.positions, inputs.cos_sin, inputs.slots)]
        queries = gpu.rope_and_cache(*places, cache)
        expected = reference.rotate(q.double(), table)
        bound = cases.rope_bound(q, table, expected, torch.bfloat16)
        yield (f"rope_and_cache {case.name}: queries", *worst(queries, expected, bound))
        blocks, rows = (inputs.slots // case.block_size).to(where), (inputs.slots % case.block_size).to(where)
        expected = reference.rotate(k.double(), table)
        bound = cases.rope_bound(k, table, expected, torch.bfloat16)
        yield (f"rope_and_cache {case.name}: keys", *worst(cache.keys[blocks, :, rows], expected, bound))
        same = bool(torch.equal(cache.values[blocks, :, rows].cpu(), v))
        yield f"rope_and_cache {case.name}: values", same, "as they were" if same else "changed"


def _sampling(gpu: Any, where: torch.device, seed: int, *, dry: bool) -> Iterator[Check]:
    logits = cases.language_like(2 if dry else 32, 300 if dry else 128256, seed)
    for parameters in cases.SAMPLING:
        batch = cases.sampling_batch(len(logits), **parameters, top_n=20, seed=seed)  # type: ignore[arg-type]
        found, expected = gpu.sample(logits.to(where), to(where, batch)), reference.sample(logits, batch)
        wrong = int((found.token_ids.cpu() != expected.token_ids).sum())
        yield f"sample {parameters}: the definition's tokens", wrong == 0, f"{wrong} of {len(logits)} differ"
        error = (found.top_logprobs.cpu() - expected.top_logprobs).abs().max().item()
        yield f"sample {parameters}: log probabilities", error < 2e-5, f"off by {error:.1e}"


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


def steps(gpu: Any, device: Any, seed: int, *, dry: bool) -> Iterator[Check]:
    """Two layers of each model."""
    for name in ("1B",) if dry else ("1B", "3B"):
        llama = dataclasses.replace(gpu_inputs.config(name, dry=dry), num_hidden_layers=1 if dry else 2)
        batch, length = (3, 20) if dry else (256, 700)
        for what, holds, figure in _steps_of(gpu, device, llama, batch, length, seed):
            yield f"step {name}: {what}", holds, figure


def _steps_of(gpu: Any, device: Any, llama: Any, batch: int, length: int, seed: int) -> Iterator[Check]:
    """A sequence alone and in a batch, its prompt whole and in chunks; a step launched and replayed from a graph."""
    where = device.where
    model = gpu_inputs.random_model(gpu, llama, where, "plain", num_positions=1024)
    source = torch.Generator().manual_seed(seed)
    prompt, tokens = (torch.randint(llama.vocab_size, (n,), generator=source).to(where) for n in (length, batch))
    ends = [length + 1, *torch.randint(2, length, (batch - 1,), generator=source).tolist()]
    tables, num_blocks = gpu_inputs.block_tables(ends)
    layers = [gpu_inputs.cache(llama, num_blocks, where, dtype=torch.bfloat16) for _ in model.layers]

    def logits(ids: Tensor, step: Any) -> Tensor:
        hidden = model.forward(ids, step, SimpleNamespace(layers=layers))  # type: ignore[arg-type]
        return model.logits(hidden[step.logit_rows])

    def run(ids: Tensor, lens: list[int], contexts: list[int]) -> Tensor:
        return logits(ids, gpu_inputs.step(lens, contexts, where, tables=tables[: len(lens)])[0])

    with torch.inference_mode():
        whole = run(prompt, [length], [length])
        cuts = [0, length // 3, length // 2, length]
        for start, end in itertools.pairwise(cuts):
            chunks = run(prompt[start:end], [end - start], [end])
        yield f"a prompt of {length}, whole as in chunks", bool(torch.equal(whole, chunks)), f"{cuts}"
        together = run(tokens, [1] * batch, ends)
        alone = run(tokens[:1], [1], ends[:1])
        yield f"a sequence alone as among {batch}", bool(torch.equal(alone, together[:1])), ""
        step, _ = gpu_inputs.step([1] * batch, ends, where, tables=tables)
        replayed = torch.empty_like(together)
        replay = device.graph(lambda: replayed.copy_(logits(tokens, step)))
        replayed.zero_()
        replay()
        device.synchronize()
        yield "launched as replayed", bool(torch.equal(replayed, together)), f"{batch} sequences"
