"""Cases of each operation: shapes, seeded inputs, and how far a result may lie from a float64 oracle.

Tests and benchmarks read the same tables, so what is timed is what is checked. Every set's results are held to the
same bounds. Knows `reference`, as the oracle; no other set, no test framework, and no device but the CPU: a caller
moves the inputs.

The bounds are derived, element by element, from the formats alone. u is a format's unit roundoff, half its epsilon.
A product of two bfloat16 or float16 numbers is exact in float32, so a result that is summed in float32 and rounded
once differs from the exact one by u · |result|, and by the error of the sum. For n terms that is at most
n · 2^-24 · sum |terms| in the worst case, which no order of additions comes near; with roundings taken as independent
it is CONFIDENCE · √n · 2^-24 · sum |terms|, except with a probability of 2n · exp(-CONFIDENCE² / 2) (Higham & Mary
2019, "A new approach to probabilistic rounding error analysis", theorem 3.1): 3e-4 for n = 8192.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pronk.kernels import reference
from pronk.kernels.interface import LayerCache, Queries, SamplingBatch
from pronk.kernels.noise import noise_key

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5
"""What Llama's norms add to the mean square."""

FLOAT32_ROUNDOFF = 2.0**-24
CONFIDENCE = 6.0

UNHELD = 2**31 - 1
"""What block tables hold past a sequence's blocks: an index that no cache has, so that reading it fails."""


@dataclass(frozen=True)
class LinearCase:
    """x [num_rows, in_features] times weight [out_features, in_features]."""

    name: str
    num_rows: int
    in_features: int
    out_features: int


@dataclass(frozen=True)
class RowsCase:
    """num_rows rows of `width` numbers: for embedding, the norms, and silu_mul (where width is F, half the input's)."""

    name: str
    num_rows: int
    width: int


@dataclass(frozen=True)
class Heads:
    """The attention heads of a model."""

    head_dim: int
    num_kv_heads: int
    group: int
    """Query heads for each KV head."""

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def name(self) -> str:
        return f"d{self.head_dim}-kv{self.num_kv_heads}-g{self.group}"


@dataclass(frozen=True)
class Chunk:
    """What one sequence does in a step: its last `num_tokens` of `context_len` positions."""

    num_tokens: int
    context_len: int


@dataclass(frozen=True)
class AttentionCase:
    """One step: a chunk for each sequence, in this order."""

    name: str
    heads: Heads
    block_size: int
    chunks: tuple[Chunk, ...]
    sharpness: float = 1.0
    """Standard deviation of the queries; at 1 the scores are about normal, at 8 a few keys take all the weight."""


@dataclass(frozen=True)
class RopeCase:
    """num_tokens tokens at scattered positions, written to scattered slots."""

    name: str
    heads: Heads
    block_size: int
    num_tokens: int


# Outputs and inputs: those of the 1B (qkv, down), of tiny models, and odd ones that fill no vector.
_LINEAR_SHAPES = (
    (3072, 2048),
    (2048, 8192),
    (192, 96),
    (1000, 96),
    (512, 64),
    (16, 16),
    (17, 33),
    (1, 1),
    (3, 257),
)
_ROWS = (1, 2, 15, 16, 17, 33)
LINEAR = tuple(
    LinearCase(f"{rows}x{in_features}-{out_features}", rows, in_features, out_features)
    for number, (out_features, in_features) in enumerate(_LINEAR_SHAPES)
    for rows in (_ROWS if out_features * in_features < 2**20 else _ROWS[number % 3 :: 3])
)

# Widths: the hidden and MLP sizes of the 1B, that of a tiny model, and odd ones.
ROWS = tuple(RowsCase(f"{rows}x{width}", rows, width) for width in (1, 17, 64, 1000, 2048, 8192) for rows in (1, 33))

HEADS = (
    Heads(64, 2, 1),
    Heads(128, 2, 2),
    Heads(128, 2, 3),
    Heads(64, 2, 4),
    Heads(64, 1, 8),
    Heads(128, 1, 8),
    Heads(64, 1, 16),
    Heads(128, 1, 16),
)
"""The 1B has groups of 4 heads of 64; the 3B, of 3 heads of 128; the 8B, of 4; the 70B, of 8; the 405B, of 16."""
BLOCK_SIZES = (16, 64)
LENGTHS = (1, 2, 15, 16, 17, 31, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1030)
"""Around a block's end, a split's end, and with several splits."""

