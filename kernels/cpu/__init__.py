"""The CPU set: kernels of its own, compiled for this machine by LLVM, run by a team of threads.

How promise 1 is kept: no result depends on how rows are shared out among threads, or on how many there are; each module
says how. Knows no Triton. Operations whose time does not matter are torch's, row by row.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

from pronk.kernels.cpu import attention as attentions
from pronk.kernels.cpu import linear as linears
from pronk.kernels.cpu import sampling as samplings
from pronk.kernels.cpu.code import DTYPES, Code
from pronk.kernels.cpu.instructions import Instructions, of_this_machine
from pronk.kernels.cpu.recording import Pool, Recorder, record
from pronk.kernels.cpu.rows import write_largest, write_rms_norm, write_rope_and_cache, write_silu_mul
from pronk.kernels.interface import AttentionPlan, LayerCache, Queries, Samples, SamplingBatch, Weight, WeightFormat
from pronk.kernels.jit.threads import Team

Result = TypeVar("Result")


class CpuKernels:
    """A set; its threads live as long as it does."""

    WEIGHT_FORMATS: Collection[WeightFormat] = linears.WEIGHT_FORMATS

    def __init__(self, num_threads: int, instructions: Instructions | None = None) -> None:
        """instructions: others than this machine's best."""
        self._code = Code(Team(num_threads), instructions or of_this_machine())
        self._pool = Pool()

    def describe(self, dtype: torch.dtype) -> str:
        """See `Kernels.describe`."""
        threads = self._code.team.num_threads
        name = DTYPES.get(dtype)
        if name is None:
            raise ValueError(f"the CPU kernels have no {dtype}: choose --dtype bfloat16, float16, float32")
        how = self._code.instructions.name_for(name)
        return f"{how}, {threads} thread{'' if threads == 1 else 's'}"

    def capture(self, run: Callable[[], Result]) -> tuple[Callable[[], object], Result]:
        """Record what `run` does with this set, without launching it: see `recording`. -> what does it again, and run's
        result, into whose tensors each replay writes."""
        return record(run, self._code.team, self._pool, self._use)

    def gathering(self) -> AbstractContextManager[None]:
        """Operations of this set that are asked for in it have happened in the end. Until then only they may read what
        they write, in whole tensors or views of them; and all other tensors that they are given are to be kept."""
        return self._code.gathering()

    def _use(self, recorder: Recorder | None) -> None:
        self._code.recorder = recorder

    def pack(self, weight: Tensor | Sequence[Tensor], format: WeightFormat = "plain") -> Weight:
        """See `Kernels.pack`."""
        return linears.pack(self._code, weight, format)

    @property
    def layout(self) -> str:
        """Tells weights as this set packs them from those of another machine, or of another version of this code."""
        return self._code.fingerprint()

    def take_apart(self, weight: Weight) -> tuple[dict[str, Tensor], dict[str, str | int]]:
        """-> a packed weight's tensors by their names, and what else `put_together` needs."""
        return linears.take_apart(_packed(weight))

    def put_together(self, parts: dict[str, Any]) -> Weight:
        """The weight again that was taken apart by a set of the same layout."""
        return linears.PackedWeight(**parts)

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        """See `Kernels.linear`."""
        return linears.linear(self._code, x, _packed(weight))

    def linear_silu_mul(self, x: Tensor, weight: Weight) -> Tensor:
        """See `Kernels.linear_silu_mul`."""
        return self.silu_mul(self.linear(x, weight))

    def linear_argmax(self, x: Tensor, weight: Weight) -> tuple[Tensor, Tensor]:
        """See `Kernels.linear_argmax`."""
        logits = self.linear(x, weight)
        ids = self._code.empty((len(x),), torch.int64)
        values = self._code.empty((len(x),), torch.float32)
        dtype = DTYPES[logits.dtype]
        self._code.run(
            f"largest_{dtype}",
            write_largest(dtype),
            [logits, ids, values, logits.shape[1]],
            len(logits),
            cost=logits.shape[1] / 4,
        )
        return ids, values

    def linear_rope_and_cache(
        self, x: Tensor, weight: Weight, positions: Tensor, cos_sin: Tensor, slots: Tensor, cache: LayerCache
    ) -> Tensor:
        """See `Kernels.linear_rope_and_cache`."""
        return self.rope_and_cache(self.linear(x, weight), positions, cos_sin, slots, cache)

    def embedding(self, ids: Tensor, table: Tensor | Weight) -> Tensor:
        """See `Kernels.embedding`."""
        return table[ids] if isinstance(table, Tensor) else linears.rows_of(self._code, ids, _packed(table))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Kernels.rms_norm`."""
        out = self._code.empty(x.shape, x.dtype)
        self._norm(self._code.contiguous(x), None, weight, out, None, eps)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Kernels.add_rms_norm`."""
        out, total = self._code.empty(x.shape, x.dtype), self._code.empty(x.shape, x.dtype)
        self._norm(self._code.contiguous(x), self._code.contiguous(residual), weight, out, total, eps)
        return out, total

    def _norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, total: Tensor | None, eps: float
    ) -> None:
        dtype, adds = DTYPES[x.dtype], residual is not None
        self._code.run(
            f"{'add_' if adds else ''}rms_norm_{dtype}",
            write_rms_norm(dtype, adds=adds),
            [
                x,
                residual,
                weight,
                out,
                total,
                x.shape[1],
                _bits(eps),
            ],
            len(x),
            cost=x.shape[1] / 2,
        )

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Kernels.silu_mul`."""
        gate_up = self._code.contiguous(gate_up)
        num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = self._code.empty((num_rows, width), gate_up.dtype)
        dtype = DTYPES[gate_up.dtype]
        self._code.run(
            f"silu_mul_{dtype}",
            write_silu_mul(dtype),
            [gate_up, out, width],
            num_rows,
            cost=width,
        )
        return out

    def rope_and_cache(
        self, qkv: Tensor, positions: Tensor, cos_sin: Tensor, slots: Tensor, cache: LayerCache
    ) -> Tensor:
        """See `Kernels.rope_and_cache`."""
        qkv = self._code.contiguous(qkv)
        _, num_kv_heads, block_size, head_dim = cache.keys.shape
        num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
        out = self._code.empty((len(qkv), num_heads, head_dim), qkv.dtype)
        dtype = DTYPES[qkv.dtype]
        tensors = [
            qkv,
            self._code.contiguous(positions),
            cos_sin,
            self._code.contiguous(slots),
            cache.keys,
            cache.values,
            out,
        ]
        self._code.run(
            f"rope_and_cache_{dtype}",
            write_rope_and_cache(dtype),
            [*tensors, num_heads, num_kv_heads, head_dim, block_size],
            len(qkv),
            cost=qkv.shape[1],
        )
        return out

    def plan_attention(self, queries: Queries, *, num_heads: int, cache: LayerCache) -> AttentionPlan:
        """See `Kernels.plan_attention`."""
        return attentions.plan_attention(self._code, queries, num_heads=num_heads, cache=cache)

    def attention(self, q: Tensor, cache: LayerCache, plan: AttentionPlan) -> Tensor:
        """See `Kernels.attention`."""
        return attentions.attention(self._code, q, cache, plan)

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Samples:
        """See `Kernels.sample`."""
        return samplings.sample(self._code, logits, batch)

    def logprobs(self, logits: Tensor, token_ids: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernels.logprobs`."""
        return samplings.logprobs(logits, token_ids, top_n)


def _packed(weight: Weight) -> linears.PackedWeight:
    if not isinstance(weight, linears.PackedWeight):
        raise TypeError("the weight was packed by another kernel set")
    return weight


def _bits(number: float) -> int:
    """Of a float32."""
    return int(struct.unpack("<i", struct.pack("<f", number))[0])
