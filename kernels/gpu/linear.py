"""Linear layers on a GPU: packing weights, and launching the kernels of `linear_kernels`.

All of a layer's operations share one loop (`linear_sums`), cut by one table (`linear_tiles`), so that an output has the
same bits in each of them, for one row or thousands. Knows no model, and no cache beyond the slots it writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pronk.kernels import reference
from pronk.kernels.gpu.compilation import Compilation
from pronk.kernels.gpu.linear_kernels import (
    largest_of_tiles_kernel,
    linear_kernel,
    linear_largest_kernel,
    linear_rope_and_cache_kernel,
    linear_silu_mul_kernel,
)
from pronk.kernels.gpu.linear_tiles import order_of, stages_within, tile_of
from pronk.kernels.gpu.rope import rope_and_cache
from pronk.kernels.interface import INT4_GROUP, LayerCache, Weight, WeightFormat

WEIGHT_FORMATS: tuple[WeightFormat, ...] = ("plain", "int8", "fp8", "int4")

FLOAT8_FROM = (8, 9)
"""The first compute capability that converts float8."""

GROUP = 8
"""Tiles of rows that go through a weight side by side."""

LARGEST_WARPS = 8

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

RESERVED_SHARED_BYTES = 2048
"""Of a program's shared memory, beside what its stages take."""
UNLIMITED = 1 << 30
"""Shared memory in the interpreter."""


@dataclass(frozen=True)
class Launch:
    """How a kernel runs on one shape."""

    constants: Mapping[str, Any]
    """Those that all kernels of `linear_kernels` have."""
    num_programs: int
    num_tiles: int
    """Tiles of outputs."""
    num_warps: int
    num_stages: int


@lru_cache(maxsize=4096)
def launch_for(
    num_rows: int, num_outputs: int, num_inputs: int, format: WeightFormat, dtype: torch.dtype, shared_bytes: int
) -> Launch:
    """dtype: the activations'. shared_bytes: what a program may have of shared memory."""
    order = order_of(num_inputs, format, dtype)
    tile = tile_of(num_rows, num_outputs, format, dtype)
    num_tiles = triton.cdiv(num_outputs, tile.block_n)
    constants = {
        "FORMAT": format,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": order.block_k,
        "SEGMENTS": order.segments,
        "AT_ONCE": tile.at_once and order.segments > 1,
        "EVEN_K": order.is_even(num_inputs),
        "GROUP": GROUP,
    }
    return Launch(
        constants=constants,
        num_programs=triton.cdiv(num_rows, tile.block_m) * num_tiles,
        num_tiles=num_tiles,
        num_warps=tile.num_warps,
        num_stages=stages_within(shared_bytes, tile, order, format, dtype),
    )


def _launch(x: Tensor, weight: Weight) -> Launch:
    """Raises ValueError for what no kernel is made for."""
    if x.dtype not in DTYPES:
        raise ValueError(f"no GPU kernels for {x.dtype}: choose float32, bfloat16 or float16")
    if weight.format == "plain" and weight.data.dtype != x.dtype:
        raise ValueError(f"a weight in {weight.data.dtype} and activations in {x.dtype}: load both in one dtype")
    if x.shape[1] != weight.in_features or x.stride(1) != 1:
        raise ValueError(f"x is {list(x.shape)}, strides {x.stride()}: rows of {weight.in_features} numbers are needed")
    shared_bytes = _shared_bytes(x.device.index) if x.is_cuda else UNLIMITED
    return launch_for(x.shape[0], weight.out_features, weight.in_features, weight.format, x.dtype, shared_bytes)


@lru_cache
def _shared_bytes(device: int) -> int:
    """What a program of this GPU may have of shared memory."""
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin) - RESERVED_SHARED_BYTES  # type: ignore[attr-defined]


def _run(kernel: Any, launch: Launch, x: Tensor, weight: Weight, **arguments: Any) -> None:
    """arguments: of the kernel's, what not all have."""
    if launch.num_programs == 0:
        return
    kernel[(launch.num_programs,)](
        x_ptr=x,
        x_stride=x.stride(0),
        w_ptr=weight.data,
        scales_ptr=weight.scales,
        num_rows=x.shape[0],
        num_outputs=weight.out_features,
        num_inputs=weight.in_features,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        enable_fp_fusion=False,
        **arguments,
        **launch.constants,
    )


