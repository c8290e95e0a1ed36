"""EngineCore: the loop. schedule, launch, collect, commit.

Knows requests by their tokens; not who sent them, nor over what. Two callers: `process` (the server's engine) and
`llm` (offline), so both give the same answers.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable

from pronk.engine.cache.manager import CacheManager
from pronk.engine.config import EngineConfig
from pronk.engine.detokenizer import Detokenizer
from pronk.engine.request import Output, Request, Timing
from pronk.engine.runner import ModelRunner
from pronk.engine.sampling.sampler import Sampled
from pronk.engine.scheduler import Row, Scheduler
from pronk.engine.sequence import Sequence, Status
from pronk.engine.tokenizer import Vocabulary
from pronk.engine.wire import EngineStats


class EngineCore:
    """Requests in, outputs out, one step at a time."""

    def __init__(
        self,
        config: EngineConfig,
        runner: ModelRunner,
        vocabulary: Vocabulary,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """vocabulary: to look for stop texts in what is generated."""
        self._config = config
        self._runner = runner
        self._vocabulary = vocabulary
        self._clock = clock
        self._cache = CacheManager(
            runner.plan.num_blocks, runner.block_size, enable_prefix_caching=config.cache.enable_prefix_caching
        )
        self._scheduler = Scheduler(
            self._cache,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=runner.max_num_batched_tokens,
        )
        self._sequences: dict[str, Sequence] = {}
        self._ended: list[Output] = []
        self._counters = _Counters()

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to say."""
        return self._scheduler.has_work or bool(self._ended)

    def add(self, request: Request) -> None:
        """Queue a request that was checked (client.check_request)."""
        params = request.params
        seeds = (params.seed, self._config.seed, secrets.randbits(63))
        detokenizer = (
            Detokenizer(
                self._vocabulary,
                stop=params.stop,
                skip_special_tokens=params.skip_special_tokens,
                min_tokens=params.min_tokens,
            )
            if params.stop
            else None
        )
        sequence = Sequence(
            request,
            seed=next(seed for seed in seeds if seed is not None),
            eos_token_ids=frozenset(self._runner.model.config.eos_token_ids),
            max_model_len=self._runner.plan.max_model_len,
            arrival=self._clock(),
            detokenizer=detokenizer,
        )
        self._scheduler.add(sequence)
        self._sequences[request.request_id] = sequence

    def abort(self, request_ids: Iterable[str]) -> None:
        """End these requests; the next step says so. Those that are unknown or have ended are no error."""
        for request_id in request_ids:
            sequence = self._sequences.pop(request_id, None)
            if sequence is not None:
                sequence.finish("abort")
                self._scheduler.remove(sequence)
                self._ended.append(self._output(sequence, None))

    def step(self) -> list[Output]:
        """Run one step. -> what it added to each request, and how requests ended since the last."""
        outputs, self._ended = self._ended, []
        rows = self._scheduler.schedule()
        if not rows:
            return outputs
        started = self._clock()
        self._count_scheduled(rows, started)
        launched = self._runner.launch(rows)
        sampled = self._runner.collect(launched)
        return outputs + self._commit(rows, sampled, started)

    def _commit(self, rows: list[Row], sampled: dict[str, Sampled], started: float) -> list[Output]:
        now = self._clock()
        for request_id, result in sampled.items():
            sequence = self._sequences[request_id]
            if result.token is None:
                self._counters.nonfinite_logits += 1
                sequence.finish("error")
            elif sequence.first_token is None:
                sequence.first_token = now
        tokens = {request_id: result.token for request_id, result in sampled.items() if result.token is not None}
        self._scheduler.commit(rows, tokens)
        self._counters.generated_tokens += len(tokens)
        self._counters.step_seconds = now - started
        outputs = [self._output(self._sequences[request_id], result) for request_id, result in sampled.items()]
        for output in outputs:
            if output.finish_reason is not None:
                del self._sequences[output.request_id]
        return outputs

    def _output(self, sequence: Sequence, result: Sampled | None) -> Output:
        """result: what was sampled in this step, or None when the sequence ends without it."""
        token = result.token if result is not None else None
        logprobs = result.logprobs if result is not None else None
        ended = sequence.status is Status.FINISHED
        failed = sequence.finish_reason == "error"
        return Output(
            request_id=sequence.request_id,
            token_ids=[] if token is None else [token],
            logprobs=None if logprobs is None else [logprobs],
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            error="the model produced numbers that are not finite for this request" if failed else None,
            num_cached_tokens=sequence.num_cached,
            timing=self._timing(sequence) if ended else None,
        )

    def _timing(self, sequence: Sequence) -> Timing:
        """A stage that was never reached takes no time, and the one before it lasts until now."""
        now = self._clock()
        scheduled = sequence.first_scheduled if sequence.first_scheduled is not None else now
        first_token = sequence.first_token if sequence.first_token is not None else now
        return Timing(scheduled - sequence.arrival, first_token - scheduled, now - first_token)

    def _count_scheduled(self, rows: list[Row], now: float) -> None:
        counters = self._counters
        counters.steps += 1
        counters.step_tokens = sum(row.num_tokens for row in rows)
        counters.step_sequences = len(rows)
        for row in rows:
            sequence = row.sequence
            counters.prompt_tokens_computed += max(0, min(row.num_tokens, sequence.num_prompt - row.start))
            if sequence.first_scheduled is None:
                sequence.first_scheduled = now
                counters.prompt_tokens_cached += sequence.num_cached
                counters.prefix_query_tokens += sequence.num_prompt
                counters.prefix_hit_tokens += sequence.num_cached

    @property
    def stats(self) -> EngineStats:
        """As of the last step."""
        counters, pool = self._counters, self._cache.pool
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            blocks_used=pool.num_used,
            blocks_cached=pool.num_kept,
            blocks_total=pool.num_blocks,
            steps=counters.steps,
            preemptions=self._scheduler.num_preemptions,
            prompt_tokens_computed=counters.prompt_tokens_computed,
            prompt_tokens_cached=counters.prompt_tokens_cached,
            generated_tokens=counters.generated_tokens,
            prefix_query_tokens=counters.prefix_query_tokens,
            prefix_hit_tokens=counters.prefix_hit_tokens,
            prefix_evicted_blocks=self._cache.evicted_blocks,
            nonfinite_logits=counters.nonfinite_logits,
            step_seconds=counters.step_seconds,
            step_tokens=counters.step_tokens,
            step_sequences=counters.step_sequences,
        )


class _Counters:
    """What only grows, and the last step's figures."""

    def __init__(self) -> None:
        self.steps = 0
        self.prompt_tokens_computed = 0
        self.prompt_tokens_cached = 0
        self.generated_tokens = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self.nonfinite_logits = 0
        self.step_seconds = 0.0
        self.step_tokens = 0
        self.step_sequences = 0
