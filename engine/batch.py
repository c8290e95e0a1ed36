"""A step's rows as the tensors that one forward needs. Knows slots and blocks; not who they belong to, nor why.

All numbers of a step lie in one buffer, filled on the host and copied at once: `Layout` says where each part is. A
layout may have more places than the step has tokens and sequences; those are padding, which writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pronk.engine.orders import RowOrder
from pronk.engine.sampling.sampler import NUMBERS, columns
from pronk.kernels.interface import Queries, SamplingBatch


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
    sampling: SamplingBatch | None
    """Of logit_rows, where the layout has it: plain, without log probabilities. Padding is greedy."""


@dataclass(frozen=True)
class Layout:
    """How many places a batch has, and how they lie in its buffer."""

    num_tokens: int
    num_seqs: int
    num_samples: int
    draws: bool
    """Whether the batch holds what its samples depend on beside their logits."""
    num_blocks: int
    """Entries in each block table."""
    max_len: int
    """No sequence has more tokens in the step."""
    max_context_len: int
    """No sequence has more keys."""

    @property
    def _lengths(self) -> dict[str, int]:
        tokens, seqs, samples = self.num_tokens, self.num_seqs, self.num_samples
        lengths = {
            **dict.fromkeys(("token_ids", "from_slots", "positions", "slots"), tokens),
            **dict.fromkeys(("starts", "lens", "context_lens"), seqs),
            **dict.fromkeys(("logit_rows", "to_slots"), samples),
        }
        if self.draws:
            lengths |= {**dict.fromkeys(NUMBERS, samples), "entry_starts": samples + 1}
        return {**lengths, "block_tables": seqs * self.num_blocks}

    @property
    def size(self) -> int:
        return sum(self._lengths.values())

    def views(self, buffer: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """buffer int64 [size] -> its parts, as views: int64, but for the NUMBERS, which have dtypes of their own, and
        entry_starts, int32; block_tables [S, num_blocks]."""
        parts, start = {}, 0
        for name, length in self._lengths.items():
            part = buffer[start : start + length]
            dtype = NUMBERS.get(name, np.int32 if name == "entry_starts" else np.int64)
            parts[name] = part.view(dtype)[:length]
            start += length
        parts["block_tables"] = parts["block_tables"].reshape(self.num_seqs, self.num_blocks)
        return parts

    def batch(self, buffer: Tensor) -> Batch:
        """buffer int64 [size], on the device -> the batch that lies in it."""
        lengths = self._lengths
        parts = dict(zip(lengths, torch.split(buffer, list(lengths.values())), strict=True))
        queries = Queries(
            starts=parts["starts"],
            lens=parts["lens"],
            context_lens=parts["context_lens"],
            block_tables=parts["block_tables"].view(self.num_seqs, self.num_blocks),
            max_len=self.max_len,
            max_context_len=self.max_context_len,
        )
        return Batch(
            token_ids=parts["token_ids"],
            from_slots=parts["from_slots"],
            positions=parts["positions"],
            slots=parts["slots"],
            queries=queries,
            logit_rows=parts["logit_rows"],
            to_slots=parts["to_slots"],
            sampling=_sampling(parts) if self.draws else None,
        )


def _sampling(parts: Mapping[str, Tensor]) -> SamplingBatch:
    numbers: dict[str, Any] = {}
    for name, dtype in NUMBERS.items():
        of_its_own = torch.from_numpy(np.empty(0, dtype)).dtype
        numbers[name] = parts[name].view(of_its_own)[: len(parts[name])]
    none = parts["entry_starts"][:0]
    return SamplingBatch(
        **numbers,
        entry_starts=parts["entry_starts"].view(torch.int32)[: len(parts["entry_starts"])],
        entry_ids=none.view(torch.int32),
        entry_bias=none.view(torch.float32),
        entry_counts=none.view(torch.int32),
        entry_seen=none.view(torch.bool),
        mask=None,
        top_n=None,
        greedy=False,
        plain=True,
    )


def layout_of(rows: Rows[RowOrder], block_size: int, *, draws: bool) -> Layout:
    """The layout without padding. rows: at least one."""
    longest = max(row.end for row in rows)
    return Layout(
        num_tokens=sum(row.num_tokens for row in rows),
        num_seqs=len(rows),
        num_samples=sum(row.samples for row in rows),
        draws=draws,
        num_blocks=-(-longest // block_size),
        max_len=max(row.num_tokens for row in rows),
        max_context_len=longest,
    )


class BatchBuilder:
    """Fills buffers. Remembers each slot's block table as an array, so that a step only adds what has grown."""

    def __init__(self, *, num_slots: int, max_model_len: int, block_size: int) -> None:
        self._block_size = block_size
        self._tables = np.zeros((num_slots, -(-max_model_len // block_size)), dtype=np.int64)
        self.padding_slot = num_slots
        """The slot that padding's samples go to."""

    def fill(self, rows: Rows[RowOrder], layout: Layout, buffer: NDArray[np.int64]) -> None:
        """buffer int64 [layout.size]: written whole."""
        parts = layout.views(buffer)
        buffer.fill(0)
        for name in ("from_slots", "slots"):
            parts[name].fill(-1)
        parts["to_slots"].fill(self.padding_slot)
        parts["starts"].fill(layout.num_tokens)
        first, sampling = 0, 0
        for index, row in enumerate(rows):
            end, known = first + row.num_tokens, first + len(row.token_ids)
            self._tables[row.slot, row.first_block : row.first_block + len(row.blocks)] = row.blocks
            parts["token_ids"][first:known] = row.token_ids
            parts["from_slots"][known:end] = row.slot
            parts["positions"][first:end] = np.arange(row.start, row.end)
            parts["starts"][index], parts["lens"][index], parts["context_lens"][index] = first, row.num_tokens, row.end
            held = -(-row.end // self._block_size)
            parts["block_tables"][index, :held] = self._tables[row.slot, :held]
            if row.samples:
                parts["logit_rows"][sampling], parts["to_slots"][sampling] = end - 1, row.slot
                sampling += 1
            first = end
        if layout.draws:
            own = columns([row.numbers for row in rows if row.numbers is not None])
            for name, values in own.items():
                parts[name][:sampling] = values
        tables, lens, positions, slots = (parts[name] for name in ("block_tables", "lens", "positions", "slots"))
        owners = np.repeat(np.arange(len(rows)), lens[: len(rows)])
        places = positions[:first]
        slots[:first] = tables[owners, places // self._block_size] * self._block_size + places % self._block_size
