"""What each operation means, in plain torch: the twin that every fast kernel is compared with, and the one to read.

Runs on any device and in any floating dtype, float64 included (then nothing is narrowed to float32, which makes it the
oracle for the others). Not made to be fast, nor row-invariant beyond what torch is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pronk.kernels import sampling
from pronk.kernels.interface import (
    INT4_GROUP,
    AttentionPlan,
    LayerCache,
    Queries,
    Weight,
    WeightFormat,
)

WEIGHT_FORMATS: tuple[WeightFormat, ...] = ("plain", "int8", "fp8", "int4")

sample = sampling.sample
logprobs = sampling.logprobs


def _wide(x: Tensor) -> Tensor:
    """The dtype to calculate in: float32, or float64 where the input is."""
    return x if x.dtype == torch.float64 else x.float()


def describe(dtype: torch.dtype) -> str:
    """See `Kernels.describe`."""
    return f"reference (plain torch, {dtype})"


def pack(weight: Tensor | Sequence[Tensor], format: WeightFormat = "plain") -> Weight:
    """See `Kernels.pack`. Scaled formats keep one number in each element of `data`; a fast set packs them closer."""
    weight = whole(weight)
    num_out, num_in = weight.shape
    if format == "plain":
        return Weight(num_out, num_in, weight)
    group = INT4_GROUP if format == "int4" else num_in
    if num_in % group:
        raise ValueError(f"int4 needs a multiple of {INT4_GROUP} inputs, not {num_in}")
    grouped = weight.float().view(num_out, -1, group)
    largest = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}[format]
    # A row of zeros has any scale; one that is not zero keeps the quotient finite.
    scales = (grouped.abs().amax(-1) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = (grouped / scales.unsqueeze(-1)).clamp(-largest, largest).view(num_out, num_in)
    data = scaled.to(torch.float8_e4m3fn) if format == "fp8" else scaled.round().to(torch.int8)
    return Weight(num_out, num_in, data, format, scales if format == "int4" else scales.squeeze(-1))


def whole(weight: Tensor | Sequence[Tensor]) -> Tensor:
    """A weight that may come in parts; see `Kernels.pack` for what is copied."""
    if isinstance(weight, Tensor):
        return weight
    if len(weight) == 1 and weight[0].device.type != "cpu":
        return weight[0]
    return torch.cat(list(weight))


def unpack(weight: Weight) -> Tensor:
    """-> the numbers that `weight` stands for, [N, K]: float32 for scaled formats."""
    if weight.scales is None:
        return weight.data
    scales = weight.scales.view(weight.out_features, -1, 1)
    return (weight.data.float().view(weight.out_features, scales.shape[1], -1) * scales).view(weight.data.shape)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """See `Kernels.linear`."""
    wide = _wide(x)
    return F.linear(wide, unpack(weight).to(wide.dtype)).to(x.dtype)


def linear_silu_mul(x: Tensor, weight: Weight) -> Tensor:
    """See `Kernels.linear_silu_mul`."""
    return silu_mul(linear(x, weight))


def linear_argmax(x: Tensor, weight: Weight) -> tuple[Tensor, Tensor]:
    """See `Kernels.linear_argmax`."""
    return largest(linear(x, weight))


def largest(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [T, N] -> what `Kernels.linear_argmax` says of them."""
    values = rows.amax(-1, keepdim=True)
    # argmax does not say which of several equals it takes; of numbers that are all different, it can.
    places = torch.arange(rows.shape[1], device=rows.device)
    ids = torch.where(rows == values, places, rows.shape[1]).amin(-1)
    return torch.where(rows.isfinite().all(-1), ids, -1), values.squeeze(-1).float()


