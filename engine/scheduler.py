"""Scheduler: who runs next, and how many tokens. Knows sequences and blocks; no tensor, no clock, no process.

One rule: every running sequence has tokens that are known but not computed, and a step gives each as many of them as
the budget allows. A prompt that needs several steps, an answer that grows by one token, a sequence that lost its
blocks: all are the same to it. Sequences with one token left go first, so a long prompt never holds up running
streams; then the others and the waiting ones, in order of priority and arrival. While somebody waits, a long prompt
takes half of what is left of the budget, so that the next one need not wait until it is read.

A step may be planned while the one before it runs: what is handed out counts as computed, and tokens that are not read
yet as tokens.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence as Rows
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
    """Whether the step reaches its last token, so that its logits choose the next."""
    scores: range = range(0)
    """Positions of the prompt whose next tokens' log probabilities are wanted, and were not told before."""

    @property
    def end(self) -> int:
        """The first position after those that are computed: where the sampled token will stand."""
        return self.start + self.num_tokens


class Scheduler:
    """Continuous batching over one cache.

    Invariants after every call: a sequence is in exactly one of `waiting` and `running` until it has finished;
    only running sequences hold blocks, and a slot each, a number below max_num_seqs that no other has; the oldest
    running sequence is never preempted, so one always moves on; none is preempted while a step runs.
    """

    def __init__(
        self,
        cache: CacheManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_prompt_tokens: int | None = None,
    ) -> None:
        """max_num_prompt_tokens: of a step in which sequences decode; None: what they leave of the step."""
        self.cache = cache
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._num_added = 0
        self._steps_running = 0
        self._free_slots = list(range(max_num_seqs))
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_prompt_tokens = max_num_prompt_tokens or max_num_batched_tokens

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue it. It must fit into the cache when it is alone, or it could never end."""
        if self.cache.blocks_for(sequence.num_prompt + sequence.max_tokens) > self.cache.pool.num_blocks:
            raise SchedulingError(f"request {sequence.request_id} cannot fit into the cache")
        self._num_added += 1
        sequence.rank = (sequence.request.priority, self._num_added)
        self._wait(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that has finished, wherever it is; its blocks are free after this."""
        if sequence in self.running:
            self._leave(sequence)
            # Numbers that went wrong must not be found again as somebody's prefix.
            if sequence.finish_reason == "error":
                self.cache.discard(sequence)
            else:
                self.cache.release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Row]:
        """The next step. Empty only when there is no work, or none before the step that runs has been committed."""
        # Whoever must give up blocks may be in the step that runs: first let that end.
        if self._steps_running and self._reserved() > self.cache.pool.num_free:
            return []
        budget = self._budget()
        rows: dict[Sequence, Row] = {}
        for sequence in sorted(self.running, key=lambda sequence: sequence.num_remaining > 1):
            if not budget:
                break
            # Preempted for one before it, or waiting for the token that ends it.
            if sequence.status is not Status.RUNNING or not sequence.num_remaining:
                continue
            row = _next_row(sequence, self._share(sequence, budget))
            if self._make_room(sequence, row.start + row.num_tokens, rows):
                rows[sequence] = row
                budget -= row.num_tokens
        budget = self._admit(budget, rows)
        self._use_up(budget, rows)
        for sequence, row in rows.items():
            sequence.advance(row.num_tokens, samples=row.samples)
        self._steps_running += bool(rows)
        return list(rows.values())

    def commit(self, rows: Rows[Row], tokens: Rows[int | None]) -> None:
        """The oldest step that runs was computed. tokens: of the rows that sample, in order; None only where the
        sequence has failed.

        Sequences that end here leave, and so do those that ended while the step ran.
        """
        self._steps_running -= 1
        sampled = iter(tokens)
        for row in rows:
            sequence = row.sequence
            token = next(sampled) if row.samples else None
            if sequence.status is Status.RUNNING:
                self.cache.remember(sequence, row.start, row.end)
                if token is not None:
                    sequence.append(token)
                elif sequence.max_tokens == 0 and row.end == sequence.num_tokens:  # it was only to be read
                    sequence.finish("length")
            if sequence.status is Status.FINISHED:
                self.remove(sequence)

    def _budget(self) -> int:
        """Tokens of the step: fewer where somebody waits for it to stream on."""
        num_decoding = sum(sequence.num_remaining == 1 for sequence in self.running)
        most = num_decoding + self._max_num_prompt_tokens if num_decoding else self._max_num_batched_tokens
        return min(most, self._max_num_batched_tokens)

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
        """Its blocks are taken; it waits before those that came later, and what it knows is computed again: by a cache
        hit, as far as nobody needed the blocks meanwhile."""
        self._leave(sequence)
        self.cache.release(sequence)
        sequence.status = Status.WAITING
        sequence.preemptions += 1
        self.num_preemptions += 1
        self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        """Queue it: those of lower priority numbers first, then those that were added first."""
        bisect.insort(self.waiting, sequence, key=lambda waiting: waiting.rank)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        if sequence.slot is not None:
            self._free_slots.append(sequence.slot)
            sequence.slot = None

    def _reserved(self) -> int:
        """Blocks that the running sequences still need for what they know."""
        return sum(
            max(0, self.cache.blocks_for(sequence.num_tokens) - len(sequence.block_table)) for sequence in self.running
        )

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
        reserved = self._reserved()
        while budget and self.waiting and len(self.running) < self._max_num_seqs:
            sequence = self.waiting[0]
            matched = self.cache.match(sequence)
            needed = self.cache.missing(sequence, matched, sequence.num_tokens)
            if self.running and needed + reserved > self.cache.pool.num_free:
                break
            self.waiting.pop(0)
            self.cache.adopt(sequence, matched)
            sequence.num_cached = max(sequence.num_cached, min(sequence.num_computed, sequence.num_prompt))
            row = _next_row(sequence, self._share(sequence, budget))
            if not self.cache.grow(sequence, row.start + row.num_tokens):
                raise SchedulingError(f"request {sequence.request_id} does not fit into an empty cache")
            sequence.status = Status.RUNNING
            sequence.slot = self._free_slots.pop()
            self.running.append(sequence)
            rows[sequence] = row
            budget -= row.num_tokens
            reserved += max(0, self.cache.blocks_for(sequence.num_tokens) - len(sequence.block_table))
        return budget


def _next_row(sequence: Sequence, budget: int) -> Row:
    """As many of the sequence's remaining tokens as the budget allows."""
    num_tokens = min(sequence.num_remaining, budget)
    samples = num_tokens == sequence.num_remaining and sequence.max_tokens > 0
    start = sequence.num_computed
    return Row(sequence, start, num_tokens, samples, sequence.unscored(start, start + num_tokens))
