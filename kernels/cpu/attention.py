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
from pronk.kernels.cpu.code import DTYPES, Code
from pronk.kernels.cpu.instructions import LANES, config_address
from pronk.kernels.interface import AttentionPlan, LayerCache, Queries
from pronk.kernels.jit.threads import Work

FLOPS_A_NANOSECOND = 50
"""Of a thread, roughly: what work is shared out by."""
ITEMS_PER_THREAD = 4
"""So many, and the end of a step finds all threads at work."""


Piece = tuple[int, int, int, int]
"""First token, how many, position of the first, sequence."""


@dataclass(frozen=True)
class Plan:
    """Of one step."""

    items: Tensor
    """int64 [n, 7], those that take longest first."""
    merges: Tensor
    """int64 [n, 4]"""
    work: Work
    """How many of the items there are, times KV heads."""
    merge_work: Work
    block_tables: Tensor
    """int64 [S, blocks]"""
    num_heads: int
    partial_sums: Tensor
    """float32 [partials, KV, TILE_ROWS, D]"""
    partial_stats: Tensor
    """float32 [partials, KV, TILE_ROWS, 2]"""


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
    heads = _Heads(num_kv_heads, group, head_dim)
    tokens = (MOST_ROWS if _on_tiles(code, cache) else TILE_ROWS) // group
    enough = ITEMS_PER_THREAD * code.team.num_threads
    order = _order(_pieces(queries, tokens), heads, enough)
    num_items, num_merges, num_partials = len(order.items), len(order.merges), order.num_partials
    if code.recorder is not None:
        num_items, num_merges, num_partials = _most(queries, tokens, heads, enough)
    code.settle()  # the host is about to write
    plan = Plan(
        items=code.empty((num_items, len(ITEM)), torch.int64),
        merges=code.empty((num_merges, len(MERGE_ITEM)), torch.int64),
        work=Work(),
        merge_work=Work(),
        block_tables=code.contiguous(queries.block_tables),
        num_heads=num_heads,
        partial_sums=code.empty((num_partials, num_kv_heads, TILE_ROWS, head_dim), torch.float32),
        partial_stats=code.empty((num_partials, num_kv_heads, TILE_ROWS, 2), torch.float32),
    )
    _write(plan, order, heads)
    code.before_replays(lambda: _write(plan, _order(_pieces(queries, tokens), heads, enough), heads))
    return plan


@dataclass(frozen=True)
class _Heads:
    num_kv_heads: int
    group: int
    """Query heads of each."""
    head_dim: int


@dataclass(frozen=True)
class _Order:
    """What a step has to do."""

    items: list[tuple[int, ...]]
    merges: list[tuple[int, ...]]
    num_partials: int
    flops: int
    """Of one KV head."""


def _order(pieces: list[Piece], heads: _Heads, enough: int) -> _Order:
    """enough: items that keep all threads busy to the end."""
    splits = sum(-(-(position + count) // SPLIT) for _, count, position, _ in pieces)
    few_rows = all(count * heads.group <= TILE_ROWS for _, count, _, _ in pieces)
    apart = few_rows and len(pieces) * heads.num_kv_heads < enough and splits > len(pieces)
    items: list[tuple[int, ...]] = []
    merges: list[tuple[int, ...]] = []
    partials = 0
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
    flops = sum(_flops(piece, heads.group * heads.head_dim) for piece in pieces)
    return _Order(items, merges, partials, flops)


def _most(queries: Queries, tokens: int, heads: _Heads, enough: int) -> tuple[int, int, int]:
    """-> items, merges and partials of any step within the bounds of these queries."""
    pieces = len(queries.starts) * -(-queries.max_len // tokens)
    apart = min(pieces, (enough - 1) // heads.num_kv_heads)
    partials = apart * -(-queries.max_context_len // SPLIT)
    return max(pieces, partials), apart, partials


def _write(plan: Plan, order: _Order, heads: _Heads) -> None:
    # By numpy: a recording must not take these numbers for those of every step.
    if order.items:
        plan.items.numpy()[: len(order.items)] = order.items
    if order.merges:
        plan.merges.numpy()[: len(order.merges)] = order.merges
    plan.work.set(len(order.items) * heads.num_kv_heads, order.flops / FLOPS_A_NANOSECOND / max(len(order.items), 1))
    plan.merge_work.set(len(order.merges) * heads.num_kv_heads, TILE_ROWS * heads.head_dim)


def _pieces(queries: Queries, tokens: int) -> list[Piece]:
    """Up to `tokens` neighbours of a sequence each, at multiples of so many from its first in the step."""
    found = []
    rows = zip(queries.starts.tolist(), queries.lens.tolist(), queries.context_lens.tolist(), strict=True)
    for sequence, (start, length, context_len) in enumerate(rows):
        for offset in range(0, length, tokens):
            count = min(tokens, length - offset)
            found.append((start + offset, count, context_len - length + offset, sequence))
    return found


def _on_tiles(code: Code, cache: LayerCache) -> bool:
    return code.instructions.tiles and cache.keys.dtype == torch.bfloat16 and cache.keys.shape[3] % 32 == 0


def _flops(piece: Piece, width: int) -> int:
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
    q = code.contiguous(q)
    out = code.empty(q.shape, q.dtype)
    _, num_kv_heads, block_size, head_dim = cache.keys.shape
    dtype = DTYPES[q.dtype]
    partials = (plan.partial_sums, plan.partial_stats)
    on_tiles = _on_tiles(code, cache)
    code.run_as_planned(
        f"attend_on_tiles_{head_dim}" if on_tiles else f"attend_{dtype}_{head_dim}",
        write_attend_on_tiles(head_dim) if on_tiles else write_attend(dtype, head_dim),
        [
            q,
            cache.keys,
            cache.values,
            out,
            plan.items,
            plan.block_tables,
            plan.block_tables.shape[1],
            plan.num_heads,
            num_kv_heads,
            block_size,
            *partials,
            config_address(TILE_ROWS, TILE_ROWS),
        ],
        plan.work,
    )
    if len(plan.merges):
        code.run_as_planned(
            f"merge_{dtype}_{head_dim}",
            write_merge(dtype, head_dim),
            [out, plan.merges, *partials, plan.num_heads, num_kv_heads],
            plan.merge_work,
        )
    return out
