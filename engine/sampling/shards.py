"""Sampling where each rank has the logits of its own tokens only. It means what `kernels.sampling` means, and what goes
from rank to rank is a few numbers of each row: values with their token ids, counts and sums, never logits.

All ranks gather the same numbers and decide alike, so each knows the token without being told. What ranks count or add
is whole numbers (probabilities in units of 2^-40), so no order of adding shows in the result, on any device.

Tokens that top_k and top_p drop are found without sorting. Tokens race: of those that may come, the one with the
largest weight / noise wins. Whether the winner stays is a question to all ranks, how many tokens are more likely and
what they weigh together. If it does not, neither does any less likely one, so the more likely ones race again, until a
winner stays. The most likely token always does.

Knows logits and `SamplingBatch`; no request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pronk.engine.parallel import Collectives
from pronk.kernels import sampling
from pronk.kernels.interface import NONE_ALLOWED, NOT_FINITE, Samples, SamplingBatch
from pronk.kernels.noise import exponential

UNIT = 2.0**40
"""Of a sum of probabilities: 2^17 of them, each at most 1, stay well below 2^63."""
WORD = 32
"""Tokens in a word of a mask."""


@dataclass(frozen=True)
class Shard:
    """One rank's tokens: `width` ids from `first` on, a multiple of 32 each; those past the vocabulary do not exist.

    Logits are [R, those that exist], of R rows that all ranks have in the same order.
    """

    tp: Collectives
    first: int
    width: int

    def largest(self, logits: Tensor) -> Tensor:
        """-> int64 [R]: the most likely token, the lowest id among equals; NOT_FINITE where any rank's are not."""
        _, token_ids, finite = self._most_likely(self._full(logits.float()), logits)
        return token_ids.masked_fill(~finite, NOT_FINITE)

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Samples:
        """See `Kernels.sample`."""
        adjusted = self._adjusted(logits.float(), batch)
        highest, token_ids, finite = self._most_likely(adjusted, logits)
        draws = finite & (highest > -math.inf) & (batch.temperature != 0)
        if not batch.greedy and bool(draws.any()):
            rows = draws.nonzero().squeeze(1)
            token_ids[rows] = self._draw(adjusted[rows], highest[rows], _Filters.of(batch, rows))
        token_ids = token_ids.masked_fill(highest == -math.inf, NONE_ALLOWED).masked_fill(~finite, NOT_FINITE)
        if batch.top_n is None:
            return Samples(token_ids)
        return Samples(token_ids, *self.logprobs(logits, token_ids, batch.top_n))

    def logprobs(self, logits: Tensor, token_ids: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernels.logprobs`."""
        wide = self._full(logits.float())
        ordered, places = wide.sort(dim=-1, descending=True, stable=True)
        ordered, places = ordered[:, :top_n], places[:, :top_n] + self.first
        # What each rank tells: its likeliest tokens, the chosen one's logit if it has it, and whether all is well.
        chosen = self._values_of(wide, token_ids)
        well = ~(logits.isnan() | (logits == math.inf)).any(-1)
        told = torch.cat([ordered, places, wide.amax(-1, keepdim=True), chosen, well.unsqueeze(1)], dim=-1)
        gathered = self.tp.all_gather(told.double())
        tops, top_ids, highest, chosen, well = torch.split(gathered, [*[ordered.shape[1]] * 2, 1, 1, 1], dim=-1)
        highest = highest.amax(0).float()
        total = self._sum(torch.exp(wide - highest))
        logarithm = torch.log(total / UNIT).float().masked_fill(~well.amin(0).squeeze(-1).bool(), math.nan).unsqueeze(1)
        # Ranks have rising ids, so a stable sort leaves equals in the order of their ids.
        tops, order = _side_by_side(tops).sort(dim=-1, descending=True, stable=True)
        top_ids = _side_by_side(top_ids).gather(1, order)[:, :top_n].long()
        top = tops[:, :top_n].float() - highest - logarithm
        of_chosen = (chosen.amax(0).float() - highest - logarithm).squeeze(1).masked_fill(token_ids < 0, math.nan)
        return of_chosen, top_ids, top

    def _most_likely(self, adjusted: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """adjusted float32 [R, width] -> the largest of all ranks, float32 [R], its token's id, int64 [R], and whether
        all logits are finite, bool [R]."""
        values, places = _largest(adjusted)
        gathered = self._gather(values, places + self.first, logits.isfinite().all(-1))
        values, token_ids, _ = _winners(gathered)
        return values.float(), token_ids.long(), gathered[:, :, 2].amin(0).bool()

    def _draw(self, adjusted: Tensor, highest: Tensor, filters: _Filters) -> Tensor:
        """adjusted float32 [R, width], highest float32 [R]: of all ranks -> int64 [R], a token of each row."""
        scaled = (adjusted - highest.unsqueeze(1)) / filters.temperature.unsqueeze(1)
        weights = torch.exp(scaled)
        ids = torch.arange(self.first, self.first + self.width, device=adjusted.device)
        noise = torch.stack([exponential(key, ids) for key in filters.noise_keys])
        out = (adjusted == -math.inf) | (scaled < filters.log_min_p.unsqueeze(1))
        scores = (weights / noise).masked_fill(out, -math.inf)
        bounds = self._bounds(scaled, weights, filters)
        tokens = torch.full_like(filters.top_k, -1)
        while True:
            best, places = _largest(scores)
            of_place = adjusted.gather(1, places.unsqueeze(1)).squeeze(1)
            _, winners, values = _winners(self._gather(best, places + self.first, of_place))
            values, winners = values.float().unsqueeze(1), winners.long()
            likelier = (adjusted > values) | ((adjusted == values) & (ids < winners.unsqueeze(1)))
            stays = filters.without_order | self._stays(likelier, weights, filters, bounds)
            tokens = torch.where((tokens < 0) & stays, winners, tokens)
            if bool((tokens >= 0).all()):
                return tokens
            scores = scores.masked_fill(~likelier, -math.inf)

    def _stays(self, likelier: Tensor, weights: Tensor, filters: _Filters, bounds: Tensor) -> Tensor:
        """likelier bool [R, width]: than the winners -> bool [R]: whether those stay."""
        before = torch.stack([likelier.sum(-1), _in_units(weights * likelier).sum(-1)], dim=1)
        count, mass = self.tp.all_gather(before).sum(0).unbind(1)
        return ((filters.top_k == 0) | (count < filters.top_k)) & ((filters.top_p >= 1) | (mass <= bounds))

    def _bounds(self, scaled: Tensor, weights: Tensor, filters: _Filters) -> Tensor:
        """-> float64 [R]: what those before a token may weigh at most, by top_p: a share of the top_k's weight."""
        total = self._sum(weights)
        if filters.needs_top_k_weight:
            # Of the k likeliest of each rank, the k likeliest are those of all.
            count = min(int(filters.top_k.max()), self.width)
            likeliest = _side_by_side(self.tp.all_gather(scaled.topk(count, dim=-1).values))
            likeliest = torch.exp(likeliest.sort(dim=-1, descending=True).values)
            inside = torch.arange(likeliest.shape[1], device=scaled.device) < filters.top_k.unsqueeze(1)
            total = torch.where(filters.top_k > 0, _in_units(likeliest * inside).sum(-1).double(), total)
        return filters.top_p * total

    def _sum(self, weights: Tensor) -> Tensor:
        """weights float32 [R, width] -> float64 [R]: the sum of all ranks', in UNITs."""
        return self.tp.all_gather(_in_units(weights).sum(-1)).sum(0).double()

    def _gather(self, *columns: Tensor) -> Tensor:
        """columns [R] each, of numbers that float64 holds -> float64 [size, R, columns]."""
        return self.tp.all_gather(torch.stack([column.double() for column in columns], dim=1))

    def _adjusted(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """float32 -> [R, width]: see `sampling.adjust`; -inf where no token is."""
        if batch.plain:
            return self._full(logits)
        rows = [self._part(row) for row in sampling.rows_of(batch)]
        adjusted = [sampling.adjust(own, row) for own, row in zip(logits, rows, strict=True)]
        return self._full(torch.stack(adjusted) if adjusted else logits)

    def _part(self, row: sampling.Row) -> sampling.Row:
        """What a row says of this rank's tokens."""
        ours = (row.ids >= self.first) & (row.ids < self.first + self.width)
        return sampling.Row(
            **{name: getattr(row, name) for name in sampling.NUMBERS},
            ids=row.ids[ours] - self.first,
            bias=row.bias[ours],
            counts=row.counts[ours],
            seen=row.seen[ours],
            mask=None if row.mask is None else row.mask[self.first // WORD : (self.first + self.width) // WORD],
        )

    def _full(self, logits: Tensor) -> Tensor:
        """[R, those that exist] -> [R, width]."""
        missing = self.width - logits.shape[1]
        return torch.nn.functional.pad(logits, (0, missing), value=-math.inf) if missing else logits

    def _values_of(self, wide: Tensor, token_ids: Tensor) -> Tensor:
        """-> float32 [R, 1]: the logit of a row's token, or -inf where another rank has it."""
        places = token_ids - self.first
        ours = (places >= 0) & (places < self.width)
        values = wide.gather(1, torch.where(ours, places, 0).unsqueeze(1))
        return values.masked_fill(~ours.unsqueeze(1), -math.inf)


@dataclass(frozen=True)
class _Filters:
    """What rows that draw ask for, each tensor [R]."""

    temperature: Tensor
    top_k: Tensor
    """int64"""
    top_p: Tensor
    """float64"""
    log_min_p: Tensor
    """float32, -inf for none"""
    noise_keys: list[int]
    without_order: Tensor
    """Whether neither top_k nor top_p drops anything."""
    needs_top_k_weight: bool

    @classmethod
    def of(cls, batch: SamplingBatch, rows: Tensor) -> _Filters:
        """rows int64: of the batch."""
        top_k, top_p = batch.top_k[rows].long(), batch.top_p[rows]
        return cls(
            temperature=batch.temperature[rows],
            top_k=top_k,
            top_p=top_p.double(),
            log_min_p=batch.min_p[rows].double().log().float(),
            noise_keys=batch.noise_keys[rows].tolist(),
            without_order=(top_k == 0) & (top_p >= 1),
            needs_top_k_weight=bool(((top_k > 0) & (top_p < 1)).any()),
        )


def _in_units(weights: Tensor) -> Tensor:
    """float32 from 0 to 1 -> int64."""
    return (weights.double() * UNIT).round().long()


def _winners(gathered: Tensor) -> tuple[Tensor, ...]:
    """gathered float64 [size, R, columns], the first a value -> each column [R] of the rank with the largest value: the
    first of those among equals, which has the lowest ids."""
    best = (gathered[:, :, 0] == gathered[:, :, 0].amax(0)).float().argmax(0)
    return gathered.gather(0, best.view(1, -1, 1).expand(1, *gathered.shape[1:])).squeeze(0).unbind(1)


def _largest(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [R, n] -> the largest of each, and its place, the first among equals; NaN counts as nothing."""
    rows = rows.masked_fill(rows.isnan(), -math.inf)
    values = rows.amax(-1)
    places = torch.arange(rows.shape[1], device=rows.device)
    return values, torch.where(rows == values.unsqueeze(1), places, rows.shape[1]).amin(-1)


def _side_by_side(gathered: Tensor) -> Tensor:
    """[size, R, n] -> [R, size · n]."""
    return gathered.transpose(0, 1).flatten(1)