STEPS: dict[str, tuple[Chunk, ...]] = {
    "decode": tuple(Chunk(1, length) for length in LENGTHS),
    "prefill": tuple(Chunk(length, length) for length in (1, 15, 16, 17, 255, 256, 257)),
    "chunks": (Chunk(5, 17), Chunk(16, 272), Chunk(2, 257), Chunk(4, 256), Chunk(100, 513), Chunk(7, 1030)),
    "mixed": (Chunk(1, 1030), Chunk(19, 19), Chunk(1, 1), Chunk(3, 16), Chunk(33, 300), Chunk(1, 256), Chunk(4, 4)),
}
ATTENTION = (
    *(
        AttentionCase(f"{step}-{heads.name}-p{block_size}", heads, block_size, chunks)
        for number, heads in enumerate(HEADS)
        for step, chunks in STEPS.items()
        for block_size in (BLOCK_SIZES if step == "mixed" else BLOCK_SIZES[number % 2 :][:1])
    ),
    AttentionCase("sharp-d64-kv2-g4-p16", Heads(64, 2, 4), 16, STEPS["mixed"], sharpness=8.0),
    AttentionCase("sharp-d128-kv2-g3-p64", Heads(128, 2, 3), 64, STEPS["mixed"], sharpness=8.0),
)

ROPE = tuple(
    RopeCase(f"{num_tokens}-{heads.name}-p{block_size}", heads, block_size, num_tokens)
    for heads in HEADS
    for block_size in BLOCK_SIZES
    for num_tokens in (1, 33)
)


@dataclass(frozen=True)
class AttentionInputs:
    """Caches hold NaN wherever no sequence has a key: in blocks of nobody, and in places past a sequence's end."""

    q: Tensor
    """[T, Q, D]"""
    cache: LayerCache
    queries: Queries
    """Its block tables hold UNHELD past a sequence's blocks."""
    keys: tuple[Tensor, ...]
    """Each sequence's, dense: [KV, context_len, D]."""
    values: tuple[Tensor, ...]
    """Each sequence's, dense: [KV, context_len, D]."""


@dataclass(frozen=True)
class RopeInputs:
    """What `rope_and_cache` takes, beside the caches."""

    qkv: Tensor
    positions: Tensor
    cos_sin: Tensor
    slots: Tensor
    """All different."""
    cache_shape: tuple[int, int, int, int]
    """[B, KV, P, D], with room that no slot names."""


def generator(seed: int) -> torch.Generator:
    """A source of random numbers that no other draws from."""
    return torch.Generator().manual_seed(seed)


