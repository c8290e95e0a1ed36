"""The operations of a Llama step, as a Protocol: what every kernel set offers, and what each operation means.

The modules `reference` and `gpu` are such sets, and `cpu.CpuKernels` makes one; `for_device` chooses. In shapes:
T tokens of the step, S sequences, H hidden size, N outputs and K inputs of a linear layer, F MLP width,
Q query heads, G = Q / KV query heads per KV head, KV KV heads, D head_dim, B blocks, P tokens in a block, V vocabulary.

Promise 1: a row of any result depends on that row of the inputs alone: not on T, not on its place, bit for bit.
`reference` is the meaning and promises this only as far as torch does; the others are built for it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

WeightFormat = Literal["plain", "int8", "fp8", "int4"]
"""How a linear layer's numbers are kept. plain: in the checkpoint's precision. int8 and fp8 (e4m3): symmetric, one
float32 scale for each output. int4: symmetric, one scale for each group of 32 inputs of an output."""

INT4_GROUP = 32

NOT_FINITE = -1
"""Stands for a token where a row's logits held NaN or an infinity."""
NONE_ALLOWED = -2
"""Stands for a token where everything is forbidden in a row."""


@dataclass(frozen=True)
class Weight:
    """One linear layer's weight in the form that a kernel set reads fastest. Made by that set's `pack`."""

    out_features: int
    in_features: int
    data: Tensor
    format: WeightFormat = "plain"
    scales: Tensor | None = None
    """float32: [N], or [N, K / INT4_GROUP] for int4; None for plain. Weight = data · scale."""

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)


@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values, in blocks."""

    keys: Tensor
    """[B, KV, P, D], in the activations' dtype, or float8_e4m3fn."""
    values: Tensor
    """As keys."""
    key_scales: Tensor | None = None
    """float32 [B, KV, P], with float8 only: key = keys · scale. One for each token and head: max |key| / 448, at least
    the smallest normal float32; written together with the key."""
    value_scales: Tensor | None = None
    """As key_scales."""

    @property
    def nbytes(self) -> int:
        scales = (self.key_scales, self.value_scales)
        return self.keys.nbytes + self.values.nbytes + sum(t.nbytes for t in scales if t is not None)


@dataclass(frozen=True)
class Queries:
    """Which tokens of a step belong to which sequence, and where each sequence's keys are.

    All tensors are on the set's device, so that a captured step can be fed anew; what the host must know of them beside
    their shapes, to choose how much to launch, is in two bounds. A sequence's tokens are neighbours in the step, and
    the last of its keys: token j of n sits at position context_lens - n + j and sees all positions up to its own.
    """

    starts: Tensor
    """int64 [S]: first token of each sequence."""
    lens: Tensor
    """int64 [S]: its number of tokens in this step; 0 for a place in the batch that is not used."""
    context_lens: Tensor
    """int64 [S]: its number of keys, those of this step included."""
    block_tables: Tensor
    """int64 [S, most blocks]: its blocks in order; what lies past its keys is not read."""
    max_len: int
    """No sequence has more tokens in this step. 1: every sequence decodes."""
    max_context_len: int
    """No sequence has more keys."""


@dataclass(frozen=True)
class SamplingBatch:
    """What R rows' next tokens depend on, beside their logits. All tensors on the set's device.

    A row's logits, as float32, change in this order: bias is added; the repetition penalty acts; presence and frequency
    penalties are subtracted, in one; what overflows becomes the largest finite number; what is forbidden, by a bias of
    -inf or by `mask`, becomes -inf. temperature 0 takes the largest, the lowest id among equals. Otherwise the row's
    largest is subtracted, the difference divided by the temperature, and the weight of a token is exp of that: 1 for
    the most likely. Tokens drop out: all but the top_k most likely; then those before which the more likely ones of the
    rest already hold more than top_p of the rest's weight; then those whose weight is less than min_p. Of equal logits
    the lower id counts as the more likely. One token always stays. Of those that stay, the one with the largest
    weight / noise is taken, the lowest id among equals, where noise is the exponential variate of (key, token id) in
    `noise`: the exponential race, by which tokens are drawn with their probabilities.

    Where a sum or a weight lies within rounding of top_p or min_p, sets may differ in who stays.
    """

    temperature: Tensor
    """float32 [R]: 0, or a normal number."""
    top_k: Tensor
    """int32 [R]; 0, or V and more: all."""
    top_p: Tensor
    """float32 [R]"""
    min_p: Tensor
    """float32 [R]"""
    noise_keys: Tensor
    """int64 [R]: 64 bits made of the request's seed and the position of the token to be sampled (`noise_key`)."""
    repetition: Tensor
    """float32 [R], normal numbers: divides positive and multiplies negative logits of tokens that were seen."""
    presence: Tensor
    """float32 [R]: subtracted once from tokens with a count."""
    frequency: Tensor
    """float32 [R]: subtracted count times."""
    entry_starts: Tensor
    """int32 [R + 1]: row r has the entries entry_starts[r] to entry_starts[r + 1] of the next four."""
    entry_ids: Tensor
    """int32 [E]: token ids, rising in each row."""
    entry_bias: Tensor
    """float32 [E]: added; -inf forbids."""
    entry_counts: Tensor
    """int32 [E]: how often the completion holds the token; only looked at with a presence or frequency penalty."""
    entry_seen: Tensor
    """bool [E]: whether prompt or completion hold it; only looked at with a repetition penalty."""
    mask: Tensor | None
    """int32 [R, ceil(V / 32)]: bit t % 32 of word t // 32 set: token t may be sampled. None: all may, in all rows."""
    top_n: int | None
    """How many of the most likely tokens' log probabilities are wanted in any row, V at most; None: nobody wants any,
    nor the chosen token's."""
    greedy: bool
    """Known to the host: every temperature is 0."""
    plain: bool
    """Known to the host: no row has an entry, and there is no mask."""


