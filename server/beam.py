"""BeamSearch: the likeliest answers to a prompt instead of sampled ones, on an engine that makes one token at a time.

Has Generation's face. In each step every beam asks the engine for the likeliest next tokens: twice as many as there are
beams, so that there are enough even if half of them end (Wiseman and Rush 2016, section 3; GNMT, Wu et al. 2016, for
the score). The prefix cache makes each question cost a few tokens.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from pronk.engine.client import check_request
from pronk.engine.request import Output, Request, SamplingParams, Timing, TokenLogprobs
from pronk.server.errors import RequestFailedError
from pronk.server.generation import Answer, Assembler, Delta, failure, recorded
from pronk.server.record import RequestRecord
from pronk.server.service import ServedModel

T = TypeVar("T")


@dataclass(frozen=True)
class Beam:
    """The beginning of an answer, or a whole one."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of each token, with those of the likeliest others."""
    total: float = 0.0
    """The log probability of all tokens together."""
    ended: bool = False
    """By a token that ends answers; it is the last of `tokens`."""

    def score(self, length_penalty: float, length: int | None = None) -> float:
        """length: as if it had so many tokens, all that are to come being certain."""
        return self.total / math.pow(max(1, length or len(self.tokens)), length_penalty)


class BeamSearch:
    """The `width` best answers to each prompt. To be run once."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        width: int,
        length_penalty: float,
        request_id: str,
        model: ServedModel,
        record: RequestRecord,
        cache_salt: str = "",
        priority: int = 0,
    ) -> None:
        """params: which tokens end an answer, how long it may be, how its text and log probabilities are told.

        width: at most half of request.MAX_LOGPROBS.
        """
        self.request_id = request_id
        self.record = record
        self.num_completions = width * len(prompts)
        self._prompts = prompts
        self._params = params
        self._width = width
        self._length_penalty = length_penalty
        self._model = model
        self._cache_salt = cache_salt
        self._priority = priority
        self._asked = 0
        self._spent = [Timing(0, 0, 0) for _ in prompts]
        record.prompt_tokens = sum(map(len, prompts))
        ends = frozenset() if params.ignore_eos else model.eos_token_ids
        self._ending_ids = ends | frozenset(params.stop_token_ids)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """One for each answer, when all are known. Raises as Generation.deltas does."""
        with recorded(self.record):
            for prompt in self._prompts:
                check_request(self._request("", list(prompt), self._params.max_tokens), self._model.engine.info)
            found = await all_of([self._search(prompt, place) for place, prompt in enumerate(self._prompts)])
            self.record.timing = self._timing()
            beams = [beam for best in found for beam in best]
            for beam in beams:
                self.record.count(len(beam.tokens))
            self.record.outcome = "stop" if all(beam.ended for beam in beams) else "length"
            for index, beam in enumerate(beams):
                yield self._delta(index, beam)

    async def collect(self) -> list[Answer]:
        """-> the answers to the first prompt, the best first, then those to the second."""
        answers = [Answer() for _ in range(self.num_completions)]
        async with aclosing(self.deltas()) as parts:
            async for delta in parts:
                answers[delta.index].add(delta)
        return answers

    async def _search(self, prompt: Sequence[int], place: int) -> list[Beam]:
        room = self._model.engine.info.max_model_len - len(prompt)
        limit = room if self._params.max_tokens is None else self._params.max_tokens
        running, done = [Beam()], list[Beam]()
        for _ in range(limit):
            asked = await all_of([self._next(prompt, beam) for beam in running])
            self._count(place, [timing for _, timing in asked])
            grown = sorted((beam for beams, _ in asked for beam in beams), key=lambda beam: -beam.total)
            done += [beam for beam in grown[: 2 * self._width] if beam.ended]
            done = sorted(done, key=lambda beam: -beam.score(self._length_penalty))[: self._width]
            running = [beam for beam in grown if not beam.ended][: self._width]
            if not running or self._is_decided(running, done):
                break
        ranked = sorted([*done, *running], key=lambda beam: -beam.score(self._length_penalty))
        # Where a short limit or a small vocabulary leaves fewer, the last ones stand for the rest.
        return [*ranked, *ranked[-1:] * self._width][: self._width]

    def _is_decided(self, running: Sequence[Beam], done: Sequence[Beam]) -> bool:
        """Whether nothing that still runs can come to be among the best, however it goes on.

        With a length penalty above 0, what runs can always win by growing, every further token being certain, up to
        max_tokens. Where the request has no max_tokens, it is taken as long as it is.
        """
        if len(done) < self._width:
            return False
        penalty = self._length_penalty
        longest = self._params.max_tokens if penalty > 0 else None
        return all(beam.score(penalty, longest) <= done[-1].score(penalty) for beam in running)

    def _count(self, place: int, timings: Sequence[Timing]) -> None:
        """One step of the search is over. It took as long as the slowest of its questions."""
        spent = self._spent[place]
        slowest = max(timings, key=lambda timing: timing.queue + timing.prefill + timing.decode)
        self._spent[place] = Timing(
            spent.queue + slowest.queue,
            spent.prefill + slowest.prefill,
            spent.decode + slowest.decode,
            spent.steps + sum(timing.steps for timing in timings),
            spent.preemptions + sum(timing.preemptions for timing in timings),
            spent.computed_tokens + sum(timing.computed_tokens for timing in timings),
        )

    def _timing(self) -> Timing:
        """Times are those of the prompt that took longest, counts those of all."""
        spent = self._spent
        longest = max(spent, key=lambda timing: timing.queue + timing.prefill + timing.decode)
        return Timing(
            longest.queue,
            longest.prefill,
            longest.decode,
            sum(timing.steps for timing in spent),
            sum(timing.preemptions for timing in spent),
            sum(timing.computed_tokens for timing in spent),
        )

    async def _next(self, prompt: Sequence[int], beam: Beam) -> tuple[list[Beam], Timing]:
        """-> the beam with each of its likeliest next tokens."""
        scored, timing = await self._ask([*prompt, *beam.tokens], first=not beam.tokens)
        grown = [
            Beam(
                (*beam.tokens, token),
                (*beam.logprobs, TokenLogprobs(logprob, scored.top_ids, scored.top_logprobs)),
                beam.total + logprob,
                token in self._ending_ids,
            )
            for token, logprob in zip(scored.top_ids, scored.top_logprobs, strict=True)
        ]
        return grown, timing

    async def _ask(self, tokens: list[int], *, first: bool) -> tuple[TokenLogprobs, Timing]:
        """-> the likeliest next tokens, and what that took. first: nobody has asked about this prompt before."""
        self._asked += 1
        request = self._request(f"{self.request_id}-{self._asked}", tokens, 1)
        outputs = self._model.engine.generate(request)
        try:
            async for output in outputs:
                if first and output.finish_reason is not None:
                    self.record.cached_tokens += output.num_cached_tokens
                if output.finish_reason in ("error", "abort"):
                    raise failure(output)
                if output.logprobs:
                    return output.logprobs[0], output.timing or Timing(0, 0, 0)
        finally:
            if isinstance(outputs, AsyncGenerator):
                await outputs.aclose()
        raise RequestFailedError("The engine ended the request without a token.")

    def _request(self, request_id: str, tokens: list[int], max_tokens: int | None) -> Request:
        return Request(
            request_id=request_id,
            prompt=tokens,
            params=SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=2 * self._width, ignore_eos=True),
            cache_salt=self._cache_salt,
            priority=self._priority,
        )

    def _delta(self, index: int, beam: Beam) -> Delta:
        assembler = Assembler(self._model.vocabulary, self._params, self._model.eos_token_ids, index=index)
        wanted = self._params.logprobs
        logprobs = [
            TokenLogprobs(scored.logprob, scored.top_ids[:wanted], scored.top_logprobs[:wanted])
            for scored in beam.logprobs
        ]
        output = Output(
            request_id=self.request_id,
            token_ids=list(beam.tokens),
            logprobs=None if wanted is None else logprobs,
            finish_reason="stop" if beam.ended else "length",
        )
        return assembler.feed(output) or Delta(index, [])


async def all_of(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """-> their results. When one of them fails, or this is cancelled, all others have ended before it raises."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
