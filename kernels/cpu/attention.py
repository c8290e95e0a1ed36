"""Attention on a CPU: what each thread is to do, worked out once for all layers of a step.

Pieces of a step are alike whoever else is in it; only whether the splits of long contexts are done one by one, to keep
all threads busy, or in one go, depends on how much there is to do, and that changes no result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pronk.kernels.cpu.attention_kernels import (
    ITEM,
    KEYS,
    MERGE_ITEM,
    SPLIT,
    TILE_ROWS,
    write_attend,
    write_merge,
)
from pronk.kernels.cpu.attention_tiles import MOST_ROWS, write_attend_on_tiles
from pronk.kernels.cpu.code import DTYPES, Code, contiguous
from pronk.kernels.cpu.instructions import LANES, config_address
from pronk.kernels.interface import AttentionPlan, LayerCache, Queries

FLOPS_A_NANOSECOND = 50
"""Of a thread, roughly: what work is shared out by."""
ITEMS_PER_THREAD = 4
"""So many, and the end of a step finds all threads at work."""


@dataclass(frozen=True)
class Plan:
    """Of one step."""

    items: Tensor
    """int64 [n, 7], those that take longest first."""
    merges: Tensor
    """int64 [n, 4]"""
    block_tables: Tensor
    """int64 [S, blocks]"""
    num_heads: int
    partial_sums: Tensor
    """float32 [partials, KV, TILE_ROWS, D]"""
    partial_stats: Tensor
    """float32 [partials, KV, TILE_ROWS, 2]"""
    cost: float
    """Nanoseconds of an item, on average."""


def plan_attention(code: Code, queries: Queries, *, num_heads: int, cache: LayerCache) -> Plan:
    """See `Kernels.plan_attention`. Raises ValueError for what no kernel is made for."""
    _, num_kv_heads, block_size, head_dim = cache.keys.shape
    group = num_heads // num_kv_heads
    if cache.key_scales is not None:
        raise ValueError("the CPU kernels read no scaled KV cache: leave --kv-cache-dtype at auto")
    if head_dim % LANES:
        raise ValueError(f"the CPU kernels attend with heads of multiples of {LANES}, not {head_dim}")
    if group > TILE_ROWS:
        raise ValueError(f"{group} query heads share a KV head: the CPU kernels have up to {TILE_ROWS}")
    if block_size % KEYS or SPLIT % block_size:
        raise ValueError(f"blocks of {block_size} tokens: the CPU kernels have powers of two up to {SPLIT}")
    most_rows = MOST_ROWS if _on_tiles(code, cache) else TILE_ROWS
    pieces = _pieces(queries, most_rows // group)
    splits = sum(-(-(position + count) // SPLIT) for _, count, position, _ in pieces)
    enough = ITEMS_PER_THREAD * code.team.num_threads
    few_rows = all(count * group <= TILE_ROWS for _, count, _, _ in pieces)
    apart = few_rows and len(pieces) * num_kv_heads < enough and splits > len(pieces)
    items, merges, partials = [], [], 0
    for first, count, position, sequence in pieces:
        num_splits = -(-(position + count) // SPLIT)
        if apart and num_splits > 1:
            merges.append((first, count, partials, num_splits))
            for split in range(num_splits):
                items.append((first, count, position, sequence, split, split + 1, partials))
                partials += 1
        else:
            items.append((first, count, position, sequence, 0, num_splits, -1))
    items.sort(key=lambda item: -item[1] * (item[5] - item[4]))
    return Plan(
        items=torch.tensor(items, dtype=torch.int64).view(-1, len(ITEM)),
        merges=torch.tensor(merges, dtype=torch.int64).view(-1, len(MERGE_ITEM)),
        block_tables=contiguous(queries.block_tables),
        num_heads=num_heads,
        partial_sums=torch.empty(partials, num_kv_heads, TILE_ROWS, head_dim),
        partial_stats=torch.empty(partials, num_kv_heads, TILE_ROWS, 2),
        cost=sum(_flops(piece, group * head_dim) for piece in pieces) / FLOPS_A_NANOSECOND / max(len(items), 1),
    )


def _pieces(queries: Queries, tokens: int) -> list[tuple[int, int, int, int]]:
    """Up to `tokens` neighbours of a sequence each, at multiples of so many from its first in the step. -> (first
    token, how many, position of the first, sequence)"""
    found = []
    rows = zip(queries.starts.tolist(), queries.lens.tolist(), queries.context_lens.tolist(), strict=True)
    for sequence, (start, length, context_len) in enumerate(rows):
        for offset in range(0, length, tokens):
            count = min(tokens, length - offset)
            found.append((start + offset, count, context_len - length + offset, sequence))
    return found


def _on_tiles(code: Code, cache: LayerCache) -> bool:
    return code.instructions.tiles and cache.keys.dtype == torch.bfloat16 and cache.keys.shape[3] % 32 == 0


def _flops(piece: tuple[int, int, int, int], width: int) -> int:
    """Of one KV head. width: numbers of its query heads together."""
    _, count, position, _ = piece
    return 4 * count * (position + count) * width


def attention(code: Code, q: Tensor, cache: LayerCache, plan: AttentionPlan) -> Tensor:
    """See `Kernels.attention`."""
    if not isinstance(plan, Plan):
        raise TypeError(f"the plan was made by another kernel set: {type(plan).__module__}")
    if q.dtype != cache.keys.dtype:
        raise ValueError(
            f"queries of {q.dtype} on a cache of {cache.keys.dtype}: the CPU kernels need the same of both"
        )
    q = contiguous(q)
    out = torch.empty_like(q)
    _, num_kv_heads, block_size, head_dim = cache.keys.shape
    dtype = DTYPES[q.dtype]
    partials = (plan.partial_sums.data_ptr(), plan.partial_stats.data_ptr())
    on_tiles = _on_tiles(code, cache)
    code.run(
        f"attend_on_tiles_{head_dim}" if on_tiles else f"attend_{dtype}_{head_dim}",
        write_attend_on_tiles(head_dim) if on_tiles else write_attend(dtype, head_dim),
        [
            q.data_ptr(),
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
            out.data_ptr(),
            plan.items.data_ptr(),
            plan.block_tables.data_ptr(),
            plan.block_tables.shape[1],
            plan.num_heads,
            num_kv_heads,
            block_size,
            *partials,
            config_address(TILE_ROWS, TILE_ROWS),
        ],
        len(plan.items) * num_kv_heads,
        plan.cost,
    )
    if len(plan.merges):
        code.run(
            f"merge_{dtype}_{head_dim}",
            write_merge(dtype, head_dim),
            [out.data_ptr(), plan.merges.data_ptr(), *partials, plan.num_heads, num_kv_heads],
            len(plan.merges) * num_kv_heads,
            cost=TILE_ROWS * head_dim,
        )
    return out
