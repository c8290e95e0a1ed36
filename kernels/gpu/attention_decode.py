"""Flash decoding over a paged cache (Dao et al. 2023): the keys in splits, each scored by its own program, then merged.

Shapes. A sequence's n query tokens and the G query heads of one KV head are n · G packed rows, row r being token r // G
and head r % G; BLOCK_M of them are a tile. KEY_SPLIT keys at a multiple of that position are a split, walked in tiles
of BLOCK_N.

Grids. Both kernels are persistent: as many programs as the device holds at once, program i of n taking the items i,
i + n, i + 2n, ... of a list that the device made (`attention_plan`). Nothing of a launch depends on a length.
- `decode_kernel`: an item is (sequence, split, tile of rows), times the KV heads. Writes float32 partials, or, of a
  sequence with one split, the output.
- `combine_kernel`: an item is a token of a sequence with several splits, times the query heads; a thread for each
  dimension.

Bytes. Keys and values are read once: 2 · context · KV · D · itemsize for each sequence, and 8 · context · KV of scales
with float8. Partials are written and read: 2 · G · (D + 2) · 4 for each split and KV head, whose keys and values are
2 · KEY_SPLIT · D · itemsize. That is 3.2 % with D = 64, G = 4 and bfloat16, 2.4 % with D = 128 and G = 3, and mostly
stays in the L2 cache. All else is small.

Floor. At the 4.3 TB/s that an H200 copies with: the 1B (KV 8, D 64, bfloat16: 2 KiB for each cached token and layer)
31 µs a layer for 64k cached tokens in the batch, 62 µs for 128k, and 0.5 µs for 1k, which is less than a launch. Rows
that fill a tile would do 16 operations for each byte of bfloat16; the tensor cores have time for 180.

Numbers, promise 1. A row's result is made of these steps, whatever the rest of the step is, and whichever kernel takes
them (`attention_prefill` takes the same):
1. Each split is an online softmax of its own, its tiles in ascending order (`attend_tile`).
2. The splits are merged in ascending order (`merge`), beginning with nothing.
A key that a row does not see changes nothing: its probability is exactly 0, the maximum stays, and what was summed is
multiplied by exactly 1. So does a split wholly past the row's position. Merging a first split into nothing gives that
split, hence the way around the merge when there is only one.
The order of a sum must not depend on how many rows or warps a tile has. A maximum has no order, and products on tensor
cores go through the keys 16 by 16 for any tile; a sum over a row, as `tl.sum` does it, would go along with the layout
of the tile's registers. So the sum of probabilities is a product too, with a matrix of ones. And no multiplication is
fused with an addition but where it says `tl.fma`: the compiler would choose by what stands around it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pronk.kernels.gpu.attention_plan import UNSPECIALIZED

ONES = 8
"""Columns of the matrix of ones: the narrowest product there is."""


@triton.jit
def attend_tile(
    q, top, total, weighted, first_key, positions, context_len, table, keys, values, key_scales, value_scales, kv_head,
    SCALE: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, ONES: tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of online softmax (FlashAttention, Dao et al. 2022, algorithm 1): keys first_key to + BLOCK_N.

    q [M, D], positions [M, 1]. So far, float32: top [M, 1] the largest score, times log2(e); total [M, ONES] the sum of
    probabilities, in every column; weighted [M, D] the sum of probability · value. -> the three, this tile included.
    MASKED False: every row sees every key of the tile.
    """
    lanes = tl.arange(0, BLOCK_N)
    key = first_key + lanes
    held = key < context_len
    # The cache as rows, [B · KV · P, D]. A large one has fewer than 2^31 rows, but more elements.
    if BLOCK_SIZE % BLOCK_N == 0:
        block = tl.load(table + first_key // BLOCK_SIZE)
        first_row = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + first_key % BLOCK_SIZE
        rows = lanes
    else:
        block = tl.load(table + key // BLOCK_SIZE, mask=held, other=0).to(tl.int32)
        first_row = 0
        rows = ((block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE).to(tl.int64)
    offsets = rows[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    if MASKED:
        # What lies past the sequence's keys may be NaN, and must not meet a probability of 0.
        k = tl.load(keys + first_row * HEAD_DIM + offsets, mask=held[:, None], other=0.0)
        v = tl.load(values + first_row * HEAD_DIM + offsets, mask=held[:, None], other=0.0)
    else:
        k = tl.load(keys + first_row * HEAD_DIM + offsets)
        v = tl.load(values + first_row * HEAD_DIM + offsets)

    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
    unit: tl.constexpr = 1.0 if SCALED else SCALE
    if SCALED:
        scores *= (tl.load(key_scales + first_row + rows, mask=held, other=0.0) * SCALE)[None, :]
    if MASKED:
        scores = tl.where(key[None, :] <= positions, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1, keep_dims=True) * unit)
    # A row that has seen no key yet has no top to measure from: any number gives exp2(-inf) = 0.
    origin = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    probabilities = tl.exp2(tl.fma(scores, unit, -origin))
    rescale = tl.exp2(top - origin)

    # Probabilities of float8 values go with bfloat16, whose range takes the values' scales in.
    narrow = tl.bfloat16 if SCALED and q.dtype != tl.float32 else q.dtype
    ones = tl.full((BLOCK_N, ONES), 1.0, tl.float32).to(narrow)
    total = tl.dot(probabilities.to(narrow), ones, total * rescale, input_precision="ieee")
    if SCALED:
        probabilities *= tl.load(value_scales + first_row + rows, mask=held, other=0.0)[None, :]
    weighted = tl.dot(probabilities.to(narrow), v.to(narrow), weighted * rescale, input_precision="ieee")
    return new_top, total, weighted


@triton.jit
def merge(top, total, weighted, split_top, split_total, split_weighted):
    """One more split into those before it: tops and totals [M, 1], weighted [M, D], float32. -> the three."""
    new_top = tl.maximum(top, split_top)
    rescale = tl.exp2(top - new_top)
    split_rescale = tl.exp2(split_top - new_top)
    total = tl.fma(total, rescale, split_total * split_rescale)
    weighted = tl.fma(weighted, rescale, split_weighted * split_rescale)
    return new_top, total, weighted


@triton.jit(do_not_specialize=UNSPECIALIZED)
def decode_kernel(
    q, keys, values, key_scales, value_scales, out, partial_weighted, partial_tops, partial_totals,
    items, counts, starts, lens, context_lens, block_tables, table_width,
    SCALE: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEY_SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ITEM: tl.constexpr, ONES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """q and out [T, Q, D]; keys and values [B, KV, P, D], their scales [B, KV, P] or None; partial_weighted float32
    [slots, Q, D], partial_tops and partial_totals [slots, Q]; items int32 [.., ITEM] and counts of the plan."""
    dims = tl.arange(0, HEAD_DIM)[None, :]
    for work in range(tl.program_id(0), tl.load(counts) * NUM_KV_HEADS, tl.num_programs(0)):
        item = items + work // NUM_KV_HEADS * ITEM
        kv_head = work % NUM_KV_HEADS
        sequence = tl.load(item)
        first_key = tl.load(item + 1)
        first_row = tl.load(item + 2)
        first_slot = tl.load(item + 3)
        length = tl.load(lens + sequence).to(tl.int32)
        context_len = tl.load(context_lens + sequence).to(tl.int32)
        table = block_tables + sequence.to(tl.int64) * table_width

        rows = first_row + tl.arange(0, BLOCK_M)[:, None]
        tokens = rows // GROUP
        used = tokens < length
        positions = context_len - length + tokens
        heads = kv_head * GROUP + rows % GROUP
        q_rows = (tl.load(starts + sequence) + tokens) * (NUM_KV_HEADS * GROUP) + heads
        q_tile = tl.load(q + q_rows * HEAD_DIM + dims, mask=used, other=0.0)

        top = tl.full((BLOCK_M, 1), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M, ONES), tl.float32)
        weighted = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
        last_token = tl.minimum((first_row + BLOCK_M - 1) // GROUP, length - 1)
        end = tl.minimum(first_key + KEY_SPLIT, context_len - length + last_token + 1)
        for key in range(first_key, end, BLOCK_N):
            top, total, weighted = attend_tile(
                q_tile, top, total, weighted, key, positions, context_len, table,
                keys, values, key_scales, value_scales, kv_head,
                SCALE, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, ONES, SCALED, MASKED=True,
            )  # fmt: skip
        total = tl.max(total, 1, keep_dims=True)

        # Read and worked out again: else addresses take up registers while the keys are walked.
        rows = tl.load(item + 2, volatile=True) + tl.arange(0, BLOCK_M)[:, None]
        tokens = rows // GROUP
        used = tokens < length
        heads = kv_head * GROUP + rows % GROUP
        if first_slot < 0:
            q_rows = (tl.load(starts + sequence) + tokens) * (NUM_KV_HEADS * GROUP) + heads
            tl.store(out + q_rows * HEAD_DIM + dims, (weighted / total).to(out.dtype.element_ty), mask=used)
        else:
            # Only what a row sees has a slot that is read.
            used &= positions >= first_key
            slots = first_slot + tokens * tl.cdiv(context_len, KEY_SPLIT) + first_key // KEY_SPLIT
            partials = slots.to(tl.int64) * (NUM_KV_HEADS * GROUP) + heads
            tl.store(partial_weighted + partials * HEAD_DIM + dims, weighted, mask=used)
            tl.store(partial_tops + partials, top, mask=used)
            tl.store(partial_totals + partials, total, mask=used)


@triton.jit
def combine_kernel(
    out, partial_weighted, partial_tops, partial_totals, items, counts,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ITEM: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """As `decode_kernel`; items are (token, first slot, number of slots)."""
    dims = tl.arange(0, HEAD_DIM)[None, :]
    for work in range(tl.program_id(0), tl.load(counts + 1) * NUM_HEADS, tl.num_programs(0)):
        item = items + work // NUM_HEADS * ITEM
        head = work % NUM_HEADS
        token = tl.load(item).to(tl.int64)
        partial = tl.load(item + 1).to(tl.int64) * NUM_HEADS + head
        # A thread for each dimension, and tops and totals in all of them.
        tops = partial_tops + partial + dims * 0
        totals = partial_totals + partial + dims * 0
        sums = partial_weighted + partial * HEAD_DIM + dims
        top = tl.full((1, HEAD_DIM), float("-inf"), tl.float32)
        total = tl.zeros((1, HEAD_DIM), tl.float32)
        weighted = tl.zeros((1, HEAD_DIM), tl.float32)
        count = tl.load(item + 2)
        for first in range(0, count, UNROLL):
            # All loads of a turn are under way together; what is left out changes nothing.
            for split in tl.static_range(UNROLL):
                mask = first + split < count
                top, total, weighted = merge(
                    top, total, weighted,
                    tl.load(tops + split * NUM_HEADS, mask=mask, other=float("-inf")),
                    tl.load(totals + split * NUM_HEADS, mask=mask, other=0.0),
                    tl.load(sums + split * NUM_HEADS * HEAD_DIM, mask=mask, other=0.0),
                )  # fmt: skip
            tops += UNROLL * NUM_HEADS
            totals += UNROLL * NUM_HEADS
            sums += UNROLL * NUM_HEADS * HEAD_DIM
        tl.store(out + (token * NUM_HEADS + head) * HEAD_DIM + dims, (weighted / total).to(out.dtype.element_ty))
