"""Noise for sampling: a function of (seed, position, token id) and of nothing else, so that neither the batch nor the
schedule, nor the order in which numbers are drawn, can change what is sampled. Knows no logits."""

from __future__ import annotations

import torch
from torch import Tensor

MASK64 = 0xFFFFFFFFFFFFFFFF


def splitmix64(state: int) -> int:
    """One output of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators")."""
    state = (state + 0x9E3779B97F4A7C15) & MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
    return state ^ (state >> 31)


def noise_key(seed: int, position: int) -> int:
    """seed: 64 bits; position: of the token to be sampled in its sequence. -> 64 bits, as a signed number."""
    return _signed(splitmix64(splitmix64(seed & MASK64) ^ position), 64)


def uniform_bits(key: int, token_ids: Tensor) -> Tensor:
    """token_ids integers [n] -> int32 [n]: 32 random bits each, of (key, token id)."""
    mixed = token_ids.to(torch.int32, copy=True)
    mixed.mul_(_signed(0x9E3779B1, 32)).add_(_signed(key & 0xFFFFFFFF, 32))
    _mix32(mixed)
    mixed.bitwise_xor_(_signed(key >> 32 & 0xFFFFFFFF, 32))
    return _mix32(mixed)


def uniform(key: int, token_ids: Tensor) -> Tensor:
    """-> float64 [n]: evenly spaced in (0, 1), by 2^-32 from 2^-33 on: fine enough for any probability that matters."""
    offset = uniform_bits(key, token_ids).bitwise_xor_(_signed(0x80000000, 32))
    return offset.to(torch.float64).add_(2.0**31 + 0.5).mul_(2.0**-32)


def exponential(key: int, token_ids: Tensor) -> Tensor:
    """Independent Exp(1) variates for one draw: float32 [n], positive.

    With p the probabilities, argmax(p / exponential) is distributed as p: the exponential race, which is the Gumbel-max
    trick without logarithms of logarithms. No variate is less than its uniform number.
    """
    return -torch.log1p(-uniform(key, token_ids)).to(torch.float32)


def _mix32(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser (Appleby), in place on int32."""
    x.bitwise_xor_(_shifted(x, 16)).mul_(_signed(0x85EBCA6B, 32))
    x.bitwise_xor_(_shifted(x, 13)).mul_(_signed(0xC2B2AE35, 32))
    return x.bitwise_xor_(_shifted(x, 16))


def _shifted(x: Tensor, places: int) -> Tensor:
    """To the right, zeros coming in: int32's own shift repeats the sign."""
    return (x >> places).bitwise_and_((1 << 32 - places) - 1)


def _signed(value: int, bits: int) -> int:
    """The number that the same bits stand for with a sign."""
    return value - (1 << bits) if value >> bits - 1 else value