@dataclass(frozen=True)
class Samples:
    """What `sample` found. Logarithms of probabilities are the model's own: before bias, penalties, masks, temperature
    and filters. They are None when the batch's top_n is."""

    token_ids: Tensor
    """int64 [R]; NOT_FINITE or NONE_ALLOWED where there is no token."""
    logprobs: Tensor | None = None
    """float32 [R]: each token's; NaN where there is none."""
    top_ids: Tensor | None = None
    """int64 [R, top_n]: the most likely tokens, most likely first, the lower id first among equals."""
    top_logprobs: Tensor | None = None
    """float32 [R, top_n]"""


class AttentionPlan(Protocol):
    """What `attention` needs to know of a step, worked out once for all layers. Each set has its own."""


class Kernels(Protocol):
    """A set of operations. All tensors of a call are on the set's device; activations are float32, bfloat16 or
    float16, and results have their dtype unless said. No operation changes its inputs, except the caches.

    `linear_silu_mul` and `linear_rope_and_cache` are two operations in one, with the rounding in between kept: a set
    that has no better way calls the one after the other, and a set that has gives the same bits either way.
    """

    @property
    def WEIGHT_FORMATS(self) -> Collection[WeightFormat]:
        """What `pack` can make."""

    def describe(self, dtype: torch.dtype) -> str:
        """In words, for the table at start: what runs the products and the attention for this dtype."""

    def pack(self, weight: Tensor | Sequence[Tensor], format: WeightFormat = "plain") -> Weight:
        """weight [N, K], as a checkpoint stores it -> the form that `linear` reads. May keep or copy it. One
        in parts [N', K], each below the one before, is copied from the host's memory, so parts may be views of a file
        that is closed afterwards; a single part on a device may be kept.

        Rounding to a scaled format is to the nearest, ties to even. Raises ValueError for a format that the set does
        not have, or that does not divide K.
        """

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        """x [T, K] -> x · weightᵀ [T, N]; sums in float32, rounded once. With an int8 weight a set may round each row
        of x to 15 bits, with a scale of its own, and add integers."""

    def linear_silu_mul(self, x: Tensor, weight: Weight) -> Tensor:
        """silu_mul(linear(x, weight)): weight [2F, K], gate first -> [T, F]."""

    def linear_argmax(self, x: Tensor, weight: Weight) -> tuple[Tensor, Tensor]:
        """-> the index of each row's largest of linear(x, weight), the lowest among equals: int64 [T], -1 where any of
        them is NaN or infinite; and the largest itself, float32 [T]."""

    def embedding(self, ids: Tensor, table: Tensor | Weight) -> Tensor:
        """ids int64 [T], table [V, H], or a plain weight that was packed from one -> its rows [T, H]."""

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
        cache: LayerCache,
    ) -> Tensor:
        """Rotate queries and keys by their positions (RoFormer, Su et al. 2021), write keys and values, return queries.

        qkv [T, (Q + 2·KV)·D]; positions int64 [T]; cos_sin float32 [positions, D], cosines then sines of D/2 pairs,
        pair i being (i, i + D/2); slots int64 [T]: block · P + place in the block; negative: nothing is
        written. -> queries [T, Q, D]. Rotation in float32, rounded once to the activations' dtype; a float8 cache
        rounds once more.
        """

    def linear_rope_and_cache(
        self,
        x: Tensor,
        weight: Weight,
        positions: Tensor,
        cos_sin: Tensor,
        slots: Tensor,
        cache: LayerCache,
    ) -> Tensor:
        """rope_and_cache(linear(x, weight), ...): weight [(Q + 2·KV)·D, K] -> queries [T, Q, D]."""

    def plan_attention(self, queries: Queries, *, num_heads: int, cache: LayerCache) -> AttentionPlan:
        """Work out one step. cache: any layer's, for its shape and device; num_heads: Q."""

    def attention(self, q: Tensor, cache: LayerCache, plan: AttentionPlan) -> Tensor:
        """Causal attention of the step's tokens over their sequences' cached keys, their own included.

        q [T, Q, D]; query head h reads KV head h // G; scores are scaled by D^-1/2; softmax in
        float32. -> [T, Q, D]. Blocks that a sequence does not hold, and places past its length, may hold anything:
        they never reach the result. Rows of tokens that belong to no sequence may hold anything.
        """

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Samples:
        """logits [R, V] -> each row's next token, and log probabilities where they are wanted: see SamplingBatch."""

    def logprobs(self, logits: Tensor, token_ids: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor]:
        """logits [R, V], token_ids int64 [R], top_n up to V -> natural logarithms of the probabilities of one token in
        each row, float32 [R], NaN for a negative id; the top_n most likely ids, most likely first, the lower id first
        among equals, int64 [R, top_n]; and theirs, float32 [R, top_n]. All log probabilities of a row that holds NaN
        or +inf are NaN, and its ids may be any."""