def pack(weight: Tensor | Sequence[Tensor], format: WeightFormat = "plain") -> Weight:
    """See `Kernels.pack`. plain, int8 and fp8 are [N, K], plain without a copy. int4 is uint8 [ceil(K / 64), N, 32]: a
    byte holds input i of its 64 in the low half and input i + 32 in the high one, each plus 8. Its scales are
    [N, K / 32] with the outputs as neighbours in memory."""
    weight = reference.whole(weight)
    if format == "fp8" and weight.is_cuda and torch.cuda.get_device_capability(weight.device) < FLOAT8_FROM:
        raise ValueError(
            f"{torch.cuda.get_device_name(weight.device)} has no float8: choose int8 weights "
            f"(float8 begins with compute capability {FLOAT8_FROM[0]}.{FLOAT8_FROM[1]})"
        )
    packed = reference.pack(weight.contiguous(), format)
    if format != "int4" or packed.scales is None:
        return packed
    halves = 2 * INT4_GROUP
    nibbles = F.pad(packed.data + 8, (0, -packed.in_features % halves), value=8).to(torch.uint8)
    low, high = nibbles.view(packed.out_features, -1, 2, INT4_GROUP).transpose(0, 1).unbind(2)
    data = (low | (high << 4)).contiguous()
    return Weight(packed.out_features, packed.in_features, data, format, packed.scales.t().contiguous().t())


def linear(x: Tensor, weight: Weight) -> Tensor:
    """See `Kernels.linear`."""
    out = x.new_empty(x.shape[0], weight.out_features)
    _run(linear_kernel, _launch(x, weight), x, weight, out_ptr=out)
    return out


