"""Paged attention: plan a step once, then attend in each layer. What the kernels are: `attention_decode` (read it
first), `attention_prefill`, `attention_plan`. Here is what is launched, and with how much memory.

No launch depends on a length that only the device knows, so a captured graph serves any mix of them: grids are as large
as the device holds at once (or as the host's bounds can fill), and the programs read from the plan what is to do. The
host waits for nothing.

Tile sizes are constants, chosen by registers and shared memory as `aot` measures them. Of them BLOCK_N and KEY_SPLIT
are part of the numbers (promise 1) and depend on dtypes and head size alone; BLOCK_M, warps and stages are not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from pronk.kernels.gpu.attention_decode import ONES, combine_kernel, decode_kernel
from pronk.kernels.gpu.attention_plan import COUNTS, ITEM, plan_kernel
from pronk.kernels.gpu.attention_prefill import prefill_kernel
from pronk.kernels.gpu.compilation import Compilation
from pronk.kernels.interface import AttentionPlan, LayerCache, Queries

KEY_SPLIT = 256
"""Keys of a split. Shorter ones would fill the device with less context at batch 1, and cost more partials."""
BLOCK_N = 64
"""Keys scored at once."""
DECODE_ROWS = 64
"""Packed rows up to which a sequence is decoded: its splits run side by side, where the prefill kernel has one program
for each KV head. With more rows partials would be more bytes than keys and values."""
HEAD_DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLOAT8 = torch.float8_e4m3fn
FLOAT8_CAPABILITY = (8, 9)

MAX_WORKSPACE = 256 << 20
"""Bytes for partials. With 32 heads of 64 they hold 31,000 splits, which are 8 million cached tokens; sequences that
find no room are walked by the prefill kernel."""
INTERPRETED_PROGRAMS = 4
"""Few enough that programs of the interpreter take more than one item."""
INTERPRETED_CAPABILITY = (8, 9)
PLAN_WIDTH = 256

Capability = tuple[int, int]


@dataclass(frozen=True)
class Launch:
    """How one kernel runs."""

    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    programs: int
    """On each multiprocessor: as many as its registers and shared memory hold."""
    options: Mapping[str, Any] = field(default_factory=lambda: {"enable_fp_fusion": False})
    """Without fusion: see `attention_decode`, "Numbers"."""

    @cached_property
    def keywords(self) -> dict[str, Any]:
        """Of the call."""
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages, **self.options}


@dataclass(frozen=True)
class Shape:
    """What the kernels are compiled for, beside the queries' dtype."""

    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    """The cache's."""
    capability: Capability

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def scaled(self) -> bool:
        return self.dtype == FLOAT8

    @property
    def decode_tokens(self) -> int:
        """Tokens up to which a sequence is decoded."""
        return max(1, DECODE_ROWS // self.group)

    def decode_rows(self, max_len: int) -> int:
        """BLOCK_M of the decode kernel: all rows of a sequence in one tile read its keys once. In a step with prompts
        most other sequences have one token. Wider tiles of float8 or float32 would not fit into the registers."""
        rows = self.group * (max_len if max_len <= self.decode_tokens else 1)
        most = DECODE_ROWS if self.dtype.itemsize == 2 else 16
        return min(max(16, 1 << (rows - 1).bit_length()), most)

    @property
    def prefill_rows(self) -> int:
        """BLOCK_M of the prefill kernel. 128 rows of 128 spill registers but on Hopper."""
        if self.dtype == torch.float32:
            return 32
        return 128 if self.head_dim == 128 and not self.scaled and self.capability[0] == 9 else 64

    def plan(self, decode_rows: int) -> Launch:
        constants = {
            "GROUP": self.group,
            "DECODE_TOKENS": self.decode_tokens,
            "DECODE_M": decode_rows,
            "PREFILL_M": self.prefill_rows,
            "KEY_SPLIT": KEY_SPLIT,
            "ITEM": ITEM,
            "WIDTH": PLAN_WIDTH,
        }
        return Launch(constants, num_warps=4, num_stages=1, programs=1)

    def decode(self, rows: int) -> Launch:
        """Bandwidth needs bytes under way: 23 KiB on each multiprocessor of an H200 [4.3 TB/s for 0.7 µs]. Five stages
        keep two tiles of keys and two of values under way, three keep one of each, in every program."""
        constants = self._attend_constants(rows)
        if self.dtype == torch.float32:
            return Launch(constants, num_warps=8, num_stages=2, programs=2)
        if self.scaled:
            return Launch(constants, num_warps=4, num_stages=5, programs=3 if self.head_dim == 64 else 2)
        if self.head_dim == 64:
            return Launch(constants, num_warps=4, num_stages=5, programs={16: 5, 32: 3, 64: 3}[rows])
        return Launch(constants, num_warps=4, num_stages=3, programs={16: 3, 32: 2, 64: 2}[rows])

    def combine(self, max_splits: int) -> Launch:
        """A thread for each dimension; as many splits in a turn as there may be, and no more than the registers hold,
        of which the compiler would leave most unused for the sake of more programs."""
        unroll = min(max(4, 1 << (max_splits - 1).bit_length()), 32)
        constants = {"NUM_HEADS": self.num_heads, "HEAD_DIM": self.head_dim, "ITEM": ITEM, "UNROLL": unroll}
        options = {"enable_fp_fusion": False, "maxnreg": 128}
        return Launch(constants, num_warps=self.head_dim // 32, num_stages=1, programs=8, options=options)

    def prefill(self) -> Launch:
        """Several small programs on a multiprocessor: one multiplies while another takes its exponents."""
        constants = self._attend_constants(self.prefill_rows)
        if self.dtype == torch.float32:
            return Launch(constants, num_warps=8, num_stages=2, programs=2)
        if self.head_dim == 64:
            return Launch(constants, num_warps=4, num_stages=3, programs=2 if self.scaled else 3)
        return Launch(constants, num_warps=8, num_stages=3, programs=1)

    def _attend_constants(self, rows: int) -> dict[str, Any]:
        return {
            "SCALE": self.head_dim**-0.5 * math.log2(math.e),
            "NUM_KV_HEADS": self.num_kv_heads,
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "BLOCK_SIZE": self.block_size,
            "KEY_SPLIT": KEY_SPLIT,
            "BLOCK_M": rows,
            "BLOCK_N": BLOCK_N,
            "ITEM": ITEM,
            "ONES": ONES,
            "SCALED": self.scaled,
        }


@dataclass(frozen=True)
class Plan:
    """One step's lists of work, and room for its partials."""

    queries: Queries
    shape: Shape
    decode: Launch
    combine: Launch
    prefill: Launch
    counts: Tensor
    """int32 [COUNTS]"""
    decode_items: Tensor
    """int32 [at most, ITEM], as the other two."""
    combine_items: Tensor
    prefill_items: Tensor
    partial_weighted: Tensor
    """float32 [slots, Q, D]: written anew by each layer, as the other two."""
    partial_tops: Tensor
    """float32 [slots, Q]"""
    partial_totals: Tensor
    """float32 [slots, Q]"""

    @property
    def partials(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.partial_weighted, self.partial_tops, self.partial_totals


def plan_attention(queries: Queries, *, num_heads: int, cache: LayerCache) -> Plan:
    """See `Kernels.plan_attention`. Raises ValueError for a shape or dtype that the kernels do not have."""
    shape = shape_of(num_heads, cache)
    device = cache.keys.device
    num_seqs = len(queries.lens)
    max_splits = -(-queries.max_context_len // KEY_SPLIT)
    # How much may come, by the host's bounds: no sequence that is decoded has more tokens, and none has more splits.
    # Lists take 16 bytes an item. Partials take a slot for each token and split, of sequences with several splits; the
    # device sends those without a slot to the prefill kernel, and so there need not be as many as may come.
    tokens = min(queries.max_len, shape.decode_tokens)
    rows = shape.decode_rows(queries.max_len)
    decode_tiles = -(-tokens * shape.group // rows)
    wanted = num_seqs * tokens * max_splits if max_splits > 1 else 0
    slots = min(wanted, MAX_WORKSPACE // (shape.num_heads * (shape.head_dim + 2) * torch.float32.itemsize))
    prefills = queries.max_len > shape.decode_tokens or slots < wanted
    prefill_tiles = -(-queries.max_len * shape.group // shape.prefill_rows) if prefills else 0

    def items(most: int) -> Tensor:
        return torch.empty(most, ITEM, dtype=torch.int32, device=device)

    def partials(*per_head: int) -> Tensor:
        return torch.empty(slots, shape.num_heads, *per_head, dtype=torch.float32, device=device)

    plan = Plan(
        queries=replace(queries, block_tables=queries.block_tables.contiguous()),
        shape=shape,
        decode=shape.decode(rows),
        combine=shape.combine(max_splits),
        prefill=shape.prefill(),
        counts=torch.empty(COUNTS, dtype=torch.int32, device=device),
        decode_items=items(num_seqs * decode_tiles * max_splits),
        combine_items=items(min(num_seqs * tokens, slots)),
        prefill_items=items(num_seqs * prefill_tiles),
        partial_weighted=partials(shape.head_dim),
        partial_tops=partials(),
        partial_totals=partials(),
    )
    if num_seqs:
        plan_kernel[(num_seqs,)](
            queries.starts,
            queries.lens,
            queries.context_lens,
            plan.decode_items,
            plan.combine_items,
            plan.prefill_items,
            plan.counts,
            slots,
            **shape.plan(rows).keywords,
        )
    return plan


def shape_of(num_heads: int, cache: LayerCache) -> Shape:
    """Raises ValueError, saying what the kernels have."""
    keys, values = cache.keys, cache.values
    _, num_kv_heads, block_size, head_dim = keys.shape
    capability = torch.cuda.get_device_capability(keys.device) if keys.is_cuda else INTERPRETED_CAPABILITY
    scaled = cache.key_scales is not None and cache.value_scales is not None
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"the GPU kernels attend with heads of 64 or 128, not {head_dim}: run this model on the CPU")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot share {num_kv_heads} KV heads evenly")
    if block_size % 16 or KEY_SPLIT % block_size:
        raise ValueError(f"blocks of {block_size} tokens: the GPU kernels have 16, 32, 64, 128 and 256")
    if keys.dtype != values.dtype or keys.dtype not in ((FLOAT8,) if scaled else DTYPES):
        raise ValueError(
            f"a cache of {keys.dtype} {'with' if scaled else 'without'} scales: the GPU kernels read bfloat16, float16 "
            "and float32 without, and float8_e4m3fn with them"
        )
    if not (keys.is_contiguous() and values.is_contiguous() and keys.shape == values.shape):
        raise ValueError("the GPU kernels read keys and values of one shape [B, KV, P, D], each contiguous")
    if scaled and capability < FLOAT8_CAPABILITY:
        raise ValueError("this GPU has no float8 (compute capability 8.9 or later): leave --kv-cache-dtype at auto")
    return Shape(num_kv_heads, num_heads // num_kv_heads, head_dim, block_size, keys.dtype, capability)


def attention(q: Tensor, cache: LayerCache, plan: AttentionPlan) -> Tensor:
    """See `Kernels.attention`. One launch to decode; one to merge if a sequence may have several splits; one for long
    queries if there may be any."""
    if not isinstance(plan, Plan):
        raise TypeError(f"the plan was made by another kernel set: {type(plan).__module__}")
    shape, queries = plan.shape, plan.queries
    if q.dtype not in DTYPES or not (shape.scaled or q.dtype == shape.dtype):
        raise ValueError(f"queries of {q.dtype} on a cache of {shape.dtype}: the GPU kernels need the same of both")
    q = q.contiguous()
    out = torch.empty_like(q)
    caches = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    step = (queries.starts, queries.lens, queries.context_lens, queries.block_tables, queries.block_tables.shape[1])

    def grid(launch: Launch, most: int) -> tuple[int]:
        """As many programs as run at once, and no more than may find something to do."""
        programs = multiprocessors(q.device) * launch.programs if q.is_cuda else INTERPRETED_PROGRAMS
        return (min(programs, most),)

    if len(plan.decode_items):
        decode_kernel[grid(plan.decode, len(plan.decode_items) * shape.num_kv_heads)](
            q, *caches, out, *plan.partials, plan.decode_items, plan.counts, *step, **plan.decode.keywords
        )
    if len(plan.combine_items):
        combine_kernel[grid(plan.combine, len(plan.combine_items) * shape.num_heads)](
            out, *plan.partials, plan.combine_items, plan.counts, **plan.combine.keywords
        )
    if len(plan.prefill_items):
        prefill_kernel[grid(plan.prefill, len(plan.prefill_items) * shape.num_kv_heads)](
            q, *caches, out, plan.prefill_items, plan.counts, *step, **plan.prefill.keywords
        )
    return out


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


TYPES = {
    **dict.fromkeys(("q", "out"), "*bf16"),
    **dict.fromkeys(("partial_weighted", "partial_tops", "partial_totals"), "*fp32"),
    **dict.fromkeys(("items", "counts", "decode_items", "combine_items", "prefill_items"), "*i32"),
    **dict.fromkeys(("starts", "lens", "context_lens", "block_tables"), "*i64"),
    **dict.fromkeys(("table_width", "room"), "i32"),
}


def _compilations() -> Iterator[Compilation]:
    """Decoding, verifying and prompts; with the default blocks and with large ones; in bfloat16 and in float8. All on
    Hopper, and what has the default blocks elsewhere too."""
    hopper, others = (9, 0), ((8, 0), (10, 0))
    models = {"1b": (8, 4, 64), "3b": (8, 3, 128), "8b": (8, 4, 128)}
    for model, (num_kv_heads, group, head_dim) in models.items():
        default = Shape(num_kv_heads, group, head_dim, 16, torch.bfloat16, hopper)
        if model == "1b":
            yield _compilation("attention-plan-1b", plan_kernel, default.plan(16), default, hopper, *others)
            yield _compilation("attention-decode-1b-p16-bf16-m32", decode_kernel, default.decode(32), default, hopper)
        for max_splits in (8, 512) if model != "8b" else ():
            name = f"attention-combine-{model}-{max_splits}"
            yield _compilation(name, combine_kernel, default.combine(max_splits), default, hopper)
        for block_size, dtype in itertools.product((16, 64), (torch.bfloat16, FLOAT8)):
            if model == "8b" and (block_size, dtype) != (16, torch.bfloat16):
                continue
            shape = replace(default, block_size=block_size, dtype=dtype)
            also = others if block_size == 16 and model != "8b" else ()
            name = f"{model}-p{block_size}-{'fp8' if shape.scaled else 'bf16'}"
            yield _compilation(f"attention-decode-{name}", decode_kernel, shape.decode(16), shape, hopper, *also)
            alike = [each for each in also if replace(shape, capability=each).prefill() == shape.prefill()]
            yield _compilation(f"attention-prefill-{name}", prefill_kernel, shape.prefill(), shape, hopper, *alike)
            if unlike := [each for each in also if each not in alike]:
                launch = replace(shape, capability=unlike[0]).prefill()
                yield _compilation(f"attention-prefill-{name}-narrow", prefill_kernel, launch, shape, *unlike)


def _compilation(name: str, kernel: Any, launch: Launch, shape: Shape, *capabilities: Capability) -> Compilation:
    types = {
        **TYPES,
        **dict.fromkeys(("keys", "values"), "*fp8e4nv" if shape.scaled else "*bf16"),
        **dict.fromkeys(("key_scales", "value_scales"), "*fp32" if shape.scaled else None),
    }
    needed = {parameter: types[parameter] for parameter in kernel.arg_names if parameter in types}
    attends = "keys" in needed
    return Compilation(
        name=name,
        kernel=kernel,
        signature={parameter: kind for parameter, kind in needed.items() if kind is not None},
        constants={**launch.constants, **{parameter: None for parameter, kind in needed.items() if kind is None}},
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        options=launch.options,
        targets=tuple(
            10 * major + minor
            for major, minor in capabilities
            if not shape.scaled or (major, minor) >= FLOAT8_CAPABILITY
        ),
        expects_wide_loads=attends,
        expects_tensor_cores=attends,
    )


COMPILATIONS = list(_compilations())
