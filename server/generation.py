"""Generation: one request's prompts and parameters -> its completions, as one stream of deltas.

Chat completions, completions and responses all ask the engine through this: what a stream says and what a whole answer
says cannot differ, because `sse` sends the same deltas that `collect` folds. Knows the engine by its face, tokens as
bytes of the vocabulary, and tools as ToolCalls; knows no HTTP, no route and no body's shape.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import msgspec

from pronk.engine import errors
from pronk.engine.detokenizer import Detokenizer
from pronk.engine.errors import EngineDrainingError, PronkError, RequestError
from pronk.engine.request import Grammar, Output, Request, SamplingParams, Timing, TokenLogprobs
from pronk.engine.tokenizer import Vocabulary
from pronk.server.chat.tool_parser import Call, CallDelta, Part
from pronk.server.chat.tools import ToolCalls
from pronk.server.errors import RequestFailedError
from pronk.server.record import RequestRecord
from pronk.server.service import ServedModel

END_OF_MESSAGE = "<|eom_id|>"


class Scored(NamedTuple):
    """A token of an answer with its log probabilities."""

    token: int
    logprobs: TokenLogprobs


class Delta(msgspec.Struct, frozen=True):
    """What is added to one completion. The last one of a completion has a finish_reason, and may have text too."""

    index: int
    """Of the completion, from 0."""
    parts: list[Part]
    """Content and tool calls in the order in which the model wrote them; no two neighbours are both content."""
    logprobs: list[Scored] = []
    """When asked for: of the tokens that the text completes."""
    finish_reason: str | None = None
    """OpenAI's: stop, length, tool_calls or function_call."""
    token_ids: list[int] = []
    """All tokens since the last delta, the one that ended the completion too: as many as the usage counts."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """When asked for, in the completion's first delta, which comes before those of other completions of the same
    prompt: of all tokens of the prompt but the first."""

    @property
    def text(self) -> str:
        """The content alone."""
        parts = self.parts
        if len(parts) == 1 and isinstance(parts[0], str):
            return parts[0]
        return "".join([part for part in parts if isinstance(part, str)])

    @property
    def calls(self) -> list[CallDelta]:
        """The tool calls alone."""
        return [part for part in self.parts if not isinstance(part, str)]


class Joint:
    """Deltas of one completion that become one. To add to it costs what the addition is long, however much there is."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._parts: list[Part] = []
        self._logprobs: list[Scored] = []
        self._finish_reason: str | None = None
        self._token_ids: list[int] = []
        self._prompt_logprobs: list[TokenLogprobs] | None = None

    def add(self, delta: Delta) -> None:
        self._parts += delta.parts
        self._logprobs += delta.logprobs
        self._finish_reason = delta.finish_reason
        self._token_ids += delta.token_ids
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = delta.prompt_logprobs

    def delta(self) -> Delta:
        """-> one that says the same."""
        parts: list[Part] = []
        text: list[str] = []
        for part in self._parts:
            if isinstance(part, str):
                text.append(part)
                continue
            if text:
                parts.append("".join(text))
                text = []
            parts.append(part)
        if text:
            parts.append("".join(text))
        return Delta(self._index, parts, self._logprobs, self._finish_reason, self._token_ids, self._prompt_logprobs)


