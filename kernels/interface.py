"""The operations of a Llama step, as a Protocol: what every kernel set offers, and what each operation means.

The modules `reference`, `cpu` and `gpu` are such sets; `for_device` chooses one. Letters in shapes:
T tokens of the step, S sequences, H hidden size, N outputs and K inputs of a linear layer, F MLP width,
Q query heads, G = Q / KV query heads per KV head, KV KV heads, D head_dim, B blocks, P tokens in a block, V vocabulary.

Promise 1: a row of any result depends on that row of the inputs alone: not on T, not on its place, bit for bit.
`reference` is the meaning and promises this only as far as torch does; the others are built for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weight:
    """One linear layer's weight in the form that a kernel set reads fastest. Made by that set's `pack`."""

    out_features: int
    in_features: int
    data: Tensor

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


@dataclass(frozen=True)
class Queries:
    """Which tokens of a step belong to which sequence, and where each sequence's keys are. All tensors on the CPU.

    A sequence's tokens are neighbours in the step, and the last of its keys: token j of n sits at position
    context_lens - n + j and sees all positions up to its own.
    """

    starts: Tensor
    """int64 [S]: first token of each sequence."""
    lens: Tensor
    """int64 [S]: its number of tokens in this step, at least 1."""
    context_lens: Tensor
    """int64 [S]: its number of keys, those of this step included."""
    block_tables: Tensor
    """int64 [S, most blocks]: its blocks in order; what lies past its keys is not read."""


class AttentionPlan(Protocol):
    """What `attention` needs to know of a step, worked out once for all layers. Each set has its own."""


class Kernels(Protocol):
    """A set of operations. All tensors of a call are on the set's device; activations are float32, bfloat16 or
    float16, and results have their dtype unless said. No operation changes its inputs, except the two caches."""

    def describe(self, dtype: torch.dtype) -> str:
        """In words, for the table at start: what runs the products and the attention for this dtype."""

    def pack(self, weight: Tensor) -> Weight:
        """weight [N, K], as a checkpoint stores it -> the form that `linear` reads. May keep or copy it."""

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        """x [T, K] -> x · weightᵀ [T, N]; sums in float32, rounded once."""

    def embedding(self, ids: Tensor, table: Tensor) -> Tensor:
        """ids int64 [T], table [V, H] -> its rows [T, H]."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, H], weight [H] -> x / sqrt(mean(x²) + eps) in float32, rounded to x's dtype, times weight (RMSNorm,
        Zhang & Sennrich 2019; rounding as in Meta's and Hugging Face's Llama)."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """-> (rms_norm(x + residual), x + residual); the sum is rounded to the dtype first."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up [T, 2F], gate first -> silu(gate) · up [T, F], in float32, rounded once (SwiGLU, Shazeer 2020)."""

    def rope_and_cache(
        self,
        qkv: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        slots: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
    ) -> Tensor:
        """Rotate queries and keys by their positions (RoFormer, Su et al. 2021), write keys and values, return queries.

        qkv [T, (Q + 2·KV)·D]; positions int64 [T]; cos_sin float32 [positions, D], cosines then sines of D/2 pairs,
        pair i being (i, i + D/2); slots int64 [T]: block · P + place in the block; caches [B, KV, P, D].
        -> queries [T, Q, D]. Rotation in float32, rounded once.
        """

    def plan_attention(self, queries: Queries, *, num_heads: int, key_cache: Tensor) -> AttentionPlan:
        """Work out one step. key_cache: any layer's, for its shape and device; num_heads: Q."""

    def attention(self, q: Tensor, key_cache: Tensor, value_cache: Tensor, plan: AttentionPlan) -> Tensor:
        """Causal attention of the step's tokens over their sequences' cached keys, their own included.

        q [T, Q, D]; caches [B, KV, P, D]; query head h reads KV head h // G; scores are scaled by D^-1/2; softmax in
        float32. -> [T, Q, D]. Blocks that a sequence does not hold, and places past its length, may hold anything:
        they never reach the result.
        """
