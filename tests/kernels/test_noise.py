"""The noise: pinned to values that a second implementation, on plain integers, gives; and random enough to sample with.

An implementation for another device can be held to the same golden values.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pronk.kernels.noise import exponential as exponential_of_key
from pronk.kernels.noise import noise_key, splitmix64, uniform, uniform_bits

VOCABULARY = 128256


def exponential(seed: int, position: int, token_ids: Tensor) -> Tensor:
    return exponential_of_key(noise_key(seed, position), token_ids)


def plain_splitmix64(state: int) -> int:
    """As Vigna's splitmix64.c has it, in numbers that wrap at 64 bits."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def plain_fmix32(h: int) -> int:
    """As MurmurHash3.cpp has it, in numbers that wrap at 32 bits."""
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def plain_uniform_bits(seed: int, position: int, token: int) -> int:
    key = plain_splitmix64(plain_splitmix64(seed % 2**64) ^ position)
    low, high = key % 2**32, key >> 32
    return plain_fmix32(plain_fmix32((token * 0x9E3779B1 + low) % 2**32) ^ high)


def plain_exponential(seed: int, position: int, token: int) -> float:
    return -math.log1p(-(plain_uniform_bits(seed, position, token) + 0.5) / 2**32)


# Made with the plain implementation above: seed, position, token, 32 uniform bits, the variate.
GOLDEN = [
    (0, 0, 0, 0x103EE100, 0.06556246429681778),
    (0, 0, 1, 0x67068374, 0.5149058103561401),
    (0, 1, 0, 0x8A5B3604, 0.7775168418884277),
    (1, 0, 0, 0x0E974910, 0.058684684336185455),
    (42, 17, 128009, 0xAC27FD55, 1.1162220239639282),
    (-1, 131071, 128255, 0xA894FE9F, 1.0744763612747192),
    (9223372036854775807, 1, 0, 0x1BB0A925, 0.11447344720363617),
    (-9223372036854775808, 131071, 127999, 0x3A5FBC07, 0.2588008940219879),
    (1234567890123456789, 4096, 31415, 0x5A75298D, 0.43595048785209656),
]


def uniforms(seed: int, position: int, token_ids: Tensor) -> Tensor:
    """float64, what `exponential` was made from, as far as float32 holds it."""
    return -torch.expm1(-exponential(seed, position, token_ids).double())


def kolmogorov_smirnov(values: Tensor) -> float:
    """√n · the largest distance from the uniform distribution on (0, 1). Above 1.95 with a probability of 0.001."""
    ordered = values.double().sort().values
    n = len(ordered)
    ranks = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * float(torch.maximum(ranks[1:] - ordered, ordered - ranks[:-1]).max())


def correlation(one: Tensor, other: Tensor) -> float:
    """√n · Pearson's coefficient: about standard normal where the two are independent."""
    return math.sqrt(one.numel()) * float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


def test_the_plain_implementation_is_the_published_one() -> None:
    """Published outputs: SplitMix64 of the seed 1234567, fmix32 of 1."""
    gamma = 0x9E3779B97F4A7C15
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [plain_splitmix64(1234567 + step * gamma) for step in range(3)] == published
    assert (plain_fmix32(0), plain_fmix32(1)) == (0, 0x514E28B7)


def test_splitmix64() -> None:
    states = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 1234567, 0x9E3779B97F4A7C15]
    assert [splitmix64(state) for state in states] == [plain_splitmix64(state) for state in states]


@pytest.mark.parametrize(("seed", "position", "token", "bits", "variate"), GOLDEN)
def test_golden(seed: int, position: int, token: int, bits: int, variate: float) -> None:
    assert plain_uniform_bits(seed, position, token) == bits
    assert int(uniform_bits(noise_key(seed, position), torch.tensor([token]))) % 2**32 == bits
    assert float(uniform(noise_key(seed, position), torch.tensor([token]))) == (bits + 0.5) / 2**32
    noise = exponential(seed, position, torch.tensor([token]))
    # One step of float32: logarithms of two libraries may differ in their last bit of float64.
    assert float(noise) == pytest.approx(variate, rel=2**-23, abs=0.0)


