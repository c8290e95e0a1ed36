"""The CPU set: torch's own products, called so that a row's bits never depend on the rows around it.

How promise 1 is kept. A BLAS chooses its order of additions by the shape of a product, so the shape is held fixed:
products always see tiles of ROW_TILE rows, attention always sees tiles of QUERY_TILE tokens against KEY_SPLIT keys at
absolute positions, and what a tile lacks is filled up and thrown away. Whatever stands in the other rows, and wherever
in the tile a row sits, each of its sums then runs in the same order (tests/kernels/test_invariance.py holds the
machine to that). Sums along the last dimension and `torch.exp` go row by row and element by element in torch;
`F.silu` does not (its vector and scalar paths differ in the last bit), so it is not used here.

Knows no Triton. A faster set is a later step; its twin stays `reference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pronk.kernels import cpu_sampling, reference
from pronk.kernels.interface import AttentionPlan, LayerCache, Queries, Weight, WeightFormat

ROW_TILE = 16
"""Rows of a product. AMX multiplies 16 rows in the time of one; few rows are bound by the weights' bytes anyway."""
QUERY_TILE = 4
"""Tokens of one sequence that attend together."""
KEY_SPLIT = 256
"""Keys that are scored together, at multiples of this position."""

embedding = reference.embedding
rms_norm = reference.rms_norm
add_rms_norm = reference.add_rms_norm
rope_and_cache = reference.rope_and_cache
sample = cpu_sampling.sample
logprobs = cpu_sampling.logprobs

WEIGHT_FORMATS: tuple[WeightFormat, ...] = ("plain",)


def has_bfloat16_products() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; without it torch is several times slower than in float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what precision weights of this dtype are kept and multiplied here."""
    return dtype if dtype == torch.bfloat16 and has_bfloat16_products() else torch.float32


def describe(dtype: torch.dtype) -> str:
    """See `Kernels.describe`."""
    name = str(product_dtype(dtype)).removeprefix("torch.")
    return f"{torch.backends.cpu.get_cpu_capability()}, {name} products, {torch.get_num_threads()} threads"


def pack(weight: Tensor, format: WeightFormat = "plain") -> Weight:
    """See `Kernels.pack`. Kept as [N, K], in the dtype that is multiplied."""
    if format not in WEIGHT_FORMATS:
        raise ValueError(f"the CPU kernels have no {format} weights: choose {', '.join(WEIGHT_FORMATS)}")
    return Weight(weight.shape[0], weight.shape[1], weight.to(product_dtype(weight.dtype)).contiguous())


def linear(x: Tensor, weight: Weight) -> Tensor:
    """See `Kernels.linear`. Reads the weight once for every ROW_TILE rows."""
    num_rows = x.shape[0]
    tiles = -(-num_rows // ROW_TILE)
    padded = F.pad(x.to(weight.data.dtype), (0, 0, 0, tiles * ROW_TILE - num_rows))
    out = torch.empty(tiles * ROW_TILE, weight.out_features, dtype=weight.data.dtype)
    for start in range(0, tiles * ROW_TILE, ROW_TILE):
        torch.mm(padded[start : start + ROW_TILE], weight.data.t(), out=out[start : start + ROW_TILE])
    return out[:num_rows].to(x.dtype)


def linear_silu_mul(x: Tensor, weight: Weight) -> Tensor:
    """See `Kernels.linear_silu_mul`."""
    return silu_mul(linear(x, weight))


def linear_argmax(x: Tensor, weight: Weight) -> tuple[Tensor, Tensor]:
    """See `Kernels.linear_argmax`."""
    return cpu_sampling.largest(linear(x, weight))


def linear_rope_and_cache(
    x: Tensor, weight: Weight, positions: Tensor, cos_sin: Tensor, slots: Tensor, cache: LayerCache
) -> Tensor:
    """See `Kernels.linear_rope_and_cache`."""
    return rope_and_cache(linear(x, weight), positions, cos_sin, slots, cache)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `Kernels.silu_mul`."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)


@dataclass(frozen=True)
class Group:
    """Query tiles that run together: one tile each of several sequences, or all tiles of one sequence.

    All of them walk over the same number of key splits; a row that ends earlier sees nothing in the later ones, which
    changes none of its bits: exp gives exact zeros, and the running sums are multiplied by an exact one.
    """

    rows: Tensor
    """int64 [tiles, QUERY_TILE]: row of the step for each place, a place to spare repeats the tile's last."""
    positions: Tensor
    """int64 [tiles, QUERY_TILE]: position of each."""
    lens: Tensor
    """int64 [sequences]: keys of each sequence; one sequence, or as many as tiles."""
    block_tables: Tensor
    """int64 [sequences, splits, blocks in a split]: what lies past a sequence's keys is block 0."""
    real: Tensor
    """int64 [n]: the places of `rows`, flattened, that are no spares."""


