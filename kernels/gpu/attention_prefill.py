"""Flash attention over a paged cache for sequences with many query tokens: one program walks all of a tile's keys.

Shapes. Rows are packed as in `attention_decode`, BLOCK_M of them a tile: 64 rows are 16 tokens with G = 4.

Grid. Persistent: an item is (sequence, tile of rows), times the KV heads; a sequence's last tiles, which see the most
keys, come first, so that none is left for the end. KV heads change fastest.

Bytes and operations. A tile reads its keys and values, 2 · D · itemsize for each key and mostly from the L2 cache, and
does 4 · BLOCK_M · D operations on them: with bfloat16, BLOCK_M for each byte. So the tensor cores are the limit.

Floor. 2 · n² · Q · D operations for a prompt of n tokens: 2.7e11 a layer for 8k tokens of the 1B, 350 µs at the 790
TFLOP/s that an H200 multiplies with. exp2, 16 a cycle on a multiprocessor, takes about as long with D = 64; programs
that share one overlap the two.

Numbers: those of `attention_decode`, to the bit. A program keeps the split that it is in and the merged splits before
it apart, which takes twice the registers, and merges where `combine_kernel` would.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pronk.kernels.gpu.attention_decode import attend_tile, merge
from pronk.kernels.gpu.attention_plan import UNSPECIALIZED


@triton.jit
def walk(
    q, top, total, weighted, split_top, split_total, split_weighted, first_key, end, positions, context_len, table,
    keys, values, key_scales, value_scales, kv_head,
    SCALE: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KEY_SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, ONES: tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tiles of keys from first_key to end; wherever a split ends, it is merged. One loop over all tiles, so that loads
    run ahead from one split to the next. -> both states."""
    for key in range(first_key, end, BLOCK_N):
        split_top, split_total, split_weighted = attend_tile(
            q, split_top, split_total, split_weighted, key, positions, context_len, table,
            keys, values, key_scales, value_scales, kv_head,
            SCALE, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, ONES, SCALED, MASKED,
        )  # fmt: skip
        if (key + BLOCK_N) % KEY_SPLIT == 0:
            top, total, weighted = merge(
                top, total, weighted, split_top, tl.max(split_total, 1, keep_dims=True), split_weighted
            )
            split_top = tl.full(split_top.shape, float("-inf"), tl.float32)
            split_total = tl.zeros(split_total.shape, tl.float32)
            split_weighted = tl.zeros(split_weighted.shape, tl.float32)
    return top, total, weighted, split_top, split_total, split_weighted


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prefill_kernel(
    q, keys, values, key_scales, value_scales, out,
    items, counts, starts, lens, context_lens, block_tables, table_width,
    SCALE: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEY_SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ITEM: tl.constexpr, ONES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """As `attention_decode.decode_kernel`; items are (sequence, first row)."""
    dims = tl.arange(0, HEAD_DIM)[None, :]
    for work in range(tl.program_id(0), tl.load(counts + 2) * NUM_KV_HEADS, tl.num_programs(0)):
        item = items + work // NUM_KV_HEADS * ITEM
        kv_head = work % NUM_KV_HEADS
        sequence = tl.load(item)
        first_row = tl.load(item + 1)
        length = tl.load(lens + sequence).to(tl.int32)
        context_len = tl.load(context_lens + sequence).to(tl.int32)
        table = block_tables + sequence.to(tl.int64) * table_width

        rows = first_row + tl.arange(0, BLOCK_M)[:, None]
        tokens = rows // GROUP
        positions = context_len - length + tokens
        q_rows = (tl.load(starts + sequence) + tokens) * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + rows % GROUP
        q_tile = tl.load(q + q_rows * HEAD_DIM + dims, mask=tokens < length, other=0.0)

        top = tl.full((BLOCK_M, 1), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M, 1), tl.float32)
        weighted = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
        split_total = tl.zeros((BLOCK_M, ONES), tl.float32)
        last_token = tl.minimum((first_row + BLOCK_M - 1) // GROUP, length - 1)
        seen_by_all = context_len - length + first_row // GROUP + 1
        masked_from = seen_by_all // BLOCK_N * BLOCK_N
        end = context_len - length + last_token + 1
        top, total, weighted, split_top, split_total, split_weighted = walk(
            q_tile, top, total, weighted, top, split_total, weighted, 0, masked_from, positions, context_len, table,
            keys, values, key_scales, value_scales, kv_head,
            SCALE, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEY_SPLIT, BLOCK_N, ONES, SCALED, MASKED=False,
        )  # fmt: skip
        top, total, weighted, split_top, split_total, split_weighted = walk(
            q_tile, top, total, weighted, split_top, split_total, split_weighted, masked_from, end, positions,
            context_len, table, keys, values, key_scales, value_scales, kv_head,
            SCALE, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEY_SPLIT, BLOCK_N, ONES, SCALED, MASKED=True,
        )  # fmt: skip
        # The last split, unless it ended with a tile: then this is an empty one, which changes nothing.
        top, total, weighted = merge(
            top, total, weighted, split_top, tl.max(split_total, 1, keep_dims=True), split_weighted
        )
        # Read and worked out again, so that addresses take up no registers while the keys are walked.
        rows = tl.load(item + 1, volatile=True) + tl.arange(0, BLOCK_M)[:, None]
        tokens = rows // GROUP
        q_rows = (tl.load(starts + sequence) + tokens) * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + rows % GROUP
        tl.store(out + q_rows * HEAD_DIM + dims, (weighted / total).to(out.dtype.element_ty), mask=tokens < length)
