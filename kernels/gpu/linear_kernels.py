"""Linear layers: a product, and what follows it while its outputs are still in registers.

Shapes. x [T, K], weight [N, K]. BLOCK_M rows and BLOCK_N outputs are a tile, K whole: `linear_sums` has the loop.

Grid. One program for each tile, in one dimension; a group of up to 8 tiles of rows goes through N side by side.

Bytes. The weight once, N · K · itemsize (and its scales); with few rows all else is small: x is read again by each tile
of outputs, but from the L2 cache.

Floor, at the 4.3 TB/s that an H200 copies with, for up to some hundred rows of the 1B in bfloat16: qkv 12.6 MB 2.9 µs,
output 8.4 MB 2.0 µs, gate and up 67.1 MB 15.6 µs, down 33.6 MB 7.8 µs: 28.3 µs a layer; the head 525 MB 122 µs. int8
and fp8: half; int4: 5 bits for each number, its scale included, 0.31 of it. For many rows: 2 · T · N · K operations at
790 TFLOP/s dense, 2.5 ms for 1000 rows of the 1B.

What follows is fused with the rounding in between kept: a sum is rounded to the activations' dtype, as if it had been
written, and taken up again in float32. Then the same `@triton.jit` function calculates that the unfused kernel calls.
Compiled in two places it must give the same bits, so all launches are made with enable_fp_fusion=False: the compiler
would fuse a multiplication with an addition here and not there, by what stands around them. (`tl.dot` and `tl.fma` are
not concerned.)

Two outputs that belong together, a gate and its up, or the two of a rotated pair, are neighbours in a tile: columns 2i
and 2i + 1. Their rows of the weight are far apart, which costs nothing, since each is read as a line of its own; and on
tensor cores one thread holds both.

The number of rows is not specialised: one compilation of a tile serves 1, 5 or 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pronk.kernels.gpu.activation import silu_mul
from pronk.kernels.gpu.linear_sums import sums, tile_of
from pronk.kernels.gpu.rope import rotate


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    x_ptr, x_stride, w_ptr, scales_ptr, out_ptr, num_rows, num_outputs, num_inputs,
    FORMAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SEGMENTS: tl.constexpr, AT_ONCE: tl.constexpr, EVEN_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [T, N]"""
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_outputs, BLOCK_N)
    m, n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP)
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = sums(
        x_ptr, x_stride, rows, num_rows, w_ptr, scales_ptr, tl.minimum(columns, num_outputs - 1), num_outputs,
        num_inputs, FORMAT, BLOCK_M, BLOCK_N, BLOCK_K, SEGMENTS, AT_ONCE, EVEN_K,
    )  # fmt: skip
    places = rows.to(tl.int64)[:, None] * num_outputs + columns[None, :]
    mask = (rows < num_rows)[:, None] & (columns < num_outputs)[None, :]
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def pairs(total, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile -> its even columns and its odd ones, [BLOCK_M, BLOCK_N / 2]: rounded to DTYPE, as float32."""
    rounded = total.to(DTYPE).to(tl.float32)
    return tl.split(tl.reshape(rounded, (BLOCK_M, BLOCK_N // 2, 2)))


@triton.jit(do_not_specialize=["num_rows"])
def linear_silu_mul_kernel(
    x_ptr, x_stride, w_ptr, scales_ptr, out_ptr, num_rows, num_outputs, num_inputs,
    FORMAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SEGMENTS: tl.constexpr, AT_ONCE: tl.constexpr, EVEN_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [T, F], of num_outputs = 2F"""
    width = num_outputs // 2
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_outputs, BLOCK_N)
    m, n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP)
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    gates = tl.minimum(n * (BLOCK_N // 2) + columns // 2, width - 1)
    total = sums(
        x_ptr, x_stride, rows, num_rows, w_ptr, scales_ptr, gates + columns % 2 * width, num_outputs,
        num_inputs, FORMAT, BLOCK_M, BLOCK_N, BLOCK_K, SEGMENTS, AT_ONCE, EVEN_K,
    )  # fmt: skip
    gate, up = pairs(total, out_ptr.dtype.element_ty, BLOCK_M, BLOCK_N)
    out_columns = n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    places = rows.to(tl.int64)[:, None] * width + out_columns[None, :]
    mask = (rows < num_rows)[:, None] & (out_columns < width)[None, :]
    tl.store(out_ptr + places, silu_mul(gate, up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def linear_rope_and_cache_kernel(
    x_ptr, x_stride, w_ptr, scales_ptr, out_ptr, num_rows, num_outputs, num_inputs,
    positions_ptr, cos_sin_ptr, slots_ptr, keys_ptr, values_ptr,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    FORMAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SEGMENTS: tl.constexpr, AT_ONCE: tl.constexpr, EVEN_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [T, Q, D]: the queries. keys, values [B, KV, P, D] are written at `slots`, where these are not negative."""
    half: tl.constexpr = HEAD_DIM // 2
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_outputs, BLOCK_N)
    m, n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP)
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    pair = tl.minimum(n * (BLOCK_N // 2) + columns // 2, num_outputs // 2 - 1)
    total = sums(
        x_ptr, x_stride, rows, num_rows, w_ptr, scales_ptr,
        pair // half * HEAD_DIM + pair % half + columns % 2 * half, num_outputs,
        num_inputs, FORMAT, BLOCK_M, BLOCK_N, BLOCK_K, SEGMENTS, AT_ONCE, EVEN_K,
    )  # fmt: skip
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    first, second = pairs(total, dtype, BLOCK_M, BLOCK_N)

    pair = n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    head, i = pair // half, pair % half
    num_heads = num_outputs // HEAD_DIM - 2 * NUM_KV_HEADS
    is_query, is_value = head < num_heads, head >= num_heads + NUM_KV_HEADS
    inside = (rows < num_rows)[:, None] & (pair < num_outputs // 2)[None, :]
    positions = tl.load(positions_ptr + rows, mask=rows < num_rows, other=0)
    angles = cos_sin_ptr + positions[:, None] * HEAD_DIM + i[None, :]
    turns = inside & ~is_value[None, :]
    cos = tl.load(angles, mask=turns, other=1.0)
    sin = tl.load(angles + half, mask=turns, other=0.0)
    turned_first, turned_second = rotate(first, second, cos, sin)
    first = tl.where(is_value[None, :], first, turned_first).to(dtype)
    second = tl.where(is_value[None, :], second, turned_second).to(dtype)

    places = (rows.to(tl.int64) * num_heads)[:, None] * HEAD_DIM + (head * HEAD_DIM + i)[None, :]
    mask = inside & is_query[None, :]
    tl.store(out_ptr + places, first, mask=mask)
    tl.store(out_ptr + places + half, second, mask=mask)

    slots = tl.load(slots_ptr + rows, mask=rows < num_rows, other=-1)
    kv_head = head - num_heads - tl.where(is_value, NUM_KV_HEADS, 0)
    # A cache may have more than 2^31 elements: slots are int64.
    cache_rows = (slots // BLOCK_SIZE * NUM_KV_HEADS)[:, None] + kv_head[None, :]
    places = (cache_rows * BLOCK_SIZE + (slots % BLOCK_SIZE)[:, None]) * HEAD_DIM + i[None, :]
    mask = inside & (slots >= 0)[:, None] & ~is_query[None, :]
    is_value = is_value[None, :]
    tl.store(keys_ptr + places, first.to(keys_ptr.dtype.element_ty), mask=mask & ~is_value)
    tl.store(keys_ptr + places + half, second.to(keys_ptr.dtype.element_ty), mask=mask & ~is_value)
    tl.store(values_ptr + places, first.to(values_ptr.dtype.element_ty), mask=mask & is_value)
    tl.store(values_ptr + places + half, second.to(values_ptr.dtype.element_ty), mask=mask & is_value)


@triton.jit(do_not_specialize=["num_rows"])
def linear_largest_kernel(
    x_ptr, x_stride, w_ptr, scales_ptr, largest_ptr, ids_ptr, num_rows, num_outputs, num_inputs, DTYPE: tl.constexpr,
    FORMAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SEGMENTS: tl.constexpr, AT_ONCE: tl.constexpr, EVEN_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The largest of each tile's outputs, and the lowest place of one: largest float32, ids int32 [T, tiles of N].

    Outputs are rounded to DTYPE first. ids -1: one is NaN or infinite; largest NaN: one is NaN.
    """
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_outputs, BLOCK_N)
    m, n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP)
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    # The tile's last outputs repeat, if it reaches past the end: that changes no maximum.
    outputs = tl.minimum(columns, num_outputs - 1)
    total = sums(
        x_ptr, x_stride, rows, num_rows, w_ptr, scales_ptr, outputs, num_outputs,
        num_inputs, FORMAT, BLOCK_M, BLOCK_N, BLOCK_K, SEGMENTS, AT_ONCE, EVEN_K,
    )  # fmt: skip
    values = total.to(DTYPE).to(tl.float32)
    ids = tl.broadcast_to(outputs[None, :], (BLOCK_M, BLOCK_N))
    ids = tl.where(tl.abs(values) < float("inf"), ids, -1)  # a NaN is no less than anything
    largest, first = largest_of(values, ids)
    places = rows.to(tl.int64) * tiles_n + n
    tl.store(largest_ptr + places, largest, mask=rows < num_rows)
    tl.store(ids_ptr + places, first, mask=rows < num_rows)


@triton.jit
def largest_of(values, ids):
    """values float32 and ids int32 [M, N] -> of each row the largest value, NaN if one is; and the lowest of the ids
    that have it, -1 if any id of the row is."""
    is_nan = values != values
    largest = tl.max(tl.where(is_nan, float("-inf"), values), axis=1)
    first = tl.min(tl.where(values == largest[:, None], ids, 2147483647), axis=1)
    first = tl.where(tl.min(ids, axis=1) < 0, -1, first)
    return tl.where(tl.max(is_nan.to(tl.int32), axis=1) > 0, float("nan"), largest), first


@triton.jit
def largest_of_tiles_kernel(partial_ptr, partial_ids_ptr, largest_ptr, ids_ptr, num_tiles, BLOCK: tl.constexpr):
    """A program for each row: partials float32 and int32 [T, num_tiles] -> largest float32 [T], ids int64 [T]."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, BLOCK)
    # A tile to spare repeats the last, which changes no maximum.
    places = row * num_tiles + tl.minimum(tiles, num_tiles - 1)
    values, ids = tl.load(partial_ptr + places), tl.load(partial_ids_ptr + places)
    largest, first = largest_of(values[None, :], ids[None, :])
    one = tl.arange(0, 1)
    tl.store(largest_ptr + row + one, largest)
    tl.store(ids_ptr + row + one, first.to(tl.int64))