@dataclass(frozen=True)
class Plan:
    """The groups of one step; together they hold each of its rows once."""

    groups: list[Group]
    group_size: int
    """Query heads for each KV head."""


def plan_attention(queries: Queries, *, num_heads: int, cache: LayerCache) -> Plan:
    """See `Kernels.plan_attention`. Sequences with one tile of tokens run together by length; others alone."""
    _, num_kv_heads, block_size, _ = cache.keys.shape
    if cache.key_scales is not None:
        raise ValueError("the CPU kernels read no scaled KV cache: leave --kv-cache-dtype at auto")
    used = queries.lens > 0
    if not used.all():
        queries = Queries(
            starts=queries.starts[used],
            lens=queries.lens[used],
            context_lens=queries.context_lens[used],
            block_tables=queries.block_tables[used],
            max_len=queries.max_len,
            max_context_len=queries.max_context_len,
        )
    single = queries.lens <= QUERY_TILE
    groups = [_plan_group(queries, torch.tensor([index]), block_size) for index in (~single).nonzero().flatten()]
    # Sequences of like length share a group, so that a short one does not walk a long one's keys.
    splits = (queries.context_lens + KEY_SPLIT - 1) // KEY_SPLIT
    size_class = splits.float().log2().ceil().long()
    for value in torch.unique(size_class[single]):
        groups.append(_plan_group(queries, (single & (size_class == value)).nonzero().flatten(), block_size))
    return Plan(groups, num_heads // num_kv_heads)


def _plan_group(queries: Queries, sequences: Tensor, block_size: int) -> Group:
    """sequences int64 [n]: all with one tile, or a single one with any number."""
    starts, lens, context_lens = queries.starts[sequences], queries.lens[sequences], queries.context_lens[sequences]
    num_tiles = max(1, -(-int(lens[0]) // QUERY_TILE)) if len(sequences) == 1 else 1
    offsets = torch.arange(num_tiles * QUERY_TILE).expand(len(sequences), -1)
    clamped = torch.minimum(offsets, lens.unsqueeze(1) - 1)
    splits = -(-int(context_lens.max()) // KEY_SPLIT)
    blocks_per_split = KEY_SPLIT // block_size
    tables = torch.zeros(len(sequences), splits * blocks_per_split, dtype=torch.int64)
    width = min(tables.shape[1], queries.block_tables.shape[1])
    tables[:, :width] = queries.block_tables[sequences, :width]
    held = -(-context_lens // block_size)
    tables[torch.arange(tables.shape[1]) >= held.unsqueeze(1)] = 0
    return Group(
        rows=(starts.unsqueeze(1) + clamped).view(-1, QUERY_TILE),
        positions=((context_lens - lens).unsqueeze(1) + clamped).view(-1, QUERY_TILE),
        lens=context_lens,
        block_tables=tables.view(len(sequences), splits, blocks_per_split),
        real=(offsets < lens.unsqueeze(1)).flatten().nonzero().flatten(),
    )


def attention(q: Tensor, cache: LayerCache, plan: AttentionPlan) -> Tensor:
    """See `Kernels.attention`. Scratch memory: one key split for each sequence, and its scores."""
    if not isinstance(plan, Plan):
        raise TypeError(f"the plan was made by another kernel set: {type(plan).__module__}")
    out = torch.empty_like(q)
    for group in plan.groups:
        rows = group.rows.flatten()[group.real]
        attended = _attend(q[group.rows].float(), cache, group, plan.group_size)
        out[rows] = attended.flatten(0, 1)[group.real].to(q.dtype)
    return out


def _attend(q: Tensor, cache: LayerCache, group: Group, group_size: int) -> Tensor:
    """q float32 [tiles, QUERY_TILE, Q, D] -> the same shape. Online softmax over the splits (FlashAttention, Dao 2022,
    algorithm 1), in the order of their positions."""
    tiles, _, num_heads, head_dim = q.shape
    num_kv_heads = num_heads // group_size
    # [KV, tiles, QUERY_TILE * G, D]: a KV head's query heads are more rows of the same product.
    packed = (q * head_dim**-0.5).view(tiles, QUERY_TILE, num_kv_heads, group_size, head_dim)
    packed = packed.permute(2, 0, 1, 3, 4).reshape(num_kv_heads, tiles, QUERY_TILE * group_size, head_dim)
    row_positions = group.positions.repeat_interleave(group_size, dim=1).unsqueeze(-1)
    lowest, longest = int(group.positions.min()), int(group.lens.max())

    running_max = torch.full((*packed.shape[:-1], 1), float("-inf"))
    running_sum = torch.zeros_like(running_max)
    weighted = torch.zeros_like(packed)
    for split in range(group.block_tables.shape[1]):
        num_keys = min(longest - split * KEY_SPLIT, KEY_SPLIT)
        keys = _split_of(cache.keys, group.block_tables[:, split], num_keys)
        values = _split_of(cache.values, group.block_tables[:, split], num_keys)
        scores = _multiply(packed, keys.transpose(2, 3))
        key_positions = torch.arange(split * KEY_SPLIT, (split + 1) * KEY_SPLIT)
        if key_positions[-1] > lowest:
            scores.masked_fill_(key_positions > row_positions, float("-inf"))
            # Whatever a block holds past the sequence's end, NaN included, must not meet a weight of 0.
            values.masked_fill_((key_positions >= group.lens.unsqueeze(1)).unsqueeze(-1), 0.0)
        new_max = torch.maximum(running_max, scores.amax(-1, keepdim=True))
        probabilities = scores.sub_(new_max).exp_()
        rescale = running_max.sub_(new_max).exp_()
        running_sum.mul_(rescale).add_(probabilities.sum(-1, keepdim=True))
        weighted.mul_(rescale).add_(_multiply(probabilities, values))
        running_max = new_max
    normed = (weighted / running_sum).view(num_kv_heads, tiles, QUERY_TILE, group_size, head_dim)
    return normed.permute(1, 2, 0, 3, 4).reshape(q.shape)


def _split_of(cache: Tensor, blocks: Tensor, num_keys: int) -> Tensor:
    """cache [B, KV, P, D], blocks int64 [sequences, blocks in a split], num_keys: how many of the split the longest
    sequence has -> float32 [KV, sequences, KEY_SPLIT, D], zero from the first block on that nobody has."""
    num_blocks = -(-num_keys // cache.shape[2])
    gathered = cache.transpose(0, 1)[:, blocks[:, :num_blocks]].flatten(2, 3)
    if gathered.shape[2] == KEY_SPLIT:
        return gathered.float()
    out = torch.zeros(gathered.shape[0], gathered.shape[1], KEY_SPLIT, gathered.shape[3])
    out[:, :, : gathered.shape[2]] = gathered
    return out


def _multiply(x: Tensor, y: Tensor) -> Tensor:
    """x [KV, tiles, R, K], y [KV, sequences, K, N] -> [KV, tiles, R, N], always products of R rows: one sequence's
    keys or values meet all tiles, or each tile its own's."""
    num_kv_heads, tiles, rows, _ = x.shape
    if y.shape[1] == tiles:
        return torch.bmm(x.flatten(0, 1), y.flatten(0, 1)).view(num_kv_heads, tiles, rows, -1)
    out = torch.empty(num_kv_heads, tiles, rows, y.shape[-1])
    for head in range(num_kv_heads):
        torch.bmm(x[head], y[head].expand(tiles, -1, -1), out=out[head])
    return out
