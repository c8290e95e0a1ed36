"""Rotary positions, and the way of keys and values into the paged cache.

Shapes. qkv [T, (Q + 2·KV)·D] -> queries [T, Q, D]; keys and values go to cache [B, KV, P, D], at block slot // P, place
slot % P; a negative slot's go nowhere. With a float8 cache, one scale for each token and head goes to [B, KV, P].

Grid. (T, ceil((Q + 2·KV) / HEADS)): a program turns HEADS neighbouring heads of a token. A head's first and second half
are two tiles, since pair i is (i, i + D/2); a thread has 8 neighbours of each, 16 bytes in bfloat16.

Bytes. (Q + 2·KV) · D · itemsize a token, read once and written once, and D · 4 of cosines and sines.

Floor, at the 4.3 TB/s that an H200 copies with: the 1B (48 heads of 64, bfloat16) moves 3.1 MB for 256 tokens, 0.7 µs:
up to there a call costs its launch. Where rows are few, the product before it does this on its way (`linear`).

`rotate` and `slot_of` below are what both call. Launches are made with enable_fp_fusion=False: a difference of products
that is fused rounds otherwise, and which of the two products would be left to the compiler.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pronk.kernels.gpu.compilation import Compilation
from pronk.kernels.interface import LayerCache

HEADS = 8
FLOAT8_LARGEST = tl.constexpr(448.0)
FLOAT32_TINIEST = tl.constexpr(1.1754943508222875e-38)
"""The smallest normal number: the scale of a row of zeros."""


@triton.jit
def rotate(first, second, cos, sin):
    """Pairs turned by an angle, all float32 (RoFormer, Su et al. 2021)."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def slot_of(slots_ptr, token, BLOCK_SIZE: tl.constexpr):
    """-> whether the token is written, its block, its place in the block. Of one that is not: 0 and 0."""
    slot = tl.load(slots_ptr + token)
    is_written = slot >= 0
    slot = tl.where(is_written, slot, 0)
    return is_written, slot // BLOCK_SIZE, slot % BLOCK_SIZE