@pytest.mark.parametrize("seed", [0, 1, -1, 42, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("position", [0, 1, 131071])
def test_a_vocabulary_is_the_plain_implementations(seed: int, position: int) -> None:
    token_ids = torch.arange(0, VOCABULARY, 61)
    noise = exponential(seed, position, token_ids)
    assert noise.dtype == torch.float32
    expected = torch.tensor([plain_exponential(seed, position, token) for token in token_ids.tolist()])
    torch.testing.assert_close(noise, expected, rtol=2**-23, atol=0.0)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1])
@pytest.mark.parametrize("position", [0, 131071])
def test_a_key_fits_into_64_bits_with_a_sign(seed: int, position: int) -> None:
    expected = plain_splitmix64(plain_splitmix64(seed % 2**64) ^ position)
    assert int(torch.tensor(noise_key(seed, position))) % 2**64 == expected


def test_no_variate_is_less_than_its_uniform_number() -> None:
    """The CPU's sampler relies on it."""
    ids = torch.arange(VOCABULARY)
    for key in (0, -1, 1 << 40):
        assert bool((exponential_of_key(key, ids) >= uniform(key, ids).float()).all())
        assert ids.equal(torch.arange(VOCABULARY))


def test_depends_on_the_token_and_not_on_its_place() -> None:
    everything = exponential(7, 100, torch.arange(VOCABULARY))
    some = torch.tensor([5, 128000, 5, 0, 77777])
    assert torch.equal(exponential(7, 100, some), everything[some])
    assert torch.equal(exponential(7, 100, some[3:4]), everything[:1])


@pytest.mark.parametrize("seed", [0, 1, 42, -5])
@pytest.mark.parametrize("position", [1, 2, 4096])
def test_is_positive_and_at_most_33_ln_2(seed: int, position: int) -> None:
    noise = exponential(seed, position, torch.arange(VOCABULARY))
    assert bool((noise > 0).all())
    assert bool((noise <= 33 * math.log(2) * (1 + 1e-6)).all())


@pytest.mark.parametrize("seed", [0, 1, 42, -5])
def test_uniform_over_tokens(seed: int) -> None:
    assert kolmogorov_smirnov(uniforms(seed, 17, torch.arange(VOCABULARY))) < 1.95


@pytest.mark.parametrize("token", [0, 1, 128000])
def test_uniform_over_positions(token: int) -> None:
    one = torch.tensor([token])
    assert kolmogorov_smirnov(torch.cat([uniforms(3, position, one) for position in range(4000)])) < 1.95


@pytest.mark.parametrize("token", [0, 1, 128000])
def test_uniform_over_seeds(token: int) -> None:
    one = torch.tensor([token])
    assert kolmogorov_smirnov(torch.cat([uniforms(seed, 3, one) for seed in range(4000)])) < 1.95


def test_tails() -> None:
    """Small variates win races and large ones lose them: as many below 10^-3 as there should be, and above 7."""
    noise = torch.cat([exponential(9, position, torch.arange(100_000)) for position in range(10)])
    for count, probability in ((int((noise < 1e-3).sum()), -math.expm1(-1e-3)), (int((noise > 7).sum()), math.exp(-7))):
        expected = len(noise) * probability
        assert abs(count - expected) < 4 * math.sqrt(expected)


@pytest.mark.parametrize("distance", [1, 2, 16, 256, 65536, 2**32])
def test_neighbouring_seeds_are_independent(distance: int) -> None:
    tokens = torch.arange(20_000)
    for seed in (0, 41):
        assert abs(correlation(uniforms(seed, 5, tokens), uniforms(seed + distance, 5, tokens))) < 4


@pytest.mark.parametrize("distance", [1, 2, 16, 256, 65536])
def test_neighbouring_positions_are_independent(distance: int) -> None:
    tokens = torch.arange(20_000)
    for position in (0, 41):
        assert abs(correlation(uniforms(8, position, tokens), uniforms(8, position + distance, tokens))) < 4


@pytest.mark.parametrize("distance", [1, 2, 3, 16, 256, 4096, 65536])
def test_neighbouring_tokens_are_independent(distance: int) -> None:
    values = uniforms(8, 5, torch.arange(VOCABULARY))
    assert abs(correlation(values[:-distance], values[distance:])) < 4


def test_a_seed_does_not_shift_into_a_position() -> None:
    """A seed and a position cannot stand in for each other: (a, b) and (b, a), (a + 1, b) and (a, b + 1)."""
    tokens = torch.arange(1000)
    draws = {(a, b): exponential(a, b, tokens) for a in range(8) for b in range(8)}
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == 64
