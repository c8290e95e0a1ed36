"""The sum in every linear layer: x [T, K] times the transpose of a weight [N, K], one tile of outputs in each program.

Numbers, promise 1. The K products of an output are added in one order, whatever the tile, the number of rows, and the
row's place among them:
1. K is cut into SEGMENTS parts of equal length. In each part BLOCK_K products at a time go into one float32 accumulator
   (`tl.dot`), in ascending order.
2. The parts' sums are added in ascending order, beginning with zero.
BLOCK_K and SEGMENTS belong to the weight (`linear_tiles`). No atomics; no program shares an output with another.
Products are exact in float32: of two numbers of 16 bits, or of one with an int8, a float8 or an int4, which 16 bits
hold. The scale of an output multiplies its finished sum.

One thing this rests on that only a GPU can show: tiles of few rows and of many are multiplied by different instructions
(mma.sync, and from 64 rows on wgmma or tcgen05), which must add a block's products alike. The same tests hold it there
(pytest -m gpu).

Why parts. Tensor cores add 16 products at a time into an accumulator, about 33 cycles after the 16 before them. One
chain over K = 8192 takes 17,000 cycles, 9 µs, while the 34 MB of the 1B's down projection can be read in 8. A tile of
few rows walks its parts at once, each in a warp of its own (AT_ONCE): a quarter of the chain, and four times the bytes
in a turn of the loop. In a tile of many rows the accumulators fill the registers; it walks one part after the other.

int4 has a scale for each 32 inputs, which must come between their products and the accumulator. So the 32 products are
a sum of their own, which `tl.fma` multiplies and adds to the part, in ascending order. It always walks its parts at
once; many rows are many tiles of 32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(program, num_tiles_m, num_tiles_n, GROUP: tl.constexpr):
    """-> the program's tile (m, n). Programs that run together share rows and weights in the L2 cache: GROUP tiles of
    rows go through the weight side by side, so that few tiles of rows read it from memory once."""
    group = program // (GROUP * num_tiles_n)
    height = tl.minimum(num_tiles_m - group * GROUP, GROUP)
    within = program - group * GROUP * num_tiles_n
    return group * GROUP + within % height, within // height


@triton.jit
def sums(
    x_ptr, x_stride, rows, num_rows, w_ptr, scales_ptr, outputs, num_outputs, num_inputs,
    FORMAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SEGMENTS: tl.constexpr, AT_ONCE: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """-> float32 [BLOCK_M, BLOCK_N]: x[rows] · weight[outputs]ᵀ, scaled.

    rows [BLOCK_M]: those from num_rows on give zeros. outputs [BLOCK_N]: rows of the weight, all of them below
    num_outputs; a tile that reaches past the end repeats the last, and throws it away. EVEN_K: no block is partial.
    """
    x_rows = x_ptr + rows.to(tl.int64) * x_stride
    x_mask = rows < num_rows
    if FORMAT == "int4":
        total = _parts_of_int4(
            x_rows, x_mask, w_ptr, scales_ptr, outputs, num_outputs, num_inputs, BLOCK_M, BLOCK_N, SEGMENTS, EVEN_K
        )
    else:
        w_rows = w_ptr + outputs.to(tl.int64) * num_inputs
        if AT_ONCE:
            total = _parts_at_once(
                x_rows, x_mask, w_rows, num_inputs, BLOCK_M, BLOCK_N, BLOCK_K, SEGMENTS, EVEN_K
            )  # fmt: skip
        else:
            total = _parts_in_turn(
                x_rows, x_mask, w_rows, num_inputs, BLOCK_M, BLOCK_N, BLOCK_K, SEGMENTS, EVEN_K
            )  # fmt: skip
        if FORMAT != "plain":
            total *= tl.load(scales_ptr + outputs)[None, :]
    return total


@triton.jit
def _parts_in_turn(
    x_rows, x_mask, w_rows, num_inputs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SEGMENTS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """One loop over all of K, so that loads and products of one part overlap with those of the next."""
    length = tl.cdiv(num_inputs, SEGMENTS * BLOCK_K) * BLOCK_K
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, SEGMENTS * length, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if EVEN_K:
            x = tl.load(x_rows[:, None] + k[None, :], mask=x_mask[:, None], other=0.0)
            w = tl.load(w_rows[None, :] + k[:, None])
        else:
            x = tl.load(x_rows[:, None] + k[None, :], mask=x_mask[:, None] & (k < num_inputs)[None, :], other=0.0)
            w = tl.load(w_rows[None, :] + k[:, None], mask=(k < num_inputs)[:, None], other=0.0)
        part = tl.dot(x, w.to(x.dtype), part, input_precision="ieee")
        if (start + BLOCK_K) % length == 0:
            total += part
            part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    return total


@triton.jit
def _parts_at_once(
    x_rows, x_mask, w_rows, num_inputs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SEGMENTS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Four products side by side, [4, BLOCK_M, BLOCK_K] · [4, BLOCK_K, BLOCK_N]. The weight is not read again soon: it
    passes by the L1 cache, and is the first to leave the L2."""
    length = tl.cdiv(num_inputs, SEGMENTS * BLOCK_K) * BLOCK_K
    first_k = (tl.arange(0, SEGMENTS) * length)[:, None] + tl.arange(0, BLOCK_K)[None, :]
    x_ptrs = x_rows[None, :, None] + first_k[:, None, :]
    w_ptrs = w_rows[None, None, :] + first_k[:, :, None]
    parts = tl.zeros((SEGMENTS, BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, length, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs + start, mask=x_mask[None, :, None], other=0.0)
            w = tl.load(w_ptrs + start, eviction_policy="evict_first")
        else:
            inside = first_k + start < num_inputs
            x = tl.load(x_ptrs + start, mask=x_mask[None, :, None] & inside[:, None, :], other=0.0)
            w = tl.load(w_ptrs + start, mask=inside[:, :, None], other=0.0)
        parts = tl.dot(x, w.to(x.dtype), parts, input_precision="ieee")
    return _sum_of_parts(parts, BLOCK_M, BLOCK_N)


@triton.jit
def _parts_of_int4(
    x_rows, x_mask, w_ptr, scales_ptr, outputs, num_outputs, num_inputs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SEGMENTS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """The weight as `linear.pack` lays it: uint8 [K / 64, N, 32], a byte holding inputs i (low) and i + 32 (high) of
    its 64, each plus 8; scales float32 [K / 32, N].

    A turn of the loop takes two times 64 inputs of each part. Triton fetches ahead what goes into a product, and no
    more, so the scales are fetched a turn ahead by hand.
    """
    turns = tl.cdiv(num_inputs, SEGMENTS * 128)
    unit = tl.arange(0, SEGMENTS) * turns * 2
    parts = tl.zeros((SEGMENTS, BLOCK_M, BLOCK_N), dtype=tl.float32)
    scales = _scales_of_int4(scales_ptr, unit, outputs, num_outputs, num_inputs)
    more_scales = _scales_of_int4(scales_ptr, unit + 1, outputs, num_outputs, num_inputs)
    for turn in range(turns):
        now = unit + 2 * turn
        coming_scales = _scales_of_int4(scales_ptr, now + 2, outputs, num_outputs, num_inputs)
        more_coming_scales = _scales_of_int4(scales_ptr, now + 3, outputs, num_outputs, num_inputs)
        parts = _add_int4(
            parts, x_rows, x_mask, w_ptr, scales, now, outputs, num_outputs, num_inputs,
            BLOCK_M, BLOCK_N, SEGMENTS, EVEN_K,
        )  # fmt: skip
        parts = _add_int4(
            parts, x_rows, x_mask, w_ptr, more_scales, now + 1, outputs, num_outputs, num_inputs,
            BLOCK_M, BLOCK_N, SEGMENTS, EVEN_K,
        )  # fmt: skip
        scales = coming_scales
        more_scales = more_coming_scales
    return _sum_of_parts(parts, BLOCK_M, BLOCK_N)


@triton.jit
def _add_int4(
    parts, x_rows, x_mask, w_ptr, scales, unit, outputs, num_outputs, num_inputs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SEGMENTS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """parts + the products of 64 inputs in each part, those of unit [SEGMENTS]."""
    i = tl.arange(0, 32)
    x_ptrs = x_rows[None, :, None] + (unit[:, None] * 64 + i[None, :])[:, None, :]
    w_rows = (unit.to(tl.int64) * num_outputs)[:, None] + outputs[None, :]
    w_ptrs = w_ptr + w_rows[:, None, :] * 32 + i[None, :, None]
    if EVEN_K:
        bytes = tl.load(w_ptrs, eviction_policy="evict_first")
        low_x = tl.load(x_ptrs, mask=x_mask[None, :, None], other=0.0)
        high_x = tl.load(x_ptrs + 32, mask=x_mask[None, :, None], other=0.0)
    else:
        inside = (unit * 64 < num_inputs)[:, None, None]
        bytes = tl.load(w_ptrs, mask=inside, other=0)
        low_x = tl.load(x_ptrs, mask=x_mask[None, :, None] & inside, other=0.0)
        inside = (unit * 64 + 32 < num_inputs)[:, None, None]
        high_x = tl.load(x_ptrs + 32, mask=x_mask[None, :, None] & inside, other=0.0)
    low_scales, high_scales = tl.split(scales)
    low = tl.dot(low_x, ((bytes & 15).to(tl.int8) - 8).to(low_x.dtype), input_precision="ieee")
    parts = tl.fma(low, tl.broadcast_to(low_scales[:, None, :], (SEGMENTS, BLOCK_M, BLOCK_N)), parts)
    high = tl.dot(high_x, ((bytes >> 4).to(tl.int8) - 8).to(low_x.dtype), input_precision="ieee")
    return tl.fma(high, tl.broadcast_to(high_scales[:, None, :], (SEGMENTS, BLOCK_M, BLOCK_N)), parts)


@triton.jit
def _scales_of_int4(scales_ptr, unit, outputs, num_outputs, num_inputs):
    """unit [SEGMENTS] -> the scales of both its groups, [SEGMENTS, BLOCK_N, 2]; zero where there is none."""
    group = unit[:, None, None] * 2 + tl.arange(0, 2)[None, None, :]
    places = scales_ptr + group.to(tl.int64) * num_outputs + outputs[None, :, None]
    return tl.load(places, mask=group * 32 < num_inputs, other=0.0)


@triton.jit
def _sum_of_parts(parts, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """parts [4, BLOCK_M, BLOCK_N] -> their sum, in ascending order from zero."""
    even, odd = tl.split(tl.reshape(tl.permute(parts, (1, 2, 0)), (BLOCK_M, BLOCK_N, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    total += first
    total += second
    total += third
    total += fourth
    return total
