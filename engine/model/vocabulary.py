"""The two ends of a model, where tensors have the vocabulary's width: the embedding, and the head with what is chosen
from its logits. Each rank has the rows of its own token ids (`split`).

The embedding's rows come from the one rank that has them, as a sum with the others' zeros. Logits never leave their
rank: what is exchanged is what `sampling.shards` finds in them. Knows tensors; no layer between the ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pronk.engine.model.split import Split
from pronk.engine.parallel import Collectives
from pronk.engine.sampling.shards import Shard
from pronk.kernels.interface import Kernels, Samples, SamplingBatch, Weight


@dataclass(frozen=True)
class Embedding:
    """Token ids to rows."""

    kernels: Kernels
    tp: Collectives
    split: Split
    table: Weight
    """[V, H]: the head itself, where both are one and neither is rounded. Of several ranks each has vocab_per_rank
    rows, zero where there is no token."""

    def __call__(self, ids: Tensor) -> Tensor:
        """ids int64 [T] -> [T, H]."""
        if self.tp.size == 1:
            return self.kernels.embedding(ids, self.table)
        places = ids - self.split.vocab_start
        ours = (places >= 0) & (ids < self.split.vocab_stop)
        rows = self.kernels.embedding(torch.where(ours, places, 0), self.table)
        return self.tp.all_reduce(torch.where(ours.unsqueeze(1), rows, 0))


@dataclass(frozen=True)
class Head:
    """The last layer's output to logits, and those to tokens."""

    kernels: Kernels
    tp: Collectives
    split: Split
    weight: Weight
    """As the embedding's table."""

    @property
    def can_draw(self) -> bool:
        """Whether `sample` waits for nothing but the device, and so can be part of a step."""
        return self.tp.size == 1

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, H] -> [R, V], or this rank's columns of it: those of its tokens that exist. In hidden's dtype."""
        logits = self.kernels.linear(hidden, self.weight)
        return logits if self.tp.size == 1 else logits[:, : self.split.vocab_stop - self.split.vocab_start]

    def largest(self, hidden: Tensor) -> Tensor:
        """hidden [R, H] -> int64 [R]: the most likely token, the lowest id among equals; -1 where a logit is not
        finite."""
        if self.tp.size == 1:
            return self.kernels.linear_argmax(hidden, self.weight)[0]
        return self._shard.largest(self.logits(hidden))

    def sample(self, hidden: Tensor, batch: SamplingBatch) -> Samples:
        """hidden [R, H] -> see `Kernels.sample`."""
        if self.tp.size == 1:
            return self.kernels.sample(self.logits(hidden), batch)
        return self._shard.sample(self.logits(hidden), batch)

    def logprobs(self, hidden: Tensor, token_ids: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [R, H], token_ids int64 [R] -> see `Kernels.logprobs`."""
        if self.tp.size == 1:
            return self.kernels.logprobs(self.logits(hidden), token_ids, top_n)
        return self._shard.logprobs(self.logits(hidden), token_ids, top_n)

    @property
    def _shard(self) -> Shard:
        return Shard(self.tp, self.split.vocab_start, self.split.vocab_per_rank)