def linear_silu_mul(x: Tensor, weight: Weight) -> Tensor:
    """See `Kernels.linear_silu_mul`. Fused, for any number of rows."""
    out = x.new_empty(x.shape[0], weight.out_features // 2)
    _run(linear_silu_mul_kernel, _launch(x, weight), x, weight, out_ptr=out)
    return out


def linear_rope_and_cache(
    x: Tensor, weight: Weight, positions: Tensor, cos_sin: Tensor, slots: Tensor, cache: LayerCache
) -> Tensor:
    """See `Kernels.linear_rope_and_cache`. Fused, but for a float8 cache: its scale needs a whole head, of which a tile
    holds a part."""
    if cache.key_scales is not None:
        return rope_and_cache(linear(x, weight), positions, cos_sin, slots, cache)
    if not (cache.keys.is_contiguous() and cache.values.is_contiguous()):
        raise ValueError("the cache is not contiguous")
    _, num_kv_heads, block_size, head_dim = cache.keys.shape
    out = x.new_empty(x.shape[0], weight.out_features // head_dim - 2 * num_kv_heads, head_dim)
    _run(
        linear_rope_and_cache_kernel,
        _launch(x, weight),
        x,
        weight,
        out_ptr=out,
        positions_ptr=positions,
        cos_sin_ptr=cos_sin,
        slots_ptr=slots,
        keys_ptr=cache.keys,
        values_ptr=cache.values,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
    )
    return out


def linear_argmax(x: Tensor, weight: Weight) -> tuple[Tensor, Tensor]:
    """See `Kernels.linear_argmax`. The outputs themselves are never written."""
    launch = _launch(x, weight)
    num_rows = x.shape[0]
    partial = x.new_empty(num_rows, launch.num_tiles, dtype=torch.float32)
    partial_ids = x.new_empty(num_rows, launch.num_tiles, dtype=torch.int32)
    _run(linear_largest_kernel, launch, x, weight, largest_ptr=partial, ids_ptr=partial_ids, DTYPE=DTYPES[x.dtype])
    largest = x.new_empty(num_rows, dtype=torch.float32)
    ids = x.new_empty(num_rows, dtype=torch.int64)
    if num_rows:
        block = triton.next_power_of_2(launch.num_tiles)
        largest_of_tiles_kernel[(num_rows,)](
            partial, partial_ids, largest, ids, launch.num_tiles, BLOCK=block, num_warps=LARGEST_WARPS
        )
    return ids, largest


def _compilations() -> list[Compilation]:
    """In bfloat16: the plain product of each tile that the 1B, the 3B and the 8B have; for what is fused with it, and
    for each format, the smallest tile and the largest. All others are made of the same parts. The tiles in between are
    compiled for Hopper alone, and heads of 128 too."""
    found: dict[str, Compilation] = {}

    def add(
        layer: str, kernel: Any, num_rows: int, n: int, k: int, format: WeightFormat, own: Mapping[str, Any]
    ) -> None:
        launch = launch_for(num_rows, n, k, format, torch.bfloat16, UNLIMITED)
        name = f"{layer}-{format}-{launch.constants['BLOCK_M']}x{launch.constants['BLOCK_N']}"
        others = (80, 100) if num_rows in (1, 2048) and own.get("HEAD_DIM") != 128 else ()
        found.setdefault(name, _compilation(name, kernel, format, launch, own, others))

    for num_rows in (1, 32, 64, 256, 2048):
        for hidden in (2048, 3072, 4096):
            add("linear", linear_kernel, num_rows, hidden, hidden, "plain", {})
    rope = {"NUM_KV_HEADS": 8, "BLOCK_SIZE": 16}
    for num_rows in (1, 2048):
        add("linear-silu-mul", linear_silu_mul_kernel, num_rows, 16384, 2048, "plain", {})
        add("linear-rope-d64", linear_rope_and_cache_kernel, num_rows, 3072, 2048, "plain", {"HEAD_DIM": 64, **rope})
        add("linear-rope-d128", linear_rope_and_cache_kernel, num_rows, 5120, 3072, "plain", {"HEAD_DIM": 128, **rope})
        add("linear-largest", linear_largest_kernel, num_rows, 128256, 2048, "plain", {"DTYPE": tl.bfloat16})
        for format in WEIGHT_FORMATS:
            add("linear", linear_kernel, num_rows, 2048, 2048, format, {})
    largest = Compilation(
        name="largest-of-tiles",
        kernel=largest_of_tiles_kernel,
        signature={
            "partial_ptr": "*fp32",
            "partial_ids_ptr": "*i32",
            "largest_ptr": "*fp32",
            "ids_ptr": "*i64",
            "num_tiles": "i32",
        },
        constants={"BLOCK": 4096},
        num_warps=LARGEST_WARPS,
        options={"enable_fp_fusion": False},
        expects_wide_loads=False,  # rows of 4008 partials, clamped: next to what was read for them, nothing
    )
    return [*found.values(), largest]


def _compilation(
    name: str, kernel: Any, format: WeightFormat, launch: Launch, own: Mapping[str, Any], others: tuple[int, ...]
) -> Compilation:
    """others: what it is compiled for beside Hopper."""
    data = {"plain": "*bf16", "int8": "*i8", "fp8": "*fp8e4nv", "int4": "*u8"}[format]
    signature = {"x_ptr": "*bf16", "x_stride": "i32", "w_ptr": data, "scales_ptr": "*fp32", "out_ptr": "*bf16"}
    signature |= {"num_rows": "i32", "num_outputs": "i32", "num_inputs": "i32", "positions_ptr": "*i64"}
    signature |= {"cos_sin_ptr": "*fp32", "slots_ptr": "*i64", "keys_ptr": "*bf16", "values_ptr": "*bf16"}
    signature |= {"largest_ptr": "*fp32", "ids_ptr": "*i32"}
    constants = {**launch.constants, **own, **({"scales_ptr": None} if format == "plain" else {})}
    return Compilation(
        name=name,
        kernel=kernel,
        signature={key: value for key, value in signature.items() if key in kernel.arg_names and key not in constants},
        constants=constants,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        options={"enable_fp_fusion": False},
        divisible=("x_stride", "num_outputs", "num_inputs"),
        targets=tuple(sorted({90, *others} - ({80} if format == "fp8" else set()))),
        expects_tensor_cores=True,
    )


COMPILATIONS = _compilations()
