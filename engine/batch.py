"""A step's plan as the tensors that one forward needs. Knows rows and blocks; not who they belong to, nor why.

All numbers of a step lie in one buffer, filled on the host and copied at once: `Layout` says where each part is. A
layout may have more places than the step has tokens and sequences; those are padding, which writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pronk.engine.scheduler import Row
from pronk.kernels.interface import Queries


@dataclass(frozen=True)
class Batch:
    """One forward's input. T tokens of all rows, one row after the other; all tensors on the device."""

    token_ids: Tensor
    """int64 [T]: what the host knows."""
    from_slots: Tensor
    """int64 [T]: the slot whose last sampled token stands here, or -1: the one in token_ids does."""
    positions: Tensor
    """int64 [T]: each token's place in its own sequence."""
    slots: Tensor
    """int64 [T]: where its keys and values go, block · block_size + place; -1 for padding."""
    queries: Queries
    """Which tokens belong together, and where their keys are."""
    logit_rows: Tensor
    """int64 [R]: the tokens whose logits choose the next."""
    to_slots: Tensor
    """int64 [R]: the slot that keeps the token sampled from each of logit_rows; padding has a slot of its own."""


@dataclass(frozen=True)
class Layout:
    """How many places a batch has, and how they lie in its buffer."""

    num_tokens: int
    num_seqs: int
    num_samples: int
    num_blocks: int
    """Entries in each block table."""
    max_len: int
    """No sequence has more tokens in the step."""
    max_context_len: int
    """No sequence has more keys."""

    @property
    def _lengths(self) -> tuple[int, ...]:
        tokens, seqs, samples = self.num_tokens, self.num_seqs, self.num_samples
        return (tokens, tokens, tokens, tokens, seqs, seqs, seqs, samples, samples, seqs * self.num_blocks)

    @property
    def size(self) -> int:
        return sum(self._lengths)

    def views(self, buffer: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """buffer int64 [size] -> its parts, as views: token ids, from slots, positions, slots, starts, lens, context
        lens, logit rows, to slots, block tables [S, num_blocks]."""
        ends = np.cumsum(self._lengths)
        parts = [buffer[end - length : end] for end, length in zip(ends, self._lengths, strict=True)]
        return [*parts[:-1], parts[-1].reshape(self.num_seqs, self.num_blocks)]

    def batch(self, buffer: Tensor) -> Batch:
        """buffer int64 [size], on the device -> the batch that lies in it."""
        ids, from_slots, positions, slots, starts, lens, contexts, logit_rows, to_slots, tables = torch.split(
            buffer, list(self._lengths)
        )
        queries = Queries(
            starts=starts,
            lens=lens,
            context_lens=contexts,
            block_tables=tables.view(self.num_seqs, self.num_blocks),
            max_len=self.max_len,
            max_context_len=self.max_context_len,
        )
        return Batch(ids, from_slots, positions, slots, queries, logit_rows, to_slots)


def layout_of(rows: Rows[Row], block_size: int) -> Layout:
    """The layout without padding. rows: at least one."""
    longest = max(row.end for row in rows)
    return Layout(
        num_tokens=sum(row.num_tokens for row in rows),
        num_seqs=len(rows),
        num_samples=sum(row.samples for row in rows),
        num_blocks=-(-longest // block_size),
        max_len=max(row.num_tokens for row in rows),
        max_context_len=longest,
    )


class BatchBuilder:
    """Fills buffers. Remembers each slot's block table as an array, so that a step only adds what has grown."""

    def __init__(self, *, num_slots: int, max_model_len: int, block_size: int) -> None:
        self._block_size = block_size
        self._tables = np.zeros((num_slots, -(-max_model_len // block_size)), dtype=np.int64)
        self._lists: list[list[int]] = [[] for _ in range(num_slots)]
        self._known = [0] * num_slots
        self.padding_slot = num_slots
        """The slot that padding's samples go to."""

    def fill(self, rows: Rows[Row], layout: Layout, buffer: NDArray[np.int64]) -> None:
        """buffer int64 [layout.size]: written whole."""
        parts = layout.views(buffer)
        token_ids, from_slots, positions, slots, starts, lens, contexts, logit_rows, to_slots, tables = parts
        from_slots.fill(-1)
        slots.fill(-1)
        to_slots.fill(self.padding_slot)
        for part in (token_ids, positions, lens, contexts, logit_rows, tables):
            part.fill(0)
        starts.fill(layout.num_tokens)
        first, sampling = 0, 0
        for index, row in enumerate(rows):
            sequence, end = row.sequence, first + row.num_tokens
            slot = self._slot(row)
            known = sequence.tokens[row.start : row.end]
            token_ids[first : first + len(known)] = known
            from_slots[first + len(known) : end] = slot
            positions[first:end] = np.arange(row.start, row.end)
            starts[index], lens[index], contexts[index] = first, row.num_tokens, row.end
            held = -(-row.end // self._block_size)
            tables[index, :held] = self._tables[slot, :held]
            if row.samples:
                logit_rows[sampling], to_slots[sampling] = end - 1, slot
                sampling += 1
            first = end
        owners = np.repeat(np.arange(len(rows)), lens[: len(rows)])
        places = positions[:first]
        slots[:first] = tables[owners, places // self._block_size] * self._block_size + places % self._block_size

    def _slot(self, row: Row) -> int:
        """-> the row's slot, its table brought up to date."""
        sequence = row.sequence
        slot = sequence.slot
        if slot is None:
            raise ValueError(f"request {sequence.request_id} runs without a slot")
        blocks = sequence.block_table
        # A sequence that starts anew gets another list; while it runs, its list only grows.
        known = self._known[slot] if self._lists[slot] is blocks else 0
        self._tables[slot, known : len(blocks)] = blocks[known:]
        self._lists[slot], self._known[slot] = blocks, len(blocks)
        return slot