def embedding(ids: Tensor, table: Tensor | Weight) -> Tensor:
    """See `Kernels.embedding`."""
    return (table.data if isinstance(table, Weight) else table)[ids]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `Kernels.rms_norm`."""
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `Kernels.add_rms_norm`."""
    residual = x + residual
    return rms_norm(residual, weight, eps), residual


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `Kernels.silu_mul`."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [T, heads, D], cos_sin [T, D] of each token's position -> x with pair (i, i + D/2) turned by angle i."""
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    first, second = _wide(x).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def rope_and_cache(qkv: Tensor, positions: Tensor, cos_sin: Tensor, slots: Tensor, cache: LayerCache) -> Tensor:
    """See `Kernels.rope_and_cache`."""
    _, num_kv_heads, block_size, head_dim = cache.keys.shape
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    q, k, v = torch.split(heads, [heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    table = cos_sin[positions]
    written = slots >= 0
    blocks, places = slots[written] // block_size, slots[written] % block_size
    _write(cache.keys, cache.key_scales, blocks, places, rotate(k, table)[written])
    _write(cache.values, cache.value_scales, blocks, places, v[written])
    return rotate(q, table)


def _write(cache: Tensor, scales: Tensor | None, blocks: Tensor, places: Tensor, rows: Tensor) -> None:
    """rows [n, KV, D] go to places of blocks; with scales, as `LayerCache` says."""
    if scales is not None:
        wide = _wide(rows)
        largest = torch.finfo(cache.dtype).max
        scale = (wide.abs().amax(-1) / largest).clamp(min=torch.finfo(torch.float32).tiny)
        scales[blocks, :, places] = scale.float()
        rows = (wide / scale.unsqueeze(-1)).clamp(-largest, largest)
    cache[blocks, :, places] = rows.to(cache.dtype)


def linear_rope_and_cache(
    x: Tensor, weight: Weight, positions: Tensor, cos_sin: Tensor, slots: Tensor, cache: LayerCache
) -> Tensor:
    """See `Kernels.linear_rope_and_cache`."""
    return rope_and_cache(linear(x, weight), positions, cos_sin, slots, cache)


@dataclass(frozen=True)
class Plan:
    """The reference works sequence by sequence, so its plan is the step itself."""

    queries: Queries


def plan_attention(queries: Queries, *, num_heads: int, cache: LayerCache) -> Plan:
    """See `Kernels.plan_attention`."""
    del num_heads, cache
    return Plan(queries)


def attention(q: Tensor, cache: LayerCache, plan: AttentionPlan) -> Tensor:
    """See `Kernels.attention`."""
    if not isinstance(plan, Plan):
        raise TypeError(f"the plan was made by another kernel set: {type(plan).__module__}")
    out = torch.empty_like(q)
    queries = plan.queries
    rows = zip(
        queries.starts.tolist(), queries.lens.tolist(), queries.context_lens.tolist(), queries.block_tables, strict=True
    )
    for start, length, context_len, block_table in rows:
        keys = _gather(cache.keys, cache.key_scales, block_table, context_len)
        values = _gather(cache.values, cache.value_scales, block_table, context_len)
        out[start : start + length] = _attend(q[start : start + length], keys, values)
    return out


def _gather(cache: Tensor, scales: Tensor | None, block_table: Tensor, context_len: int) -> Tensor:
    """cache [B, KV, P, D], scales None or [B, KV, P] -> one sequence's rows in order, [KV, context_len, D]."""
    block_size = cache.shape[2]
    blocks = block_table[: -(-context_len // block_size)]
    rows = cache[blocks]
    if scales is not None:
        rows = rows.float() * scales[blocks].unsqueeze(-1)
    return rows.transpose(0, 1).flatten(1, 2)[:, :context_len]


def _attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q [n, Q, D], the last n positions of a sequence whose keys and values are [KV, context_len, D]. -> [n, Q, D]."""
    length, num_heads, head_dim = q.shape
    num_kv_heads, context_len, _ = keys.shape
    grouped = _wide(q).view(length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = torch.einsum("tkgd,ksd->kgts", grouped, _wide(keys)) * head_dim**-0.5
    positions = torch.arange(context_len - length, context_len, device=q.device)
    hidden = torch.arange(context_len, device=q.device) > positions.unsqueeze(1)
    probabilities = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("kgts,ksd->tkgd", probabilities, _wide(values)).reshape(q.shape).to(q.dtype)
