"""Biases and penalties: what changes a row of logits before it is sampled. Sparse: touches only the tokens named."""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
from torch import Tensor


def apply_bias(logits: Tensor, bias: Mapping[int, float]) -> None:
    """logits float32 [V], changed in place: each named token's logit plus its bias."""
    ids = torch.tensor(list(bias), dtype=torch.int64, device=logits.device)
    logits[ids] += torch.tensor(list(bias.values()), dtype=torch.float32, device=logits.device)


def apply_repetition(logits: Tensor, seen: Set[int], penalty: float) -> None:
    """In place: tokens that prompt or completion hold become less likely (CTRL, Keskar et al. 2019, section 4.1)."""
    ids = torch.tensor(sorted(seen), dtype=torch.int64, device=logits.device)
    values = logits[ids]
    logits[ids] = torch.where(values > 0, values / penalty, values * penalty)


def apply_counts(logits: Tensor, counts: Mapping[int, int], presence: float, frequency: float) -> None:
    """In place: minus presence, minus frequency · count, for tokens of the completion (OpenAI's definition)."""
    ids = torch.tensor(list(counts), dtype=torch.int64, device=logits.device)
    numbers = torch.tensor(list(counts.values()), dtype=torch.float32, device=logits.device)
    logits[ids] -= presence + frequency * numbers


def forbid(logits: Tensor, ids: Set[int]) -> None:
    """In place: these tokens cannot be sampled."""
    logits[torch.tensor(sorted(ids), dtype=torch.int64, device=logits.device)] = float("-inf")
