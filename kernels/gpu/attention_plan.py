"""The lists of work that the attention kernels take their items from: made on the device, once for all layers.

Grid: one program for each of the S places in the batch. Each counts what the places before it bring, 16 bytes for each
from the L2 cache, and so knows where in the lists its own items go: no program waits for another, nor the host for any.
Bytes: 16 for each item. The floor is a launch.

Which kernel. Sequences of up to DECODE_TOKENS tokens go to the decode kernel, longer ones to the prefill kernel; so do
those for whose partials no room is left. That changes no bits, as both kernels give the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

ITEM = 4
"""int32 in an item: 16 bytes."""
COUNTS = 3
"""int32: how many items the decode, the combine and the prefill kernel have."""
UNSPECIALIZED = ("starts", "lens", "context_lens", "block_tables", "table_width", "room")
"""Parameters of the kernels that change from step to step: Triton would compile one version for multiples of 16 and one
for other numbers and addresses, and neither is faster, since nothing wide is read with them."""


@triton.jit(do_not_specialize=UNSPECIALIZED)
def plan_kernel(
    starts, lens, context_lens, decode_items, combine_items, prefill_items, counts, room,
    GROUP: tl.constexpr, DECODE_TOKENS: tl.constexpr, DECODE_M: tl.constexpr, PREFILL_M: tl.constexpr,
    KEY_SPLIT: tl.constexpr, ITEM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """starts, lens, context_lens int64 [S]. -> the items of each kernel, int32 [.., ITEM], in the order of the batch;
    counts int32 [COUNTS]. room: how many slots there are, one for each token and split that has to be merged."""
    this = tl.program_id(0)
    lanes = tl.arange(0, WIDTH)
    decoding, combining, prefilling, slots = 0, 0, 0, 0
    length, splits, decode_tiles, merged, prefill_tiles, first_slot = 0, 0, 0, 0, 0, 0
    for first in range(0, this + 1, WIDTH):
        sequences = first + lanes
        mask = sequences <= this
        each_length = tl.load(lens + sequences, mask=mask, other=0).to(tl.int32)
        each_splits = tl.cdiv(tl.load(context_lens + sequences, mask=mask, other=0).to(tl.int32), KEY_SPLIT)
        short = (each_length > 0) & (each_length <= DECODE_TOKENS)
        wanted = tl.where(short & (each_splits > 1), each_length * each_splits, 0)
        slots_after = slots + tl.cumsum(wanted, 0)
        decodes = short & ((wanted == 0) | (slots_after <= room))
        each_decode = tl.where(decodes, tl.cdiv(each_length * GROUP, DECODE_M), 0)
        each_merged = tl.where(decodes & (wanted > 0), each_length, 0)
        each_prefill = tl.where(decodes, 0, tl.cdiv(each_length * GROUP, PREFILL_M))

        before = sequences < this
        decoding += tl.sum(tl.where(before, each_decode * each_splits, 0), 0)
        combining += tl.sum(tl.where(before, each_merged, 0), 0)
        prefilling += tl.sum(tl.where(before, each_prefill, 0), 0)
        slots = tl.max(slots_after, 0)
        # Only in the last turn is there a lane for this sequence.
        own = sequences == this
        length = tl.sum(tl.where(own, each_length, 0), 0)
        splits = tl.sum(tl.where(own, each_splits, 0), 0)
        decode_tiles = tl.sum(tl.where(own, each_decode, 0), 0)
        merged = tl.sum(tl.where(own, each_merged, 0), 0)
        prefill_tiles = tl.sum(tl.where(own, each_prefill, 0), 0)
        first_slot = tl.sum(tl.where(own, slots_after - wanted, 0), 0)

    for first in range(0, decode_tiles * splits, WIDTH):
        number = first + lanes
        mask = number < decode_tiles * splits
        item = decode_items + (decoding + number) * ITEM
        tl.store(item, this, mask=mask)
        tl.store(item + 1, number // decode_tiles * KEY_SPLIT, mask=mask)
        tl.store(item + 2, number % decode_tiles * DECODE_M, mask=mask)
        tl.store(item + 3, tl.where(merged > 0, first_slot, -1), mask=mask)
    start = tl.load(starts + this).to(tl.int32)
    context_len = tl.load(context_lens + this).to(tl.int32)
    for first in range(0, merged, WIDTH):
        token = first + lanes
        mask = token < merged
        item = combine_items + (combining + token) * ITEM
        tl.store(item, start + token, mask=mask)
        tl.store(item + 1, first_slot + token * splits, mask=mask)
        tl.store(item + 2, (context_len - length + token) // KEY_SPLIT + 1, mask=mask)
    for first in range(0, prefill_tiles, WIDTH):
        number = first + lanes
        mask = number < prefill_tiles
        item = prefill_items + (prefilling + number) * ITEM
        tl.store(item, this, mask=mask)
        tl.store(item + 1, (prefill_tiles - 1 - number) * PREFILL_M, mask=mask)
    if this == tl.num_programs(0) - 1:
        tl.store(counts, decoding + decode_tiles * splits)
        tl.store(counts + 1, combining + merged)
        tl.store(counts + 2, prefilling + prefill_tiles)
