"""Noise for sampling: a function of (seed, position, token id) and of nothing else, so that neither the batch nor the
schedule, nor the order in which numbers are drawn, can change what is sampled. Knows no logits."""

from __future__ import annotations

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
MASK64 = 0xFFFFFFFFFFFFFFFF


def splitmix64(state: int) -> int:
    """One output of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators")."""
    state = (state + 0x9E3779B97F4A7C15) & MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
    return state ^ (state >> 31)


def _mix32(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser (Appleby), on int64 tensors that hold 32-bit values."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK32
    return x ^ (x >> 16)


def exponential(seed: int, position: int, token_ids: Tensor) -> Tensor:
    """Independent Exp(1) variates for one draw. seed: 64 bits; position: of the token to be sampled in its sequence.

    token_ids int64 [n] -> float32 [n], positive. With p the probabilities, argmax(p / exponential) is distributed as p
    (the exponential race, which is the Gumbel-max trick without logarithms of logarithms).
    """
    key = splitmix64(splitmix64(seed & MASK64) ^ position)
    mixed = _mix32((token_ids * 0x9E3779B1 + (key & MASK32)) & MASK32)
    mixed = _mix32(mixed ^ (key >> 32))
    # 2^-32 steps from just above 0, where the race is decided: fine enough for a token of any probability that matters.
    uniform = (mixed.to(torch.float64) + 0.5) * 2.0**-32
    return -torch.log1p(-uniform).to(torch.float32)
