"""Rotary position embedding: the frequencies, and the table of cosines and sines.

It knows positions and sizes; rotating queries and keys is a kernel's work. Tables are computed on the CPU whatever
device they go to, so that every device rotates by the same numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pronk.engine.model.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig, device: torch.device | str = "cpu") -> Tensor:
    """Radians by which each rotary pair turns per position: float32 [head_dim / 2].

    Pair i turns by theta^(-2i / head_dim) (Su et al., "RoFormer"), then Llama 3's scaling: with L the original context,
    a pair whose wavelength is above L / low_freq_factor turns `factor` times slower, one below L / high_freq_factor is
    left alone, one between is blended linearly in L / wavelength.

    Every step is float32, in the order in which transformers takes them: another order gives other last bits, and at
    position 100,000 a last bit is a visible angle.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies.to(device)
    original = scaling.original_max_position_embeddings
    longest_kept = original / scaling.high_freq_factor
    shortest_divided = original / scaling.low_freq_factor
    wavelengths = 2 * math.pi / frequencies
    kept_share = (original / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - kept_share) * frequencies / scaling.factor + kept_share * frequencies
    scaled = torch.where(wavelengths > shortest_divided, frequencies / scaling.factor, frequencies)
    between = (wavelengths >= longest_kept) & (wavelengths <= shortest_divided)
    return torch.where(between, blended, scaled).to(device)


def cos_sin_table(config: LlamaConfig, num_positions: int, device: torch.device | str = "cpu") -> Tensor:
    """Cosines and sines of positions 0 to num_positions - 1: float32 [num_positions, head_dim].

    Columns below head_dim / 2 are the cosines of the pairs, the others their sines. The angle is float32 position times
    float32 frequency, rounded to float32, as in transformers.
    """
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies(config)[None, :]
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)
