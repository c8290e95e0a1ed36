"""The kernels that choose a token: none of them sorts, and a row's noise is drawn only where it is looked at.

`sampling` launches them in this order; `SamplingBatch` says what they compute. R rows, V tokens, C chunks of a row.

1. `adjust_kernel` and `adjust_entries_kernel`, only where the batch is not plain: logits -> adjusted float32 [R, V].
2. `largest_kernel`: the largest of each chunk. Greedy rows need no more.
3. `race_kernel`: the weights, their sum, and the winner of the race in each chunk, as if every token could be chosen.
4. `choose_kernel`: the row's token.

Filters without a sort. Tokens that stay are a beginning of the order "more likely first, of equals the lower id first".
So the winner of the whole race, if it stays, is the winner among those that stay; and if it does not, then nobody stays
who is not before it. Whether it stays takes one look at the row: how many tokens are before it, and what they weigh.
The same look finds the best of those before it, the next to be asked. With the usual filters nine of ten winners stay;
each that does not about halves what is left.

Grids. adjust, largest, race: (R, C). choose: (R,); a row without filters costs it nothing but its C partial results.

Bytes. A look reads a row once: V · itemsize, 257 kB in bfloat16 for the 128,256 tokens of Llama 3. All looks after the
first find it in the L2 cache.

Floor, at the 4.3 TB/s that an H200 copies with: 128 rows in bfloat16 are 33 MB, 8 µs for the first look. Noise takes
some 40 instructions a token, so that the race is bound by them: 16 million tokens on 132 SMs, about 25 µs.

Numbers, promise 1. Chunks begin at multiples of CHUNK, and each row's partial results are merged in one tree, so that
nothing depends on the other rows. Sums of weights are float64.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pronk.kernels.gpu.linear_kernels import largest_of
from pronk.kernels.interface import NONE_ALLOWED as _NONE_ALLOWED

NONE_ALLOWED = tl.constexpr(_NONE_ALLOWED)
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def is_finite(x):
    """A NaN is no less than anything."""
    return tl.abs(x) < float("inf")


@triton.jit
def is_allowed(mask_ptr, row, tokens, inside, num_words):
    """The bits of `SamplingBatch.mask`."""
    words = tl.load(mask_ptr + row * num_words + tokens // 32, mask=inside, other=0)
    return ((words >> (tokens % 32)) & 1) != 0


@triton.jit
def adjust_kernel(
    logits_ptr, stride, mask_ptr, adjusted_ptr, vocabulary, num_words, HAS_MASK: tl.constexpr, CHUNK: tl.constexpr
):
    """logits [R, V] -> adjusted float32 [R, V]: -inf where the mask forbids, NaN where a logit is not finite."""
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = tokens < vocabulary
    logits = tl.load(logits_ptr + row * stride + tokens, mask=inside, other=0.0).to(tl.float32)
    adjusted = logits
    if HAS_MASK:
        adjusted = tl.where(is_allowed(mask_ptr, row, tokens, inside, num_words), adjusted, float("-inf"))
    adjusted = tl.where(is_finite(logits), adjusted, float("nan"))
    tl.store(adjusted_ptr + row * vocabulary + tokens, adjusted, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_entries"])
def adjust_entries_kernel(
    logits_ptr, stride, mask_ptr, adjusted_ptr, vocabulary, num_words,
    starts_ptr, ids_ptr, bias_ptr, counts_ptr, seen_ptr, repetition_ptr, presence_ptr, frequency_ptr,
    num_rows, num_entries, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write again what bias and penalties change. Entries of all rows lie in one list, of which a program takes BLOCK,
    and finds their rows by halving."""
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entries < num_entries
    low = tl.zeros((BLOCK,), dtype=tl.int32)
    high = low + num_rows - 1
    width = num_rows
    while width > 1:
        middle = (low + high) // 2
        # The row is past the middle one if that one ends here or before.
        past = tl.load(starts_ptr + middle + 1, mask=inside, other=0) <= entries
        low = tl.where(past, tl.minimum(middle + 1, high), low)
        high = tl.where(past, high, middle)
        width = (width + 1) // 2
    rows = low.to(tl.int64)
    tokens = tl.load(ids_ptr + entries, mask=inside, other=0)
    logits = tl.load(logits_ptr + rows * stride + tokens, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + entries, mask=inside, other=0.0)
    repetition = tl.load(repetition_ptr + rows, mask=inside, other=1.0)
    counts = tl.load(counts_ptr + entries, mask=inside, other=0)
    presence = tl.load(presence_ptr + rows, mask=inside, other=0.0)
    frequency = tl.load(frequency_ptr + rows, mask=inside, other=0.0)

    values = logits + bias
    repeated = tl.where(values > 0, tl.div_rn(values, repetition), values * repetition)
    values = tl.where(tl.load(seen_ptr + entries, mask=inside, other=0) != 0, repeated, values)
    values = values - (presence * (counts > 0).to(tl.float32) + frequency * counts.to(tl.float32))
    values = tl.minimum(tl.maximum(values, -LARGEST), LARGEST)
    values = tl.where(bias == float("-inf"), float("-inf"), values)
    if HAS_MASK:
        values = tl.where(is_allowed(mask_ptr, rows, tokens, inside, num_words), values, float("-inf"))
    values = tl.where(is_finite(logits), values, float("nan"))
    tl.store(adjusted_ptr + rows * vocabulary + tokens, values, mask=inside)