def normal(source: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers, drawn in float32: the same for every dtype, but for rounding."""
    return torch.randn(shape, generator=source).to(dtype)


def linear_inputs(case: LinearCase, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """-> x [T, K] and weight [N, K], with outputs of about unit size, as in a trained model."""
    source = generator(seed)
    weight = normal(source, case.out_features, case.in_features, dtype=torch.float32) * case.in_features**-0.5
    return normal(source, case.num_rows, case.in_features, dtype=dtype), weight.to(dtype)


def attention_inputs(case: AttentionCase, dtype: torch.dtype, seed: int) -> AttentionInputs:
    """Random queries, keys and values, in blocks of random order."""
    source = generator(seed)
    heads = case.heads
    shape = (heads.num_kv_heads, heads.head_dim)
    num_tokens = sum(chunk.num_tokens for chunk in case.chunks)
    q = (normal(source, num_tokens, heads.num_heads, heads.head_dim, dtype=torch.float32) * case.sharpness).to(dtype)
    keys = tuple(normal(source, shape[0], chunk.context_len, shape[1], dtype=dtype) for chunk in case.chunks)
    values = tuple(normal(source, shape[0], chunk.context_len, shape[1], dtype=dtype) for chunk in case.chunks)
    lens = [chunk.num_tokens for chunk in case.chunks]
    tables, cache = paged(keys, values, case.block_size, source)
    queries = Queries(
        starts=torch.tensor([sum(lens[:index]) for index in range(len(lens))]),
        lens=torch.tensor(lens),
        context_lens=torch.tensor([chunk.context_len for chunk in case.chunks]),
        block_tables=tables,
        max_len=max(lens),
        max_context_len=max(chunk.context_len for chunk in case.chunks),
    )
    return AttentionInputs(q, cache, queries, keys, values)


def paged(
    keys: tuple[Tensor, ...], values: tuple[Tensor, ...], block_size: int, source: torch.Generator
) -> tuple[Tensor, LayerCache]:
    """Dense keys and values of each sequence, [KV, context_len, D] -> block tables [S, most blocks] and a cache that
    holds them in blocks of random order, among blocks of nobody."""
    num_kv_heads, _, head_dim = keys[0].shape
    counts = [-(-tensor.shape[1] // block_size) for tensor in keys]
    num_blocks = sum(counts) + 3
    free = torch.randperm(num_blocks, generator=source).tolist()
    tables = torch.full((len(keys), max(counts) + 1), UNHELD)
    caches = [keys[0].new_full((num_blocks, num_kv_heads, block_size, head_dim), math.nan) for _ in range(2)]
    for index, count in enumerate(counts):
        table = torch.tensor([free.pop() for _ in range(count)])
        tables[index, :count] = table
        places = torch.arange(keys[index].shape[1])
        for cache, dense in zip(caches, (keys[index], values[index]), strict=True):
            cache[table[places // block_size], :, places % block_size] = dense.transpose(0, 1)
    return tables, LayerCache(*caches)


def in_float8(cache: LayerCache) -> LayerCache:
    """The same numbers, rounded to float8 with a scale for each token and head, as `LayerCache` says."""

    def rounded_side(side: Tensor) -> tuple[Tensor, Tensor]:
        largest = torch.finfo(torch.float8_e4m3fn).max
        scales = (side.float().abs().amax(-1) / largest).clamp(min=torch.finfo(torch.float32).tiny)
        scaled = (side.float() / scales.unsqueeze(-1)).clamp(-largest, largest)
        return scaled.to(torch.float8_e4m3fn), scales

    (keys, key_scales), (values, value_scales) = rounded_side(cache.keys), rounded_side(cache.values)
    return LayerCache(keys, values, key_scales, value_scales)


def exact(cache: LayerCache) -> LayerCache:
    """The numbers that a cache stands for, in float64 and without scales."""
    if cache.key_scales is None or cache.value_scales is None:
        return LayerCache(cache.keys.double(), cache.values.double())
    return LayerCache(
        cache.keys.double() * cache.key_scales.double().unsqueeze(-1),
        cache.values.double() * cache.value_scales.double().unsqueeze(-1),
    )


def rope_inputs(case: RopeCase, dtype: torch.dtype, seed: int) -> RopeInputs:
    """Positions up to 2000, turned by Llama 3's frequencies without their scaling."""
    source = generator(seed)
    heads = case.heads
    width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    num_blocks = case.num_tokens // case.block_size + 3
    angles = torch.outer(torch.arange(2000.0), 500000.0 ** -torch.arange(0, 1, 2 / heads.head_dim))
    return RopeInputs(
        qkv=normal(source, case.num_tokens, width, dtype=dtype),
        positions=torch.randint(2000, (case.num_tokens,), generator=source),
        cos_sin=torch.cat([angles.cos(), angles.sin()], dim=-1),
        slots=torch.randperm(num_blocks * case.block_size, generator=source)[: case.num_tokens],
        cache_shape=(num_blocks, heads.num_kv_heads, case.block_size, heads.head_dim),
    )


def roundoff(dtype: torch.dtype) -> float:
    """u: the largest relative error of one rounding to this format."""
    return torch.finfo(dtype).eps / 2


def sum_error(num_terms: int) -> float:
    """Error of a sum in float32, as a share of the sum of its terms' magnitudes; see the module's docstring."""
    return CONFIDENCE * math.sqrt(num_terms) * FLOAT32_ROUNDOFF


def rounded(expected: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """What a value that lies within `error` of `expected` may differ from it once it is rounded to dtype."""
    finfo = torch.finfo(dtype)
    return error + roundoff(dtype) * (expected.abs() + error) + finfo.smallest_normal * finfo.eps


def linear_bound(x: Tensor, weight: Tensor, expected: Tensor, dtype: torch.dtype) -> Tensor:
    """x [T, K], weight [N, K], expected [T, N]: one sum of K products."""
    magnitudes = x.double().abs() @ weight.double().abs().t()
    return rounded(expected, sum_error(x.shape[1]) * magnitudes, dtype)


def int8_bound(x: Tensor, weight: Tensor, expected: Tensor, dtype: torch.dtype) -> Tensor:
    """As linear_bound, where x [T, K] is rounded to 15 bits too: each number by half a step, of 1/16319 of its row's
    largest."""
    steps = x.double().abs().amax(1, keepdim=True) / 16319
    error = steps / 2 * (1 + 4 * FLOAT32_ROUNDOFF) * weight.double().abs().sum(1)
    return rounded(expected, error + sum_error(4) * (expected.abs() + error), dtype)


def norm_bound(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """expected [T, H]: the root of a sum of H squares, which halves its error; then four roundings in float32 (square,
    division by H, root, product), one to the dtype, and one of the product with the weight."""
    relative = sum_error(expected.shape[1]) / 2 + 4 * FLOAT32_ROUNDOFF + roundoff(dtype)
    return rounded(expected, relative * expected.abs(), dtype)


def silu_mul_bound(expected: Tensor, up: Tensor, dtype: torch.dtype) -> Tensor:
    """expected and up [T, F]: exp (2 units of the last place at most), sum, quotient, product: six roundings. Where
    exp(-gate) overflows float32 the quotient is 0, and the exact one is less than 2^-120."""
    return rounded(expected, 6 * FLOAT32_ROUNDOFF * expected.abs() + 2.0**-120 * up.abs(), dtype)


def rope_bound(x: Tensor, cos_sin: Tensor, expected: Tensor, dtype: torch.dtype) -> Tensor:
    """x and expected [T, heads, D], cos_sin [T, D] of each token's position: two products and their sum."""
    cos, sin = cos_sin.double().abs().unsqueeze(1).chunk(2, dim=-1)
    first, second = x.double().abs().chunk(2, dim=-1)
    magnitudes = torch.cat([first * cos + second * sin, second * cos + first * sin], dim=-1)
    return rounded(expected, 2 * FLOAT32_ROUNDOFF * magnitudes, dtype)


def attention_bound(
    inputs: AttentionInputs, expected: Tensor, dtype: torch.dtype, weights: torch.dtype = torch.float32
) -> Tensor:
    """expected [T, Q, D]. A score, a sum of D products of magnitude at most |q| · |k| · D^-1/2, is off by `score`; so
    is, relatively, its weight, and the sum of weights that divides it. Numerator and denominator are sums of as many
    terms as the sequence has keys; a merge of splits adds two roundings each, which these sums' bound leaves room for.

    weights: the format that weights are rounded to before they meet the values. Each is off by u · weight then, and so
    are the two sums; where it is less than the smallest normal number, by half of the smallest there is, for each of a
    split's 256 keys, of which at least one has a weight near 1.
    """
    cache = exact(inputs.cache)
    q, keys, values = inputs.q.double(), cache.keys, cache.values
    plan = reference.plan_attention(inputs.queries, num_heads=q.shape[1], cache=inputs.cache)
    mean_magnitude = reference.attention(q, LayerCache(keys, values.abs()), plan)
    head_dim = q.shape[-1]
    longest_key = keys.norm(dim=-1).nan_to_num(0.0).max()
    scores = q.norm(dim=-1, keepdim=True) * longest_key * head_dim**-0.5
    score = (sum_error(head_dim) + 4 * FLOAT32_ROUNDOFF) * scores
    sums = 2 * sum_error(int(inputs.queries.context_lens.max()))
    error = (2 * score + sums) * mean_magnitude
    if weights != torch.float32:
        finfo = torch.finfo(weights)
        tiny = 256 * finfo.smallest_normal * finfo.eps * values.abs().nan_to_num(0.0).max()
        error += roundoff(weights) * (mean_magnitude + expected.abs()) + tiny
    return rounded(expected, error, dtype)


# Sampling

SAMPLING: tuple[dict[str, float], ...] = (
    {"temperature": 0.0},
    {},
    {"temperature": 0.6, "top_p": 0.9},
    {"top_k": 50},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.02},
    {"min_p": 0.05},
    {"temperature": 2.0, "top_p": 0.95},
    {"temperature": 2.0, "top_p": 0.5, "min_p": 1e-4},
    {"top_k": 3000, "top_p": 0.99},
    {"top_k": 1, "temperature": 2.0},
)
"""Arguments of `sampling_batch`."""


def sampling_batch(
    num_rows: int,
    *,
    temperature: float = 1.0,
    top_k: float = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    mask: Tensor | None = None,
    top_n: int | None = None,
    seed: int = 0,
) -> SamplingBatch:
    """Rows with the same parameters, without entries."""
    return SamplingBatch(
        temperature=torch.full((num_rows,), temperature),
        top_k=torch.full((num_rows,), int(top_k), dtype=torch.int32),
        top_p=torch.full((num_rows,), top_p),
        min_p=torch.full((num_rows,), min_p),
        noise_keys=torch.tensor([noise_key(seed, position) for position in range(num_rows)], dtype=torch.int64),
        repetition=torch.ones(num_rows),
        presence=torch.zeros(num_rows),
        frequency=torch.zeros(num_rows),
        entry_starts=torch.zeros(num_rows + 1, dtype=torch.int32),
        entry_ids=torch.empty(0, dtype=torch.int32),
        entry_bias=torch.empty(0),
        entry_counts=torch.empty(0, dtype=torch.int32),
        entry_seen=torch.empty(0, dtype=torch.bool),
        mask=mask,
        top_n=top_n,
        greedy=temperature == 0,
        plain=mask is None,
    )


Entries = Mapping[int, tuple[float, int, bool]]
"""token -> bias, count, seen"""


def with_entries(batch: SamplingBatch, entries: Sequence[Entries]) -> SamplingBatch:
    """entries: of each row."""
    flat = [(token, *value) for row in entries for token, value in sorted(row.items())]
    ends = itertools.accumulate((len(row) for row in entries), initial=0)
    return replace(
        batch,
        entry_starts=torch.tensor(list(ends), dtype=torch.int32),
        entry_ids=torch.tensor([each[0] for each in flat], dtype=torch.int32),
        entry_bias=torch.tensor([each[1] for each in flat], dtype=torch.float32),
        entry_counts=torch.tensor([each[2] for each in flat], dtype=torch.int32),
        entry_seen=torch.tensor([each[3] for each in flat], dtype=torch.bool),
        plain=False,
    )


def sampling_row(batch: SamplingBatch, row: int) -> SamplingBatch:
    """-> one row of a batch, as a batch."""
    start, end = batch.entry_starts[row : row + 2].tolist()
    rows = {name: getattr(batch, name)[row : row + 1].clone() for name in _SAMPLING_ROWS}
    entries = {name: getattr(batch, name)[start:end].clone() for name in _SAMPLING_ENTRIES}
    starts = torch.tensor([0, end - start], dtype=torch.int32, device=batch.entry_starts.device)
    mask = None if batch.mask is None else batch.mask[row : row + 1].clone()
    return replace(batch, **rows, **entries, entry_starts=starts, mask=mask)


_SAMPLING_ROWS = ("temperature", "top_k", "top_p", "min_p", "noise_keys", "repetition", "presence", "frequency")
_SAMPLING_ENTRIES = ("entry_ids", "entry_bias", "entry_counts", "entry_seen")


def language_like(num_rows: int, vocabulary: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Logits [num_rows, vocabulary]: a few tokens far ahead of many; in bfloat16 full of equals."""
    source = generator(seed)
    logits = torch.randn(num_rows, vocabulary, generator=source) * 2.2
    num_ahead = min(30, vocabulary)
    ahead = torch.stack([torch.randperm(vocabulary, generator=source)[:num_ahead] for _ in range(num_rows)])
    return logits.scatter_add_(1, ahead, torch.linspace(14, 6, num_ahead).expand(num_rows, -1)).to(dtype)
