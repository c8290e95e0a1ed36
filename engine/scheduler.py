"""Scheduler: who runs next, and how many tokens. Knows sequences and blocks; no tensor, no clock, no process.

One rule: every running sequence has tokens that are known but not computed, and a step gives each as many of them as
the budget allows. A prompt that needs several steps, an answer that grows by one token, a sequence that lost its
blocks: all are the same to it. Sequences with one token left go first, so a long prompt never holds up running
streams; then the others and the waiting ones, in order of arrival. While somebody waits, a long prompt takes half of
what is left of the budget, so that the next one need not wait until it is read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from pronk.engine.cache.manager import CacheManager
from pronk.engine.errors import PronkError
from pronk.engine.sequence import Sequence, Status


class SchedulingError(PronkError):
    """The scheduler was asked for something impossible: a fault of ours, never a client's."""


@dataclass(frozen=True)
class Row:
    """One sequence's part of a step: tokens [start, start + num_tokens) of it are computed."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    """Whether the step reaches its last known token, so that its logits choose the next."""


class Scheduler:
    """Continuous batching over one cache.

    Invariants after every call: a sequence is in exactly one of `waiting` and `running` until it has finished;
    only running sequences hold blocks; the oldest running sequence is never preempted, so one always moves on.
    """

    def __init__(self, cache: CacheManager, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.cache = cache
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue it. It must fit into the cache when it is alone, or it could never end."""
        if self.cache.blocks_for(sequence.num_prompt + sequence.max_tokens) > self.cache.pool.num_blocks:
            raise SchedulingError(f"request {sequence.request_id} cannot fit into the cache")
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that has finished, wherever it is; its blocks are free after this."""
        if sequence in self.running:
            self.running.remove(sequence)
            # Numbers that went wrong must not be found again as somebody's prefix.
            if sequence.finish_reason == "error":
                self.cache.discard(sequence)
            else:
                self.cache.release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Row]:
        """The next step. Empty only when there is no work."""
        budget = self._max_num_batched_tokens
        rows: dict[Sequence, Row] = {}
        for sequence in sorted(self.running, key=lambda sequence: sequence.num_remaining > 1):
            if not budget:
                break
            if sequence.status is not Status.RUNNING:  # preempted for one before it
                continue
            row = _next_row(sequence, self._share(sequence, budget))
            if self._make_room(sequence, row.start + row.num_tokens, rows):
                rows[sequence] = row
                budget -= row.num_tokens
        budget = self._admit(budget, rows)
        self._use_up(budget, rows)
        return list(rows.values())

    def commit(self, rows: list[Row], sampled: Mapping[str, int]) -> None:
        """The step was computed. sampled: request id -> token, for the rows that sample and did not fail.

        Sequences that end here leave, and so do those that ended while the step ran.
        """
        for row in rows:
            sequence = row.sequence
            if sequence.status is Status.RUNNING:
                sequence.num_computed = row.start + row.num_tokens
                self.cache.remember(sequence, row.start)
                if row.samples and sequence.request_id in sampled:
                    sequence.append(sampled[sequence.request_id])
            if sequence.status is Status.FINISHED:
                self.remove(sequence)

    def _make_room(self, sequence: Sequence, num_tokens: int, rows: dict[Sequence, Row]) -> bool:
        """Give it blocks for num_tokens, taking them from the youngest. -> False when it had to give up its own."""
        while not self.cache.grow(sequence, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            rows.pop(victim, None)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Its blocks are taken; it waits at the front, and what it knows is computed again: by a cache hit, as far as
        nobody needed the blocks meanwhile."""
        self.running.remove(sequence)
        self.cache.release(sequence)
        sequence.status = Status.WAITING
        sequence.preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _share(self, sequence: Sequence, budget: int) -> int:
        """What a sequence may take of what is left: all; but half of it, rounded up, when it has much to compute and
        others wait."""
        much = sequence.num_remaining > self._max_num_batched_tokens // 2
        return -(-budget // 2) if much and self.waiting else budget

    def _use_up(self, budget: int, rows: dict[Sequence, Row]) -> None:
        """Give what is left of the budget to rows that were cut for others who then could not use it."""
        for sequence, row in rows.items():
            longer = _next_row(sequence, row.num_tokens + budget)
            if self.cache.grow(sequence, longer.start + longer.num_tokens):
                rows[sequence] = longer
                budget -= longer.num_tokens - row.num_tokens

    def _admit(self, budget: int, rows: dict[Sequence, Row]) -> int:
        """Start waiting sequences, oldest first, while budget, places and blocks last. -> what is left of the budget.

        One starts only if the free blocks hold all it knows beside what the running ones still need for what they
        know: else it would soon be preempted, or preempt.
        """
        reserved = sum(
            max(0, self.cache.blocks_for(sequence.num_tokens) - len(sequence.block_table)) for sequence in self.running
        )
        while budget and self.waiting and len(self.running) < self._max_num_seqs:
            sequence = self.waiting[0]
            matched = self.cache.match(sequence)
            needed = self.cache.missing(sequence, matched, sequence.num_tokens)
            if self.running and needed + reserved > self.cache.pool.num_free:
                break
            self.waiting.popleft()
            self.cache.adopt(sequence, matched)
            sequence.num_cached = max(sequence.num_cached, min(sequence.num_computed, sequence.num_prompt))
            row = _next_row(sequence, self._share(sequence, budget))
            if not self.cache.grow(sequence, row.start + row.num_tokens):
                raise SchedulingError(f"request {sequence.request_id} does not fit into an empty cache")
            sequence.status = Status.RUNNING
            self.running.append(sequence)
            rows[sequence] = row
            budget -= row.num_tokens
            reserved += max(0, self.cache.blocks_for(sequence.num_tokens) - len(sequence.block_table))
        return budget


def _next_row(sequence: Sequence, budget: int) -> Row:
    """As many of the sequence's remaining tokens as the budget allows."""
    num_tokens = min(sequence.num_remaining, budget)
    return Row(sequence, sequence.num_computed, num_tokens, samples=num_tokens == sequence.num_remaining)
