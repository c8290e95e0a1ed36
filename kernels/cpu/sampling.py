"""`sample` and `logprobs` on a CPU: as `sampling` defines them, without sorting a vocabulary or drawing all its noise.

Three ideas. The largest numbers of 2,000 groups of 64 give a bound that no token below can pass, so that few are left
to sort. numpy finds and sorts extremes several times faster than torch. And a variate is never less than its uniform
number, so that only tokens whose weight / uniform number reaches the best score found can win: logarithms are taken of
those alone. Results equal the definition's, but for the last bits of sums.

Each row is worked on alone. Knows no threads and no request.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pronk.kernels import sampling
from pronk.kernels.interface import NONE_ALLOWED, NOT_FINITE, Samples, SamplingBatch
from pronk.kernels.noise import uniform
from pronk.kernels.sampling import Row

GROUP = 64
"""Tokens that are represented by the most likely of them where a bound is looked for."""
MARGIN = 1e-5
"""Relative: bounds keep this distance from what rounding could do to them."""

Array = np.ndarray[Any, Any]


def sample(logits: Tensor, batch: SamplingBatch) -> Samples:
    """See `Kernels.sample`."""
    rows = zip(logits.float(), sampling.rows_of(batch), strict=True)
    token_ids = torch.tensor([_choose(one, row) for one, row in rows], dtype=torch.int64)
    if batch.top_n is None:
        return Samples(token_ids)
    return Samples(token_ids, *logprobs(logits, token_ids, batch.top_n))


def largest(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [T, N] -> what `Kernels.linear_argmax` says of them."""
    wide = rows.float()
    ids = torch.tensor([_largest(one.numpy()) for one in wide], dtype=torch.int64)
    return ids, wide.amax(-1)


def logprobs(logits: Tensor, token_ids: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernels.logprobs`."""
    chosen = torch.full((len(logits),), math.nan)
    top_ids = torch.zeros(len(logits), top_n, dtype=torch.int64)
    top = torch.full((len(logits), top_n), math.nan)
    for number, (one, token) in enumerate(zip(logits.float(), token_ids.tolist(), strict=True)):
        largest = one.amax()
        total = torch.exp(one - largest).sum().log()
        if not total.isfinite():
            continue
        if token >= 0:
            chosen[number] = one[token] - largest - total
        if top_n:
            top_ids[number] = _most_likely(one, top_n)
            top[number] = one[top_ids[number]] - largest - total
    return chosen, top_ids, top


def _most_likely(logits: Tensor, count: int) -> Tensor:
    """-> int64 [count]: ids of the largest, largest first, the lower id first among equals."""
    maxima = _group_maxima(logits)
    ids = _at_least(logits, float(maxima.topk(count).values[-1]) if count <= len(maxima) else None)
    return ids[logits[ids].sort(descending=True, stable=True).indices[:count]]


def _largest(logits: Array) -> int:
    """logits float32 [V] -> id of the largest, the lowest among equals, or NOT_FINITE."""
    first = int(logits.argmax())  # numpy's is the first of equals, or of NaN
    return first if math.isfinite(logits[first]) and math.isfinite(logits.min()) else NOT_FINITE


def _choose(logits: Tensor, row: Row) -> int:
    """logits float32 [V] -> a token, or NOT_FINITE, or NONE_ALLOWED."""
    most_likely = _largest(logits.numpy())
    if most_likely == NOT_FINITE:
        return NOT_FINITE
    adjusted = sampling.adjust(logits, row)
    if adjusted is not logits:
        most_likely = int(adjusted.numpy().argmax())
        if adjusted[most_likely] == -math.inf:
            return NONE_ALLOWED
    if row.temperature == 0:
        return most_likely
    scaled = sampling.scale(adjusted, adjusted[most_likely], row)
    if row.top_p == 1 and row.min_p == 0 and not 0 < row.top_k < len(scaled):
        return _race(torch.arange(len(scaled)), torch.exp(scaled), row)
    kept = _keep(scaled, row)
    return _race(kept, torch.exp(scaled[kept]), row)


def _keep(scaled: Tensor, row: Row) -> Tensor:
    """scaled float32 [V] -> ids of the tokens that stay, rising."""
    limited = 0 < row.top_k < len(scaled)
    total = None if limited or row.top_p == 1 else torch.exp(scaled).sum(dtype=torch.float64)
    ids = _at_least(scaled, _bound(scaled, row, total))
    values = scaled[ids]
    ordered = torch.from_numpy(np.sort(values.numpy())[::-1].copy())
    if limited:
        ordered = ordered[: row.top_k]
    weights = torch.exp(ordered)
    kept = sampling.count_kept(ordered, weights, weights.sum(dtype=torch.float64) if total is None else total, row)
    last = ordered[kept - 1]
    # Of those as likely as the last that stays, the lower ids stay.
    equals = ids[values == last][: kept - int((ordered > last).sum())]
    return torch.cat([ids[values > last], equals]).sort().values


def _bound(scaled: Tensor, row: Row, total: Tensor | None) -> float | None:
    """-> a number that every token that counts reaches; None where there is none to be had cheaply. total: of all
    weights; None where top_k is set, whose weights all count, or top_p is not.

    A group's most likely token is one of them all: at least as many tokens, and at least as much weight, reach a number
    as among the groups' maxima.
    """
    maxima = torch.from_numpy(np.sort(_group_maxima(scaled).numpy())[::-1].copy())
    if 0 < row.top_k < len(scaled):
        return float(maxima[row.top_k - 1]) if row.top_k <= len(maxima) else None
    bounds = [math.log(row.min_p) * (1 + MARGIN)] if row.min_p > 0 else []
    if total is not None:
        running = torch.exp(maxima).cumsum(0, dtype=torch.float64)
        passed = (running > row.top_p * total * (1 + MARGIN)).nonzero()
        bounds += maxima[passed[:1, 0]].tolist()
    return max(bounds, default=None)


def _group_maxima(values: Tensor) -> Tensor:
    """values float32 [V] -> float32 [ceil(V / GROUP)]"""
    missing = -len(values) % GROUP
    return (F.pad(values, (0, missing), value=-math.inf) if missing else values).view(-1, GROUP).amax(1)


def _at_least(values: Tensor, bound: float | None) -> Tensor:
    """-> ids, rising, of the values that are not smaller."""
    if bound is None:
        return torch.arange(len(values))
    return torch.from_numpy(np.flatnonzero(values.numpy() >= bound))


def _race(ids: Tensor, weights: Tensor, row: Row) -> int:
    """As `sampling.race`."""
    best_case = weights / uniform(row.noise_keys, ids).float()
    favourite = int(best_case.numpy().argmax())
    reached = float(sampling.scores(ids[favourite : favourite + 1], weights[favourite : favourite + 1], row))
    left = _at_least(best_case, reached * (1 - MARGIN))
    return sampling.race(ids[left], weights[left], row)
