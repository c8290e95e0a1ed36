"""A step's plan as the tensors that one forward needs. Knows rows and blocks; not who they belong to, nor why."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from pronk.engine.scheduler import Row
from pronk.kernels.interface import Queries


@dataclass(frozen=True)
class Batch:
    """One forward's input. T tokens of all rows, one row after the other."""

    token_ids: Tensor
    """int64 [T], on the device."""
    positions: Tensor
    """int64 [T], on the device: each token's place in its own sequence."""
    slots: Tensor
    """int64 [T], on the device: where its keys and values go, block · block_size + place."""
    queries: Queries
    """Which tokens belong together, and where their keys are."""
    logit_rows: Tensor
    """int64 [R], on the device: the tokens whose logits are wanted."""


def build(rows: Rows[Row], block_size: int, device: torch.device) -> Batch:
    """rows: at least one. logit_rows are the last tokens of the rows that sample, in order."""
    token_ids: list[int] = []
    starts: list[int] = []
    logit_rows: list[int] = []
    positions = []
    slots = []
    for row in rows:
        sequence, first = row.sequence, row.start
        starts.append(len(token_ids))
        token_ids.extend(sequence.tokens[first : first + row.num_tokens])
        if row.samples:
            logit_rows.append(len(token_ids) - 1)
        place = torch.arange(first, first + row.num_tokens)
        positions.append(place)
        table = torch.tensor(sequence.block_table)
        slots.append(table[place // block_size] * block_size + place % block_size)
    widest = max(len(row.sequence.block_table) for row in rows)
    queries = Queries(
        starts=torch.tensor(starts, device=device),
        lens=torch.tensor([row.num_tokens for row in rows], device=device),
        context_lens=torch.tensor([row.start + row.num_tokens for row in rows], device=device),
        block_tables=torch.tensor(
            [row.sequence.block_table + [0] * (widest - len(row.sequence.block_table)) for row in rows], device=device
        ),
        max_len=max(row.num_tokens for row in rows),
        max_context_len=max(row.start + row.num_tokens for row in rows),
    )
    return Batch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.cat(positions).to(device),
        slots=torch.cat(slots).to(device),
        queries=queries,
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64, device=device),
    )
