"""One generation's state: its tokens, how many of them are computed, which blocks hold them, and how it ends.

Knows no tensor and no other sequence. `num_computed` catches up with `num_tokens`; the scheduler says by how much.
While a step runs, the token that it samples is counted although nobody knows it yet: it is `pending`, and the next step
can already be planned with it.
"""

from __future__ import annotations

import enum
from collections import Counter
from typing import Any, Protocol

from pronk.engine.detokenizer import Detokenizer
from pronk.engine.errors import PronkError
from pronk.engine.request import FinishReason, Request


class Matcher(Protocol):
    """What a sequence knows of the grammar that its text follows (`engine.grammar.Matcher` is one)."""

    @property
    def done(self) -> bool:
        """Whether nothing can follow."""

    def mask(self, budget: int, /) -> Any:
        """Which tokens may come next, of `budget` at most."""

    def accept(self, token: int, /) -> None:
        """It came."""


class Status(enum.Enum):
    """waiting -> running -> finished; running -> waiting when preempted."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """A request on its way through the engine.

    Invariants while it is not finished and no step with it runs: num_remaining > 0, so there is always a token to
    compute; the blocks of block_table hold the keys and values of tokens[:num_computed] and nothing of other content.
    """

    def __init__(
        self,
        request: Request,
        *,
        seed: int,
        eos_token_ids: frozenset[int],
        max_model_len: int,
        arrival: float,
        detokenizer: Detokenizer | None = None,
    ) -> None:
        """detokenizer: needed when the request has stop texts; it finds them. arrival: seconds, the engine's clock."""
        self.request = request
        self.params = request.params
        self.seed = seed
        self.tokens = list(request.prompt)
        self.pending = 0
        self.num_prompt = len(request.prompt)
        self.output_counts: Counter[int] = Counter()
        self.prompt_ids = frozenset(request.prompt) if self.params.repetition_penalty != 1 else frozenset()
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.error: PronkError | None = None
        self.num_computed = 0
        self.block_table: list[int] = []
        self.block_keys: list[bytes] = []
        self.rank = (0, 0)  # its place among those that wait: the scheduler's
        self.slot: int | None = None  # while it runs, a small number that no other running sequence has
        self.num_scored = 0  # tokens of the prompt whose log probabilities were told
        self.num_cached = 0
        self.steps = 0
        self.preemptions = 0
        self.computed_tokens = 0
        self.arrival = arrival
        self.first_scheduled: float | None = None
        self.first_token: float | None = None
        room = max_model_len - self.num_prompt
        self.max_tokens = room if self.params.max_tokens is None else min(room, self.params.max_tokens)
        self.eos_token_ids = frozenset() if self.params.ignore_eos else eos_token_ids
        self.stop_token_ids = frozenset(self.params.stop_token_ids)
        self.matcher: Matcher | None = None  # when the request has a grammar, before it is first scheduled
        self._detokenizer = detokenizer

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        """Those that are pending included."""
        return len(self.tokens) + self.pending

    @property
    def num_output(self) -> int:
        """Of the completion, those that are pending included."""
        return self.num_tokens - self.num_prompt

    @property
    def num_remaining(self) -> int:
        """Tokens to compute: all that are known or pending, but not the completion's last, which nothing follows."""
        is_full = 0 < self.max_tokens <= self.num_output
        return self.num_tokens - self.num_computed - is_full

    def unscored(self, start: int, end: int) -> range:
        """Those of the positions [start, end) whose next token is the prompt's, and its log probability wanted and not
        told yet."""
        if self.params.prompt_logprobs is None:
            return range(0)
        return range(max(start, self.num_scored), min(end, self.num_prompt - 1))

    @property
    def needs_history(self) -> bool:
        """Whether the next token depends on those before it in other ways than through the model."""
        params = self.params
        penalties = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
        return bool(penalties or params.bad_words or params.grammar)

    def advance(self, num_tokens: int, *, samples: bool) -> None:
        """A step that computes so many of its tokens, and perhaps samples the next, is on its way."""
        self.num_computed += num_tokens
        self.num_scored = max(self.num_scored, min(self.num_computed, self.num_prompt - 1))
        self.pending += samples
        self.steps += 1
        self.computed_tokens += num_tokens

    def ending_ids(self, position: int) -> frozenset[int]:
        """Tokens that may not be sampled at this position: those that end the completion before it holds min_tokens.
        A grammar says by itself when it may end, and may leave nothing else."""
        if self.matcher is not None or position - self.num_prompt >= self.params.min_tokens:
            return frozenset()
        return self.eos_token_ids | self.stop_token_ids

    def append(self, token: int) -> None:
        """The pending token is known: decide whether the completion ends with it."""
        if self.status is Status.FINISHED:
            raise PronkError(f"request {self.request_id} has ended and takes no token")
        self.tokens.append(token)
        self.pending -= 1
        self.output_counts[token] += 1
        if self._detokenizer is not None:
            self._detokenizer.feed([token])
        if self.matcher is not None and self.matcher.done:
            self.finish("stop")
        elif len(self.tokens) - self.num_prompt >= self.params.min_tokens:
            if token in self.eos_token_ids:
                self.finish("stop")
                return
            if token in self.stop_token_ids:
                self.finish("stop", token)
                return
            if self._detokenizer is not None and self._detokenizer.stopped is not None:
                self.finish("stop", self._detokenizer.stopped)
                return
        if len(self.tokens) - self.num_prompt >= self.max_tokens:
            self.finish("length")

    def fail(self, error: PronkError) -> None:
        """End it by an error of its own; one that has ended stays as it is."""
        if self.status is not Status.FINISHED:
            self.error = error
            self.finish("error")

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """End it; the first reason stays."""
        if self.status is not Status.FINISHED:
            self.status = Status.FINISHED
            self.finish_reason = reason
            self.stop_reason = stop_reason