@dataclass
class Answer:
    """A whole completion: its deltas, folded."""

    parts: list[str | Call] = field(default_factory=list)
    """Content and calls in the order in which the model wrote them."""
    logprobs: list[Scored] = field(default_factory=list)
    finish_reason: str = ""
    token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    _calls: list[int] = field(default_factory=list, repr=False)
    """Where in `parts` each call stands."""

    @property
    def text(self) -> str:
        """The content alone."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def calls(self) -> list[Call]:
        """The tool calls alone."""
        return [part for part in self.parts if isinstance(part, Call)]

    def add(self, delta: Delta) -> None:
        """Fold one more."""
        for part in delta.parts:
            self._add_part(part)
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason or ""
        self.token_ids += delta.token_ids
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs

    def _add_part(self, part: Part) -> None:
        last = self.parts[-1] if self.parts else None
        if isinstance(part, str):
            if isinstance(last, str):
                self.parts[-1] = last + part
            else:
                self.parts.append(part)
        elif part.id is not None and part.name is not None:
            self._calls.append(len(self.parts))
            self.parts.append(Call(part.id, part.name, part.arguments))
        else:
            place = self._calls[part.index]
            call = self.parts[place]
            if isinstance(call, Call):
                self.parts[place] = Call(call.id, call.name, call.arguments + part.arguments)


class Assembler:
    """One completion's outputs -> deltas: text, tool calls, and each token's logprobs with the text that it completes.

    Every token's logprobs are in exactly one delta, in order, one entry for each token the usage counts.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        params: SamplingParams,
        eos_token_ids: frozenset[int],
        *,
        index: int = 0,
        tools: ToolCalls | None = None,
        form: Grammar | None = None,
    ) -> None:
        """tools: what the answer may call; form: what it must be when it calls nothing."""
        self._vocabulary = vocabulary
        self._skip_special_tokens = params.skip_special_tokens
        self._ending_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
        self._show_ending = params.include_stop_str_in_output
        self._detokenizer = Detokenizer(
            vocabulary,
            stop=params.stop,
            include_stop_str_in_output=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
        )
        self._index = index
        self._tools = tools
        self._parser = None if tools is None else tools.parser(form)
        self._waiting: deque[tuple[int, Scored]] = deque()
        self._fed_bytes = 0
        self._shown_bytes = 0
        self._token_ids: list[int] = []
        self._prompt_logprobs: list[TokenLogprobs] | None = None

    def feed(self, output: Output) -> Delta | None:
        """-> what this output adds; None: nothing that could be told yet."""
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = (self._prompt_logprobs or []) + output.prompt_logprobs
        if self._has_only_tokens(output):
            return self._plain(output.token_ids)
        for token, logprobs in zip(output.token_ids, output.logprobs or (), strict=False):
            self._fed_bytes += self._visible_bytes(token)
            self._waiting.append((self._fed_bytes, Scored(token, logprobs)))
        self._token_ids += output.token_ids
        text = self._detokenizer.feed(self._shown_ids(output))
        finished = output.finish_reason is not None
        if finished:
            text += self._detokenizer.finish()
        logprobs_due = self._due(text, finished)
        parts = self._parts(text, finished)
        # The prompt's scores are told before anything is of a completion that waited for them.
        scores_due = self._prompt_logprobs is not None and bool(output.token_ids)
        if not (parts or logprobs_due or finished or scores_due):
            return None
        ids, self._token_ids = self._token_ids, []
        scored, self._prompt_logprobs = self._prompt_logprobs, None
        return Delta(self._index, parts, logprobs_due, self._reason(output.finish_reason), ids, scored)

    def _has_only_tokens(self, output: Output) -> bool:
        return (
            output.finish_reason is None
            and output.logprobs is None
            and self._parser is None
            and self._prompt_logprobs is None
            and not self._waiting
        )

    def _plain(self, token_ids: list[int]) -> Delta | None:
        """Most outputs are tokens and nothing else: what the long way gives, in half the time."""
        self._token_ids += token_ids
        text = self._detokenizer.feed(token_ids)
        if not text:
            return None
        ids, self._token_ids = self._token_ids, []
        return Delta(self._index, [text], token_ids=ids)

    def _shown_ids(self, output: Output) -> list[int]:
        """A token that ended the completion by its id is no part of the text."""
        ids = output.token_ids
        ended_by_token = output.finish_reason == "stop" and not isinstance(output.stop_reason, str)
        if ended_by_token and not self._show_ending and ids and ids[-1] in self._ending_ids:
            return ids[:-1]
        return ids

    def _parts(self, text: str, finished: bool) -> list[Part]:
        if self._parser is None:
            return [text] if text else []
        parts = self._parser.feed(text)
        return parts + self._parser.finish() if finished else parts

    def _reason(self, reason: str | None) -> str | None:
        return reason if self._tools is None else self._tools.finish_reason(reason, self._parser)

    def _visible_bytes(self, token: int) -> int:
        if self._skip_special_tokens and self._vocabulary.is_special(token):
            return 0
        return len(self._vocabulary.token_bytes(token))

    def _due(self, text: str, finished: bool) -> list[Scored]:
        if not self._waiting:
            return []
        self._shown_bytes += len(text.encode())
        due = []
        while self._waiting and (finished or (text and self._waiting[0][0] <= self._shown_bytes)):
            due.append(self._waiting.popleft()[1])
        return due