@triton.jit
def largest_kernel(
    x_ptr, stride, largest_ptr, ids_ptr, vocabulary, num_chunks, ADJUSTED: tl.constexpr, CHUNK: tl.constexpr
):
    """The largest of each chunk of x [R, V], and the lowest token that has it: float32 and int32 [R, C]. ids -1: one is
    not a number that a logit can be. ADJUSTED: x is what `adjust_kernel` wrote, where -inf means forbidden."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(x_ptr + row * stride + tokens, mask=tokens < vocabulary, other=0.0).to(tl.float32)
    is_number = (x == x) if ADJUSTED else is_finite(x)
    # What lies past the end is the last token, forbidden: that changes no maximum.
    x = tl.where(tokens < vocabulary, x, float("-inf"))
    ids = tl.where(is_number, tl.minimum(tokens, vocabulary - 1), -1)
    largest, first = largest_of(x[None, :], ids[None, :])
    one = tl.arange(0, 1)
    tl.store(largest_ptr + row * num_chunks + chunk + one, largest)
    tl.store(ids_ptr + row * num_chunks + chunk + one, first)


@triton.jit
def largest_of_row(largest_ptr, ids_ptr, row, num_chunks, BLOCK_C: tl.constexpr):
    """-> the row's largest, and the lowest token that has it; -1 where a chunk says so."""
    # A chunk to spare repeats the last, which changes no maximum.
    places = row * num_chunks + tl.minimum(tl.arange(0, BLOCK_C), num_chunks - 1)
    values, ids = tl.load(largest_ptr + places), tl.load(ids_ptr + places)
    first = tl.min(tl.where(values == tl.max(tl.where(values == values, values, float("-inf")), 0), ids, 2147483647), 0)
    first = tl.where(tl.min(ids, 0) < 0, -1, first)
    return tl.max(tl.where(values == values, values, float("-inf")), 0), first


@triton.jit
def scale(x, largest, temperature):
    """-> logarithms of likelihoods, 0 for the most likely."""
    return tl.div_rn(x - largest, temperature + tl.zeros_like(x))


