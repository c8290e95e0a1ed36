"""Deltas: a step's plan -> the order to compute it, with what is new since the last and nothing else.

Knows sequences, and what the ranks have been told of them; no tensor, and not how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

from pronk.engine.orders import Compute, Draw, RowOrder
from pronk.engine.sampling.sampler import numbers
from pronk.engine.scheduler import Row


class Deltas:
    """Remembers how much of each slot's block table has been told."""

    def __init__(self, num_slots: int) -> None:
        self._lists: list[list[int] | None] = [None] * num_slots
        self._told = [0] * num_slots

    def compute(self, rows: Rows[Row], draw: Draw) -> Compute:
        """The order for a step. Each step's order must be carried out: what it says is not said again."""
        orders = [self._row(row, draws=draw == "sample") for row in rows]
        return Compute(orders, draw, scores=any(row.scores for row in rows))

    def _row(self, row: Row, *, draws: bool) -> RowOrder:
        sequence, slot = row.sequence, row.sequence.slot
        if slot is None:
            raise ValueError(f"request {sequence.request_id} runs without a slot")
        blocks = sequence.block_table
        # A sequence that starts anew gets another list; while it runs, its list only grows.
        told = self._told[slot] if self._lists[slot] is blocks else 0
        self._lists[slot], self._told[slot] = blocks, len(blocks)
        return RowOrder(
            slot,
            row.start,
            row.num_tokens,
            sequence.tokens[row.start : row.end],
            told,
            blocks[told:],
            row.samples,
            numbers(sequence.params, sequence.seed, row.end) if draws and row.samples else None,
        )
