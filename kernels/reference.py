"""What each operation means, in plain torch: the twin that every fast kernel is compared with, and the one to read.

Runs on any device and in any floating dtype, float64 included (then nothing is narrowed to float32, which makes it the
oracle for the others). Not made to be fast, nor row-invariant beyond what torch is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pronk.kernels.interface import AttentionPlan, Queries, Weight


def _wide(x: Tensor) -> Tensor:
    """The dtype to calculate in: float32, or float64 where the input is."""
    return x if x.dtype == torch.float64 else x.float()


def describe(dtype: torch.dtype) -> str:
    """See `Kernels.describe`."""
    return f"reference (plain torch, {dtype})"


def pack(weight: Tensor) -> Weight:
    """See `Kernels.pack`."""
    return Weight(weight.shape[0], weight.shape[1], weight)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """See `Kernels.linear`."""
    return F.linear(_wide(x), _wide(weight.data)).to(x.dtype)


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """See `Kernels.embedding`."""
    return table[ids]


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


def rope_and_cache(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor
) -> Tensor:
    """See `Kernels.rope_and_cache`."""
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    q, k, v = torch.split(heads, [heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    table = cos_sin[positions]
    blocks, places = slots // block_size, slots % block_size
    key_cache[blocks, :, places] = rotate(k, table).to(key_cache.dtype)
    value_cache[blocks, :, places] = v.to(value_cache.dtype)
    return rotate(q, table)


@dataclass(frozen=True)
class Plan:
    """The reference works sequence by sequence, so its plan is the step itself."""

    queries: Queries


def plan_attention(queries: Queries, *, num_heads: int, key_cache: Tensor) -> Plan:
    """See `Kernels.plan_attention`."""
    del num_heads, key_cache
    return Plan(queries)


def attention(q: Tensor, key_cache: Tensor, value_cache: Tensor, plan: AttentionPlan) -> Tensor:
    """See `Kernels.attention`."""
    if not isinstance(plan, Plan):
        raise TypeError(f"the plan was made by another kernel set: {type(plan).__module__}")
    out = torch.empty_like(q)
    queries = plan.queries
    rows = zip(
        queries.starts.tolist(), queries.lens.tolist(), queries.context_lens.tolist(), queries.block_tables, strict=True
    )
    for start, length, context_len, block_table in rows:
        keys = _gather(key_cache, block_table, context_len)
        values = _gather(value_cache, block_table, context_len)
        out[start : start + length] = _attend(q[start : start + length], keys, values)
    return out


def _gather(cache: Tensor, block_table: Tensor, context_len: int) -> Tensor:
    """cache [B, KV, P, D] -> one sequence's rows in order, [KV, context_len, D]."""
    block_size = cache.shape[2]
    blocks = block_table[: -(-context_len // block_size)].to(cache.device)
    return cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context_len]


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