@triton.jit
def mix32(x):
    """MurmurHash3's 32-bit finaliser (Appleby), as in `noise`."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def exponential(key, tokens):
    """`noise.exponential` from the same random bits, in float32: -log(1 - u), u in (0, 1).

    Small u decide the race, where a device's logarithm is coarse: there it is 2 · artanh(u / (2 - u)), by its series,
    whose next term is 3e-10 of the sum.
    """
    bits = tokens.to(tl.uint32) * 0x9E3779B1 + (key & 0xFFFFFFFF).to(tl.uint32)
    bits = mix32(mix32(bits) ^ (key >> 32).to(tl.uint32))
    u = (bits.to(tl.float32) + 0.5) * (1 / 4294967296)
    rest = ((bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * (1 / 4294967296)
    s = u / (2.0 - u)
    z = s * s
    series = 2.0 * s * (1.0 + z * (1 / 3 + z * (1 / 5 + z * (1 / 7 + z * (1 / 9)))))
    return tl.where(u < 0.25, series, -tl.log(rest))


@triton.jit
def race_kernel(
    x_ptr, stride, largest_ptr, ids_ptr, temperature_ptr, keys_ptr, scores_ptr, winners_ptr, weights_ptr,
    vocabulary, num_chunks, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The best weight / noise of each chunk, the lowest token that has it, and the chunk's weight: float32, int32 and
    float64 [R, C]. Nothing is written for rows that are greedy or have no token."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    largest, first = largest_of_row(largest_ptr, ids_ptr, row, num_chunks, BLOCK_C)
    if (temperature > 0) & (first >= 0) & (largest > float("-inf")):
        tokens = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + row * stride + tokens, mask=tokens < vocabulary, other=float("-inf")).to(tl.float32)
        weights = tl.exp(scale(x, largest, temperature))
        scores = weights / exponential(tl.load(keys_ptr + row), tokens)
        best = tl.max(scores, 0)
        place = row * num_chunks + chunk
        tl.store(scores_ptr + place, best)
        # A chunk of nothing but forbidden tokens has scores of zero: it never wins.
        tl.store(winners_ptr + place, tl.min(tl.where(scores == best, tokens, 2147483647), 0))
        tl.store(weights_ptr + place, tl.sum(weights.to(tl.float64), 0))


@triton.jit
def choose_kernel(
    x_ptr, stride, largest_ptr, ids_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, keys_ptr,
    scores_ptr, winners_ptr, weights_ptr, out_ptr, vocabulary, num_chunks,
    GREEDY: tl.constexpr, TILE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Tokens int64 [R], NOT_FINITE or NONE_ALLOWED where there is none. GREEDY: nobody has raced."""
    row = tl.program_id(0).to(tl.int64)
    largest, token = largest_of_row(largest_ptr, ids_ptr, row, num_chunks, BLOCK_C)
    temperature = tl.load(temperature_ptr + row)
    if token >= 0:
        if largest == float("-inf"):
            token = tl.full((), NONE_ALLOWED, tl.int32)
        if not GREEDY:  # noqa: SIM102  the one is known when it is compiled, the other is not
            if (token >= 0) & (temperature > 0):
                chunks = tl.minimum(tl.arange(0, BLOCK_C), num_chunks - 1)
                scores = tl.load(scores_ptr + row * num_chunks + chunks)
                winners = tl.load(winners_ptr + row * num_chunks + chunks)
                token = tl.min(tl.where(scores == tl.max(scores, 0), winners, 2147483647), 0)
                top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
                min_p = tl.load(min_p_ptr + row)
                if (top_k > 0) | (top_p < 1) | (min_p > 0):
                    weights = tl.load(weights_ptr + row * num_chunks + chunks)
                    weight = tl.sum(tl.where(tl.arange(0, BLOCK_C) < num_chunks, weights, 0.0), 0)
                    if (top_k > 0) & (top_k < vocabulary) & (top_p < 1):
                        weight = weight_of_top_k(x_ptr + row * stride, top_k, largest, temperature, vocabulary, TILE)
                    token = first_that_stays(
                        x_ptr + row * stride, token, largest, temperature, top_k, top_p, top_p.to(tl.float64) * weight,
                        min_p, tl.load(keys_ptr + row), vocabulary, TILE,
                    )  # fmt: skip
    tl.store(out_ptr + row, token.to(tl.int64))


