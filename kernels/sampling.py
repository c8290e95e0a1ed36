"""What `sample` and `logprobs` mean, in plain torch: each row sorts its whole vocabulary. The twin of every fast way.

Knows logits and what a `SamplingBatch` says of them; no request.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pronk.kernels.interface import NONE_ALLOWED, NOT_FINITE, Samples, SamplingBatch
from pronk.kernels.noise import exponential

LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Row:
    """One row of a SamplingBatch: its fields are explained there."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    noise_keys: int
    repetition: float
    presence: float
    frequency: float
    ids: Tensor
    bias: Tensor
    counts: Tensor
    seen: Tensor
    mask: Tensor | None


NUMBERS = ("temperature", "top_k", "top_p", "min_p", "noise_keys", "repetition", "presence", "frequency")


def rows_of(batch: SamplingBatch) -> Iterator[Row]:
    """The batch, row by row."""
    numbers: dict[str, list[Any]] = {name: getattr(batch, name).tolist() for name in NUMBERS}
    starts = batch.entry_starts.tolist()
    for place in range(len(starts) - 1):
        own = slice(starts[place], starts[place + 1])
        yield Row(
            **{name: values[place] for name, values in numbers.items()},
            ids=batch.entry_ids[own].long(),
            bias=batch.entry_bias[own],
            counts=batch.entry_counts[own],
            seen=batch.entry_seen[own],
            mask=None if batch.mask is None else batch.mask[place],
        )


def sample(logits: Tensor, batch: SamplingBatch) -> Samples:
    """See `Kernels.sample`."""
    chosen = [_choose(one.float(), row) for one, row in zip(logits, rows_of(batch), strict=True)]
    token_ids = torch.tensor(chosen, dtype=torch.int64, device=logits.device)
    if batch.top_n is None:
        return Samples(token_ids)
    return Samples(token_ids, *logprobs(logits, token_ids, batch.top_n))


def logprobs(logits: Tensor, token_ids: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernels.logprobs`."""
    wide = logits.float()
    difference = wide - wide.amax(-1, keepdim=True)
    rows = difference - difference.exp().sum(-1, keepdim=True, dtype=torch.float64).log().float()
    chosen = rows.gather(1, token_ids.clamp(min=0).unsqueeze(1)).squeeze(1).masked_fill(token_ids < 0, math.nan)
    # A stable sort leaves equals in the order of their ids.
    top_ids = wide.sort(dim=-1, descending=True, stable=True).indices[:, :top_n]
    return chosen, top_ids, rows.gather(1, top_ids)


def _choose(logits: Tensor, row: Row) -> int:
    """logits float32 [V] -> a token, or NOT_FINITE, or NONE_ALLOWED."""
    if not logits.isfinite().all():
        return NOT_FINITE
    adjusted = adjust(logits, row)
    # A stable sort leaves equals in the order of their ids.
    ordered, ids = adjusted.sort(descending=True, stable=True)
    if ordered[0] == -math.inf:
        return NONE_ALLOWED
    if row.temperature == 0:
        return int(ids[0])
    scaled = scale(ordered[: row.top_k or None], ordered[0], row)
    weights = torch.exp(scaled)
    kept = count_kept(scaled, weights, weights.sum(dtype=torch.float64), row)
    return race(ids[:kept], weights[:kept], row)


def adjust(logits: Tensor, row: Row) -> Tensor:
    """float32 [V] -> what the row's bias, penalties and mask make of it: finite, or -inf where it is forbidden."""
    if row.mask is None and not len(row.ids):
        return logits
    adjusted = logits.clone()
    adjusted[row.ids] = _adjust_entries(logits[row.ids], row)
    if row.mask is not None:
        bits = row.mask.unsqueeze(1) >> torch.arange(32, dtype=torch.int32, device=logits.device)
        adjusted.masked_fill_(((bits & 1) == 0).flatten()[: len(logits)], -math.inf)
    return adjusted


def _adjust_entries(values: Tensor, row: Row) -> Tensor:
    """values float32 [n]: the logits of the row's entries."""
    values = values + row.bias
    repeated = torch.where(values > 0, values / row.repetition, values * row.repetition)
    values = torch.where(row.seen, repeated, values)
    values = values - (row.presence * (row.counts > 0).float() + row.frequency * row.counts.float())
    return values.clamp(-LARGEST, LARGEST).masked_fill(row.bias == -math.inf, -math.inf)


def scale(adjusted: Tensor, largest: Tensor, row: Row) -> Tensor:
    """Logarithms of likelihoods: 0 for the most likely. A quotient that overflows becomes -inf, as it should."""
    return (adjusted - largest) / row.temperature


def count_kept(scaled: Tensor, weights: Tensor, total: Tensor, row: Row) -> int:
    """How many tokens top_p and min_p leave: at least one.

    scaled, weights float32 [n]: most likely first, of no more than the top_k, and of all that may stay; total float64:
    of the weights of the top_k, or of all tokens where top_k is not set.
    """
    stays = scaled >= (math.log(row.min_p) if row.min_p > 0 else -math.inf)
    if row.top_p < 1:
        running = weights.cumsum(0, dtype=torch.float64)
        stays[1:] &= running[:-1] <= row.top_p * total
    return int(stays.sum())


def race(ids: Tensor, weights: Tensor, row: Row) -> int:
    """ids int64 [n], weights float32 [n] -> the winner's id, the lowest among equals."""
    reached = scores(ids, weights, row)
    return int(ids[reached == reached.max()].min())


def scores(ids: Tensor, weights: Tensor, row: Row) -> Tensor:
    """What the tokens reach in the race: float32 [n]."""
    return weights / exponential(row.noise_keys, ids)
