"""One generation's state: its tokens, how many of them are computed, which blocks hold them, and how it ends.

Knows no tensor and no other sequence. `num_computed` catches up with `num_tokens`; the scheduler says by how much.
"""

from __future__ import annotations

import enum
from collections import Counter

from pronk.engine.detokenizer import Detokenizer
from pronk.engine.errors import PronkError
from pronk.engine.request import FinishReason, Request


class Status(enum.Enum):
    """waiting -> running -> finished; running -> waiting when preempted."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """A request on its way through the engine.

    Invariants: num_computed < num_tokens while it is not finished, so there is always a token to compute; the blocks
    of block_table hold the keys and values of tokens[:num_computed] and nothing of other content.
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
        self.num_prompt = len(request.prompt)
        self.output_counts: Counter[int] = Counter()
        self.prompt_ids = frozenset(request.prompt) if self.params.repetition_penalty != 1 else frozenset()
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.num_computed = 0
        self.block_table: list[int] = []
        self.block_keys: list[bytes] = []
        self.num_cached = 0
        self.preemptions = 0
        self.arrival = arrival
        self.first_scheduled: float | None = None
        self.first_token: float | None = None
        room = max_model_len - self.num_prompt
        self.max_tokens = room if self.params.max_tokens is None else min(room, self.params.max_tokens)
        self.eos_token_ids = frozenset() if self.params.ignore_eos else eos_token_ids
        self.stop_token_ids = frozenset(self.params.stop_token_ids)
        self._detokenizer = detokenizer

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_remaining(self) -> int:
        """Tokens that are known but not computed."""
        return len(self.tokens) - self.num_computed

    @property
    def forbidden_ids(self) -> frozenset[int]:
        """Tokens that may not be sampled next: those that end the completion before it holds min_tokens."""
        if self.num_output >= self.params.min_tokens:
            return frozenset()
        return self.eos_token_ids | self.stop_token_ids

    def append(self, token: int) -> None:
        """Add a sampled token and decide whether the completion ends with it."""
        if self.status is Status.FINISHED:
            raise PronkError(f"request {self.request_id} has ended and takes no token")
        self.tokens.append(token)
        self.output_counts[token] += 1
        if self._detokenizer is not None:
            self._detokenizer.feed([token])
        if self.num_output >= self.params.min_tokens:
            if token in self.eos_token_ids:
                self.finish("stop")
                return
            if token in self.stop_token_ids:
                self.finish("stop", token)
                return
            if self._detokenizer is not None and self._detokenizer.stopped is not None:
                self.finish("stop", self._detokenizer.stopped)
                return
        if self.num_output >= self.max_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """End it; the first reason stays."""
        if self.status is not Status.FINISHED:
            self.status = Status.FINISHED
            self.finish_reason = reason
            self.stop_reason = stop_reason