@triton.jit
def first_that_stays(
    row_ptr, token, largest, temperature, top_k, top_p, most_weight, min_p, key, vocabulary, TILE: tl.constexpr
):
    """token: the winner of the whole race -> the winner among those that the filters leave. most_weight float64: what
    those before one that stays may weigh, if top_p is less than 1."""
    least_scaled = tl.where(min_p > 0, tl.log(tl.where(min_p > 0, min_p, 1.0)), float("-inf"))
    stays = token < 0
    while stays == 0:
        own = tl.load(row_ptr + token).to(tl.float32)
        own_scaled = scale(own, largest, temperature)
        count = 0
        weight = tl.full((), 0.0, tl.float64)
        best = tl.full((), -1.0, tl.float32)
        next = token
        for start in range(0, vocabulary, TILE):
            tokens = start + tl.arange(0, TILE)
            x = tl.load(row_ptr + tokens, mask=tokens < vocabulary, other=float("-inf")).to(tl.float32)
            is_before = (x > own) | ((x == own) & (tokens < token))
            weights = tl.exp(scale(x, largest, temperature))
            count += tl.sum(is_before.to(tl.int32), 0)
            weight += tl.sum(tl.where(is_before, weights, 0.0).to(tl.float64), 0)
            scores = tl.where(is_before, weights / exponential(key, tokens), -1.0)
            best_here = tl.max(scores, 0)
            # Strictly: of equals the lower token, which was seen before.
            if best_here > best:
                next = tl.min(tl.where(scores == best_here, tokens, 2147483647), 0)
                best = best_here
        within = ((top_k <= 0) | (count < top_k)) & ((top_p >= 1) | (weight <= most_weight))
        stays = (count == 0) | (within & (own_scaled >= least_scaled))
        token = tl.where(stays, token, next)
    return token


@triton.jit
def ordered_bits(x):
    """float32, no NaN -> int64 in [0, 2^32), ordered alike, equal where they are equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True).to(tl.int64)  # + 0.0: of -0.0 and 0.0 only one is left
    return tl.where(bits < 0, -1 - bits, bits + 2147483648)


@triton.jit
def weight_of_top_k(row_ptr, top_k, largest, temperature, vocabulary, TILE: tl.constexpr):
    """-> float64: what the top_k most likely weigh together. The last of them is found by its bits, eight at a time:
    counts of the tokens that agree with it so far say which its next ones are (a radix select)."""
    digits = tl.arange(0, 256)
    prefix = tl.full((), 0, tl.int64)
    wanted = top_k
    for shift in tl.static_range(24, -8, -8):
        counts = tl.zeros((256,), dtype=tl.int32)
        for start in range(0, vocabulary, TILE):
            tokens = start + tl.arange(0, TILE)
            x = tl.load(row_ptr + tokens, mask=tokens < vocabulary, other=0.0).to(tl.float32)
            bits = ordered_bits(x)
            agrees = ((bits >> (shift + 8)) == prefix) & (tokens < vocabulary)
            counts += tl.histogram(((bits >> shift) & 255).to(tl.int32), 256, mask=agrees)
        at_least = tl.cumsum(counts, 0, reverse=True)
        digit = tl.max(tl.where(at_least >= wanted, digits, 0), 0)
        wanted -= tl.sum(tl.where(digits > digit, counts, 0), 0)
        prefix = prefix * 256 + digit
    weight = tl.full((), 0.0, tl.float64)
    last_weight = tl.full((), 0.0, tl.float32)
    for start in range(0, vocabulary, TILE):
        tokens = start + tl.arange(0, TILE)
        x = tl.load(row_ptr + tokens, mask=tokens < vocabulary, other=float("-inf")).to(tl.float32)
        weights = tl.exp(scale(x, largest, temperature))
        bits = ordered_bits(x)
        weight += tl.sum(tl.where(bits > prefix, weights, 0.0).to(tl.float64), 0)
        last_weight = tl.maximum(last_weight, tl.max(tl.where(bits == prefix, weights, 0.0), 0))
    return weight + last_weight.to(tl.float64) * wanted


def row_stride(logits: Tensor) -> int:
    """From one row to the next. Raises ValueError unless a row's numbers are neighbours."""
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"the rows of logits with strides {logits.stride()} are not contiguous: call .contiguous()")
    return logits.stride(0)