class Asking(Protocol):
    """What is sent to a client: a Generation, or another that has its face."""

    record: RequestRecord

    def deltas(self) -> AsyncGenerator[Delta, None]: ...

    async def collect(self) -> list[Answer]: ...


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the parameters of each completion of it, one or more."""

    token_ids: list[int]
    params: Sequence[SamplingParams]


@dataclass(frozen=True)
class _Completion:
    """One request to the engine. leader: the completion that computes the prompt for it; itself, if it does."""

    index: int
    request: Request
    leader: int

    @property
    def leads(self) -> bool:
        return self.leader == self.index


class Generation:
    """What one HTTP request asks of the engine. To be run once: by `deltas`, or by `collect`.

    Completions are counted from 0: those of the first prompt, then those of the second. The first completion of each
    prompt runs first; the others begin when it has its first token, so that they find the prompt in the prefix cache.
    No more are handed to the engine than it runs at a time, or the requests of others would wait behind thousands.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        request_id: str,
        model: ServedModel,
        record: RequestRecord,
        cache_salt: str = "",
        priority: int = 0,
        tools: ToolCalls | None = None,
        form: Grammar | None = None,
    ) -> None:
        """request_id: unique; the engine's requests are named after it.

        tools: what the answers may call; form: what an answer must be when it calls nothing.
        """
        self.request_id = request_id
        self.prompts = prompts
        self.record = record
        self._model = model
        self._tools = tools
        self._form = form
        record.prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._completions: list[_Completion] = []
        alone = len(prompts) == 1 and len(prompts[0].params) == 1
        for prompt in prompts:
            leader = len(self._completions)
            for params in prompt.params:
                index = len(self._completions)
                request = Request(
                    request_id=request_id if alone else f"{request_id}-{index}",
                    prompt=prompt.token_ids,
                    params=self._ending_with_calls(params),
                    cache_salt=cache_salt,
                    priority=priority,
                )
                self._completions.append(_Completion(index, request, leader))
        self._prompt_computed = [asyncio.Event() for _ in self._completions]
        self._places = asyncio.Semaphore(model.engine.info.max_num_seqs)
        self._num_running = len(self._completions)
        self._cut_off = False
        self._timings: dict[int, Timing] = {}
        self._held_back: dict[int, float] = {}
        """Seconds that a completion waited for others of the same request before the engine had it."""

    def _ending_with_calls(self, params: SamplingParams) -> SamplingParams:
        """Llama ends a message of calls with a token of its own, which not every checkpoint counts among those that end
        a turn."""
        token = self._model.vocabulary.special_tokens.get(END_OF_MESSAGE)
        calls = self._tools is not None and bool(self._tools.callable)
        if token is None or not calls or params.ignore_eos or token in self._model.eos_token_ids:
            return params
        return msgspec.structs.replace(params, stop_token_ids=(*params.stop_token_ids, token))

    @property
    def num_completions(self) -> int:
        return len(self._completions)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Deltas until each completion has had the one with a finish_reason.

        Counts tokens and the outcome in the record. Raises at the first step what AsyncEngine.generate refuses a
        request for; at any time EngineDeadError, and RequestFailedError or NonFiniteLogitsError when the engine gave
        up a completion: the others are aborted then. Closing it early aborts all.
        """
        with recorded(self.record):
            alone = len(self._completions) == 1
            parts = self._run(self._completions[0]) if alone else self._together()
            async with aclosing(parts):
                async for delta in parts:
                    yield delta

    async def collect(self) -> list[Answer]:
        """-> the completions, whole. Raises what `deltas` raises."""
        answers = [Answer() for _ in self._completions]
        async with aclosing(self.deltas()) as parts:
            async for delta in parts:
                answers[delta.index].add(delta)
        return answers

    async def _run(self, completion: _Completion) -> AsyncGenerator[Delta, None]:
        """The deltas of one."""
        assembler = Assembler(
            self._model.vocabulary,
            completion.request.params,
            self._model.eos_token_ids,
            index=completion.index,
            tools=self._tools,
            form=self._form,
        )
        outputs = self._model.engine.generate(completion.request)
        cached = 0
        try:
            async for output in outputs:
                self.record.count(len(output.token_ids))
                if completion.leads:
                    self.record.cached_tokens += max(0, output.num_cached_tokens - cached)
                    cached = max(cached, output.num_cached_tokens)
                if output.token_ids or output.finish_reason is not None:
                    self._prompt_computed[completion.index].set()
                delta = assembler.feed(output)
                if output.finish_reason is not None:
                    self._end(completion, output)
                if delta is not None:
                    yield delta
                if output.finish_reason is not None:
                    return
            raise RequestFailedError("The engine ended the request without a reason.")
        finally:
            if isinstance(outputs, AsyncGenerator):
                await outputs.aclose()

    def _end(self, completion: _Completion, output: Output) -> None:
        """It has ended. Raises what it ended with, when that is an error."""
        record = self.record
        if output.timing is not None:
            self._timings[completion.index] = output.timing
            record.timing = self._timing(completion)
        if output.finish_reason in ("abort", "error"):
            raise failure(output)
        self._cut_off = self._cut_off or output.finish_reason == "length"
        self._num_running -= 1
        if not self._num_running:
            record.outcome = "length" if self._cut_off else "stop"

    def _timing(self, last: _Completion) -> Timing:
        """Where the time went until `last` ended: what it waited for the one that computed its prompt is that one's
        queue and prefill, and so part of its own. Counts are those of all."""
        timings = self._timings
        own = timings[last.index]
        before = None if last.leads else timings.get(last.leader)
        held_back = sum(self._held_back.get(index, 0.0) for index in {last.index, last.leader})
        return Timing(
            own.queue + held_back + (before.queue if before else 0),
            own.prefill + (before.prefill if before else 0),
            own.decode,
            sum(timing.steps for timing in timings.values()),
            sum(timing.preemptions for timing in timings.values()),
            sum(timing.computed_tokens for timing in timings.values()),
        )

    async def _together(self) -> AsyncGenerator[Delta, None]:
        """The deltas of all, as they come."""
        pending = Pending(len(self._completions))
        tasks = [asyncio.create_task(self._feed(completion, pending)) for completion in self._completions]
        try:
            async for delta in pending:
                yield delta
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _feed(self, completion: _Completion, pending: Pending) -> None:
        if not completion.leads:
            await self._prompt_computed[completion.leader].wait()
        ready, must_wait = time.perf_counter(), self._places.locked()
        try:
            async with self._places, aclosing(self._run(completion)) as parts:
                if must_wait:
                    self._held_back[completion.index] = time.perf_counter() - ready
                async for delta in parts:
                    pending.put(delta)
        except Exception as error:  # noqa: BLE001  handed over whole to whoever reads
            pending.fail(error)
        else:
            pending.end()


class Pending:
    """Deltas on their way from several writers to one reader: what comes before the reader looks is joined, so that
    there is at most one delta of each completion, however slow the reader is."""

    def __init__(self, writers: int) -> None:
        self._writers = writers
        self._waiting: dict[int, Delta | Joint] = {}
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    def put(self, delta: Delta) -> None:
        earlier = self._waiting.get(delta.index)
        if earlier is None:
            self._waiting[delta.index] = delta
        elif isinstance(earlier, Joint):
            earlier.add(delta)
        else:
            self._waiting[delta.index] = joint = Joint(delta.index)
            joint.add(earlier)
            joint.add(delta)
        self._changed.set()

    def end(self) -> None:
        """One writer has put its last."""
        self._writers -= 1
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """The reader gets `error`, the first one, after what was put before it."""
        self._error = self._error or error
        self._changed.set()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        while not self._waiting:
            if self._error is not None:
                raise self._error
            if not self._writers:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        waited = self._waiting.pop(next(iter(self._waiting)))
        return waited.delta() if isinstance(waited, Joint) else waited


@contextmanager
def recorded(record: RequestRecord) -> Iterator[None]:
    """Leaves in the record how what is done in it ended."""
    record.outcome = "client_abort"  # so it is, when this is left before it says otherwise, and by no error of ours
    try:
        yield
    except (RequestError, EngineDrainingError):
        record.outcome = None
        raise
    except Exception:
        record.outcome = "error"
        raise


def failure(output: Output) -> PronkError:
    """-> what a completion that the engine gave up ended with. To be raised."""
    if output.finish_reason == "abort":
        return RequestFailedError("The request was aborted.")
    kind = getattr(errors, output.error_kind or "", None)
    if isinstance(kind, type) and issubclass(kind, PronkError):
        return kind(f"The request failed: {output.error}.")
    return RequestFailedError(f"The request failed: {output.error}.")
