"""Sampler: rows of logits -> tokens and logprobs. Each row is worked on alone, so no other row can change its bits.

Knows what a row asks for; not whose it is, nor how it came about.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pronk.engine.request import SamplingParams, TokenLogprobs
from pronk.engine.sampling import penalties
from pronk.engine.sampling.noise import exponential

CANDIDATES = 1024
"""Tokens looked at before a whole vocabulary is sorted: nearly always top_p ends among them."""


@dataclass(frozen=True)
class SampleRow:
    """What one row's next token depends on, beside its logits."""

    params: SamplingParams
    seed: int
    position: int
    """Of the token to be sampled, counted from the sequence's first."""
    output_counts: Mapping[int, int]
    """How often the completion holds each token."""
    prompt_ids: Set[int]
    """Tokens of the prompt; needed only with repetition_penalty."""
    forbidden_ids: Set[int]
    """Tokens that must not come next."""
    mask: NDArray[np.int32] | None = None
    """Words of 32 tokens, bit t % 32 of word t // 32: which tokens may come next; None: all."""


@dataclass(frozen=True)
class Sampled:
    """One row's result. token is None when its logits were not finite."""

    token: int | None
    logprobs: TokenLogprobs | None = None


def sample(logits: Tensor, rows: Rows[SampleRow]) -> list[Sampled]:
    """logits float32 [R, V], one row for each of `rows`; not changed."""
    finite = torch.isfinite(logits).all(dim=-1).tolist()
    greedy = logits.argmax(dim=-1).tolist()
    return [_sample_row(logits[i], row, greedy[i]) if finite[i] else Sampled(token=None) for i, row in enumerate(rows)]


def _sample_row(logits: Tensor, row: SampleRow, most_likely: int) -> Sampled:
    adjusted = _adjust(logits, row)
    if row.params.temperature == 0:
        token = most_likely if adjusted is None else int(adjusted.argmax())
    else:
        token = _draw(logits if adjusted is None else adjusted, row)
    wanted = row.params.logprobs
    return Sampled(token, None if wanted is None else _logprobs(logits, token, wanted))


def _adjust(logits: Tensor, row: SampleRow) -> Tensor | None:
    """-> a changed copy, or None when the row asks for no change."""
    params = row.params
    counted = bool(row.output_counts) and bool(params.presence_penalty or params.frequency_penalty)
    repeated = params.repetition_penalty != 1
    if not (params.logit_bias or counted or repeated or row.forbidden_ids or row.mask is not None):
        return None
    adjusted = logits.clone()
    if params.logit_bias:
        penalties.apply_bias(adjusted, params.logit_bias)
    if repeated:
        penalties.apply_repetition(adjusted, row.prompt_ids | row.output_counts.keys(), params.repetition_penalty)
    if counted:
        penalties.apply_counts(adjusted, row.output_counts, params.presence_penalty, params.frequency_penalty)
    if row.forbidden_ids:
        penalties.forbid(adjusted, row.forbidden_ids)
    if row.mask is not None:
        allowed = np.unpackbits(row.mask.view(np.uint8), bitorder="little")[: len(adjusted)]
        adjusted[torch.from_numpy(allowed).to(adjusted.device) == 0] = float("-inf")
    return adjusted


def _draw(logits: Tensor, row: SampleRow) -> int:
    """Draw from softmax(logits / temperature), restricted by top_k, top_p and min_p."""
    params = row.params
    # A temperature near 0 would overflow the quotient; the largest logit as zero keeps the largest quotient zero.
    scaled = ((logits - logits.max()).double() / params.temperature).float()
    ids = _keep(scaled, params)
    kept = scaled if ids is None else scaled[ids]
    token_ids = torch.arange(len(logits), device=logits.device) if ids is None else ids
    winner = int((torch.exp(kept) / exponential(row.seed, row.position, token_ids)).argmax())
    return winner if ids is None else int(ids[winner])


def _keep(scaled: Tensor, params: SamplingParams) -> Tensor | None:
    """scaled float32 [V], its largest 0 -> ids of the tokens that may be drawn, most likely first; None for all."""
    limit = min(params.top_k or len(scaled), len(scaled))
    if limit == len(scaled) and params.top_p == 1 and params.min_p == 0:
        return None
    weights = torch.exp(scaled)
    total = weights.sum() if limit == len(scaled) else weights.topk(limit).values.sum()
    top, ids = weights.topk(min(limit, CANDIDATES))
    kept = _count_kept(top, total, params)
    if kept == len(top) < limit:  # they may go on past the candidates
        top, ids = weights.topk(limit)
        kept = _count_kept(top, total, params)
    return ids[:kept]


def _count_kept(top: Tensor, total: Tensor, params: SamplingParams) -> int:
    """top float32 [n], weights in falling order, of a distribution with this total -> how many top_p and min_p keep.

    top_p keeps a token while the probability before it does not exceed top_p (Meta's rule); min_p keeps what is at
    least min_p times as likely as the first. At least one is kept.
    """
    probabilities = top.double() / total.double()
    before = probabilities.cumsum(0) - probabilities
    keep = top >= params.min_p * top[0]
    if params.top_p < 1:
        keep &= before <= params.top_p
    return max(1, int(keep.sum()))


def _logprobs(logits: Tensor, token: int, count: int) -> TokenLogprobs:
    """Of the model's own distribution: before bias, penalties, temperature and filters."""
    logprobs = logits.log_softmax(dim=-1)
    top, ids = logprobs.topk(count) if count else (logprobs[:0], logprobs[:0].long())
    return TokenLogprobs(float(logprobs[token]), ids.tolist(), top.tolist())