@triton.jit
def rope_and_cache_kernel(
    qkv_ptr, positions_ptr, cos_sin_ptr, slots_ptr, queries_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token: queries, keys, values or some of each."""
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pairs = tl.arange(0, HALF)
    is_query = heads < NUM_HEADS
    is_key = (heads >= NUM_HEADS) & (heads < NUM_HEADS + NUM_KV_HEADS)
    is_value = (heads >= NUM_HEADS + NUM_KV_HEADS) & (heads < NUM_HEADS + 2 * NUM_KV_HEADS)
    is_head = (heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None]

    places = heads[:, None] * HEAD_DIM + pairs[None, :]
    row_ptr = qkv_ptr + token * (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    first = tl.load(row_ptr + places, mask=is_head, other=0.0).to(tl.float32)
    second = tl.load(row_ptr + places + HALF, mask=is_head, other=0.0).to(tl.float32)
    angles_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * HEAD_DIM
    cos, sin = tl.load(angles_ptr + pairs)[None, :], tl.load(angles_ptr + HALF + pairs)[None, :]
    turned_first, turned_second = rotate(first, second, cos, sin)
    DTYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    first = tl.where(is_value[:, None], first, turned_first).to(DTYPE)
    second = tl.where(is_value[:, None], second, turned_second).to(DTYPE)

    query_places = token * NUM_HEADS * HEAD_DIM + places
    tl.store(queries_ptr + query_places, first, mask=is_query[:, None])
    tl.store(queries_ptr + query_places + HALF, second, mask=is_query[:, None])
    is_written, block, place = slot_of(slots_ptr, token, BLOCK_SIZE)
    key_rows = (block * NUM_KV_HEADS + heads - NUM_HEADS) * BLOCK_SIZE + place
    value_rows = key_rows - NUM_KV_HEADS * BLOCK_SIZE
    write(keys_ptr, key_scales_ptr, key_rows, first, second, is_key & is_written, HEAD_DIM)
    write(values_ptr, value_scales_ptr, value_rows, first, second, is_value & is_written, HEAD_DIM)


@triton.jit
def write(cache_ptr, scales_ptr, rows, first, second, mask, HEAD_DIM: tl.constexpr):
    """first, second [HEADS, HEAD_DIM / 2]: halves of what goes to rows [HEADS] of a cache, as a table of HEAD_DIM."""
    HALF: tl.constexpr = HEAD_DIM // 2
    if scales_ptr is not None:
        first, second = first.to(tl.float32), second.to(tl.float32)
        largest = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1)
        scales = tl.maximum(tl.div_rn(largest, FLOAT8_LARGEST), FLOAT32_TINIEST)
        tl.store(scales_ptr + rows, scales, mask=mask)
        first = scaled(first, scales)
        second = scaled(second, scales)
    places = rows[:, None] * HEAD_DIM + tl.arange(0, HALF)[None, :]
    tl.store(cache_ptr + places, first.to(cache_ptr.dtype.element_ty), mask=mask[:, None])
    tl.store(cache_ptr + places + HALF, second.to(cache_ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit
def scaled(x, scales):
    """x [HEADS, D] over scales [HEADS], within float8's range: the largest may come out a rounding above it."""
    quotient = tl.div_rn(x, tl.broadcast_to(scales[:, None], x.shape))
    return tl.minimum(tl.maximum(quotient, -FLOAT8_LARGEST), FLOAT8_LARGEST)


def rope_and_cache(qkv: Tensor, positions: Tensor, cos_sin: Tensor, slots: Tensor, cache: LayerCache) -> Tensor:
    """See `Kernels.rope_and_cache`. Raises ValueError for heads that are no power of two, and for a cache that is not
    contiguous."""
    num_tokens = qkv.shape[0]
    _, num_kv_heads, block_size, head_dim = cache.keys.shape
    if head_dim & (head_dim - 1) or head_dim < 16:
        raise ValueError(f"heads of {head_dim} numbers: the GPU kernels have powers of two from 16 on")
    if not (cache.keys.is_contiguous() and cache.values.is_contiguous()):
        raise ValueError("the cache is not contiguous")
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    queries = qkv.new_empty(num_tokens, num_heads, head_dim)
    if num_tokens:
        grid = (num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, HEADS))
        rope_and_cache_kernel[grid](
            qkv.contiguous(),
            positions,
            cos_sin,
            slots,
            queries,
            cache.keys,
            cache.values,
            cache.key_scales,
            cache.value_scales,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_SIZE=block_size,
            HEADS=HEADS,
            num_warps=_num_warps(head_dim),
            enable_fp_fusion=False,
        )
    return queries


def _num_warps(head_dim: int) -> int:
    """8 numbers of each half for a thread."""
    return max(1, HEADS * head_dim // 2 // 8 // 32)


def _compilations() -> list[Compilation]:
    """The 1B, and on Hopper the 3B, whose heads are also the 8B's."""
    types = {"qkv_ptr": "*bf16", "positions_ptr": "*i64", "cos_sin_ptr": "*fp32", "slots_ptr": "*i64"}
    types["queries_ptr"] = "*bf16"
    found = []
    for model, num_heads, head_dim in (("1b", 32, 64), ("3b", 24, 128)):
        constants = {"NUM_HEADS": num_heads, "NUM_KV_HEADS": 8, "HEAD_DIM": head_dim, "BLOCK_SIZE": 16, "HEADS": HEADS}
        for cache in ("bf16", "fp8"):
            scaled = cache == "fp8"
            targets = (90,) if model == "3b" else (90, 100) if scaled else (80, 90, 100)
            scales = dict.fromkeys(("key_scales_ptr", "value_scales_ptr"), "*fp32" if scaled else None)
            caches = dict.fromkeys(("keys_ptr", "values_ptr"), "*fp8e4nv" if scaled else "*bf16")
            pointers = {**caches, **{key: kind for key, kind in scales.items() if kind is not None}}
            found.append(
                Compilation(
                    name=f"rope-{model}-{cache}",
                    kernel=rope_and_cache_kernel,
                    signature={**types, **pointers},
                    constants=constants if scaled else {**constants, **scales},
                    num_warps=_num_warps(head_dim),
                    options={"enable_fp_fusion": False},
                    targets=targets,
                )
            )
    return found


COMPILATIONS = _compilations()
