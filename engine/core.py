"""EngineCore: the loop. schedule, launch, collect, commit.

Where the device works beside the host, a step is planned and launched while the one before it runs: the tokens that
the device has just sampled feed the next step there, and the host reads them one step late. A step computed for a
sequence that turns out to have ended is thrown away. Without that (`runner.overlaps`) each step is collected at once.

Knows requests by their tokens; not who sent them, nor over what. Two callers: `process` (the server's engine) and
`llm` (offline), so both give the same answers.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pronk.engine.cache.manager import CacheManager
from pronk.engine.config import EngineConfig
from pronk.engine.detokenizer import Detokenizer
from pronk.engine.errors import InvalidParameterError, NonFiniteLogitsError, PronkError
from pronk.engine.grammar import GrammarCompiler, Mask, Matcher
from pronk.engine.request import Output, Request, Timing, TokenLogprobs
from pronk.engine.runner import Launched, ModelRunner
from pronk.engine.sampling.sampler import Sampled
from pronk.engine.scheduler import Row, Scheduler
from pronk.engine.sequence import Sequence, Status
from pronk.engine.tokenizer import Vocabulary
from pronk.engine.wire import EngineStats

COMPILE_WAIT_SECONDS = 0.02
"""How long a step with nothing else to do waits for a grammar."""


@dataclass(frozen=True)
class Step:
    """A step that was launched and not collected."""

    rows: list[Row]
    launched: Launched
    started: float
    """Seconds of the engine's clock."""


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
            max_num_prompt_tokens=runner.max_num_prompt_tokens,
        )
        self._grammars = GrammarCompiler(
            vocabulary, runner.model.config.eos_token_ids, vocab_size=runner.model.config.vocab_size
        )
        self._compilers = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._compiling: dict[Sequence, concurrent.futures.Future[Matcher]] = {}
        self._doomed: dict[Sequence, PronkError] = {}
        self._sequences: dict[str, Sequence] = {}
        self._ended: list[Output] = []
        self._running: Step | None = None
        self._counters = _Counters()
        self._collectives = runner.model.tp.counts
        self._collectives_before = dataclasses.replace(self._collectives)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to say."""
        return self._scheduler.has_work or self._running is not None or bool(self._ended or self._compiling)

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
        self._sequences[request.request_id] = sequence
        if params.grammar is None:
            self._scheduler.add(sequence)
        else:
            self._compiling[sequence] = self._compilers.submit(self._grammars.compile, params.grammar)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End these requests; the next step says so. Those that are unknown or have ended are no error."""
        for request_id in request_ids:
            sequence = self._sequences.pop(request_id, None)
            if sequence is not None:
                sequence.finish("abort")
                self._compiling.pop(sequence, None)
                self._scheduler.remove(sequence)
                self._ended.append(self._output(sequence))

    def num_cached(self, prompt: list[int], cache_salt: str) -> int:
        """How many tokens of a prompt are in the prefix cache now, for a request with this salt. Changes nothing."""
        return self._cache.num_cached(prompt, cache_salt)

    def step(self) -> list[Output]:
        """Run one step. -> what was added to each request, and how requests ended, since the last."""
        self._add_compiled()
        outputs, self._ended = self._ended, []
        previous, self._running = self._running, None
        rows = self._scheduler.schedule()
        if rows:
            started = self._clock()
            self._count_scheduled(rows, started)
            forward = self._runner.forward(rows)
            # What is sampled may depend on the tokens before it: the device computes while the host reads them.
            if previous is not None and any(row.samples and row.sequence.needs_history for row in rows):
                outputs += self._finish(previous)
                previous = None
            self._running = Step(rows, self._runner.launch(forward, self._masks(rows)), started)
        if previous is not None:
            outputs += self._finish(previous)
        if self._running is not None and not self._runner.overlaps:
            outputs += self._finish(self._running)
            self._running = None
        return outputs

    def _add_compiled(self) -> None:
        """Queue the sequences whose grammars are ready, in the order in which they came."""
        if self._compiling and not (self._scheduler.has_work or self._running or self._ended):
            concurrent.futures.wait(self._compiling.values(), COMPILE_WAIT_SECONDS, concurrent.futures.FIRST_COMPLETED)
        for sequence, future in list(self._compiling.items()):
            if future.done():
                del self._compiling[sequence]
                error = future.exception()
                if error is None:
                    sequence.matcher = future.result()
                    self._scheduler.add(sequence)
                elif isinstance(error, PronkError):
                    sequence.fail(error)
                    del self._sequences[sequence.request_id]
                    self._ended.append(self._output(sequence))
                else:
                    raise error

    def _masks(self, rows: list[Row]) -> dict[Sequence, Mask]:
        """What may come next in those rows that sample by a grammar; worked out while the device computes."""
        masks: dict[Sequence, Mask] = {}
        for row in rows:
            sequence = row.sequence
            if row.samples and sequence.matcher is not None and sequence.status is not Status.FINISHED:
                try:
                    masks[sequence] = sequence.matcher.mask(sequence.max_tokens - (row.end - sequence.num_prompt))
                except InvalidParameterError as error:
                    self._doomed[sequence] = error
        return masks

    def prepare(self) -> bool:
        """While there is nothing to do: make ready what makes later steps faster. -> whether there may be more."""
        return self._runner.prepare()

    def keep_weights(self) -> bool:
        """See `ModelRunner.keep_weights`."""
        return self._runner.keep_weights()

    def _finish(self, step: Step) -> list[Output]:
        """Collect and commit."""
        collected = self._runner.collect(step.launched)
        now = self._clock()
        # A sequence that ended while the step ran has had its last word.
        alive = [row for row in step.rows if row.sequence.status is not Status.FINISHED]
        sampling = (row.sequence for row in step.rows if row.samples)
        sampled = dict(zip(sampling, collected.sampled, strict=True))
        for row in alive:
            self._judge(row.sequence, sampled.get(row.sequence), collected.prompt_logprobs.get(row.sequence, ()), now)
        self._scheduler.commit(step.rows, [result.token for result in collected.sampled])
        self._counters.step_seconds = now - step.started
        outputs = []
        for row in alive:
            sequence = row.sequence
            result, scored = sampled.get(sequence), collected.prompt_logprobs.get(sequence)
            if result is not None or scored or sequence.status is Status.FINISHED:
                outputs.append(self._output(sequence, result, scored))
            if sequence.status is Status.FINISHED:
                del self._sequences[sequence.request_id]
        return outputs

    def _judge(self, sequence: Sequence, result: Sampled | None, scored: Iterable[TokenLogprobs], now: float) -> None:
        """End what cannot go on; note who has a first token."""
        doom = self._doomed.pop(sequence, None)
        failed = result is not None and result.token is None
        if doom is not None:
            sequence.fail(doom)
        elif result is not None and result.none_allowed:
            sequence.fail(InvalidParameterError("no token is left to sample: the request forbids them all"))
        elif failed or any(entry.logprob != entry.logprob for entry in scored):  # NaN
            self._counters.nonfinite_logits += 1
            sequence.fail(NonFiniteLogitsError("the model produced numbers that are not finite for this request"))
        elif result is not None:
            self._counters.generated_tokens += 1
            if sequence.first_token is None:
                sequence.first_token = now
            if sequence.matcher is not None and result.token is not None:
                try:
                    sequence.matcher.accept(result.token)
                except InvalidParameterError as error:
                    sequence.fail(error)

    def _output(
        self, sequence: Sequence, result: Sampled | None = None, scored: list[TokenLogprobs] | None = None
    ) -> Output:
        """result: what was sampled in this step, or None when the sequence ends without it; scored: of its prompt."""
        ended = sequence.status is Status.FINISHED
        error: PronkError | None = sequence.error
        token = result.token if result is not None and error is None else None
        logprobs = result.logprobs if result is not None and token is not None else None
        return Output(
            request_id=sequence.request_id,
            token_ids=[] if token is None else [token],
            logprobs=None if logprobs is None else [logprobs],
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            error=None if error is None else str(error),
            error_kind=None if error is None else type(error).__name__,
            num_cached_tokens=sequence.num_cached,
            timing=self._timing(sequence) if ended else None,
            prompt_logprobs=scored if error is None else None,
        )

    def _timing(self, sequence: Sequence) -> Timing:
        """A stage that was never reached takes no time, and the one before it lasts until now."""
        now = self._clock()
        scheduled = sequence.first_scheduled if sequence.first_scheduled is not None else now
        first_token = sequence.first_token if sequence.first_token is not None else now
        return Timing(
            scheduled - sequence.arrival,
            first_token - scheduled,
            now - first_token,
            sequence.steps,
            sequence.preemptions,
            sequence.computed_tokens,
        )

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
        collectives, before = self._collectives, self._collectives_before
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
            all_reduces=collectives.all_reduces - before.all_reduces,
            all_gathers=collectives.all_gathers - before.all_gathers,
            collective_seconds=collectives.seconds - before.seconds,
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
