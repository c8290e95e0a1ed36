"""`sample` and `logprobs` on a CPU. Tokens are chosen by the kernels of `choosing`; what bias, penalties and masks make
of logits, and log probabilities, go row by row in torch and numpy.

The most likely tokens are found without sorting a vocabulary: the largest numbers of 2,000 groups of 64 give a bound
that no token below can pass, so that few are left to sort. Each row is worked on alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pronk.kernels import sampling
from pronk.kernels.cpu.choosing import write_choose
from pronk.kernels.cpu.code import DTYPES, Code
from pronk.kernels.interface import NOT_FINITE, Samples, SamplingBatch

GROUP = 64
"""Tokens that are represented by the most likely of them where a bound is looked for."""
LOOKS = 3
"""At a row, on average."""

Array = np.ndarray[Any, Any]


def sample(code: Code, logits: Tensor, batch: SamplingBatch) -> Samples:
    """See `Kernels.sample`."""
    if batch.plain:
        token_ids = _choose(code, logits, batch)
    else:
        rows = zip(logits.float(), sampling.rows_of(batch), strict=True)
        adjusted = torch.stack([sampling.adjust(one, row) for one, row in rows]) if len(logits) else logits.float()
        token_ids = _choose(code, adjusted, batch)
        token_ids.masked_fill_(~logits.isfinite().all(1), NOT_FINITE)
    if batch.top_n is None:
        return Samples(token_ids)
    return Samples(token_ids, *logprobs(logits, token_ids, batch.top_n))


def _choose(code: Code, x: Tensor, batch: SamplingBatch) -> Tensor:
    """x [R, V]: logits, or what was made of them."""
    num_rows, width = x.shape
    if x.stride(1) != 1:
        x = code.contiguous(x)
    out = code.empty((num_rows,), torch.int64)
    dtype, adjusted = DTYPES[x.dtype], not batch.plain
    numbers = (batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.noise_keys, out)
    code.run(
        f"choose_{'adjusted_' if adjusted else ''}{dtype}",
        write_choose(dtype, adjusted=adjusted),
        [x, x.stride(0) * x.element_size(), *numbers, width],
        num_rows,
        cost=width * (1 if batch.greedy else LOOKS),
    )
    return out


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


def _group_maxima(values: Tensor) -> Tensor:
    """values float32 [V] -> float32 [ceil(V / GROUP)]"""
    missing = -len(values) % GROUP
    return (F.pad(values, (0, missing), value=-math.inf) if missing else values).view(-1, GROUP).amax(1)


def _at_least(values: Tensor, bound: float | None) -> Tensor:
    """-> ids, rising, of the values that are not smaller."""
    if bound is None:
        return torch.arange(len(values))
    return torch.from_numpy(np.flatnonzero(values.numpy() >= bound))
