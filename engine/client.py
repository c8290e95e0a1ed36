"""AsyncEngine: the engine as the server's process sees it. Has a group of processes run the model, and keeps one up.

A group that dies takes its requests with it, each of which gets an error; then another is started, and again until one
is up, unless torchrun started it: then `gone` says so. Lives on one asyncio event loop. Knows no tensor and no text.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from pronk.engine import wire
from pronk.engine.config import EngineConfig
from pronk.engine.conversation import Conversation, Listener
from pronk.engine.errors import (
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    EngineDrainingError,
    InvalidParameterError,
    PronkError,
)
from pronk.engine.host_process import HostProcess
from pronk.engine.request import Output, Request

CLOSE_SECONDS = 10.0
"""How long the group may take to end by itself."""
LONGEST_DELAY_SECONDS = 60.0

logger = logging.getLogger(__name__)


def _ignore(progress: wire.Progress) -> None:
    del progress


def check_request(request: Request, info: wire.EngineInfo) -> None:
    """Refuse what this engine cannot serve, before it is queued.

    Raises ContextLengthError and InvalidParameterError; param names the field.
    """
    length, limit = len(request.prompt), info.max_model_len
    max_tokens = request.params.max_tokens
    if not length:
        raise InvalidParameterError("the prompt is empty: it must hold at least one token", "prompt")
    if length + (max_tokens != 0) > limit:
        raise ContextLengthError(
            f"This model's maximum context length is {limit} tokens. However, the prompt holds {length} tokens, "
            "and an answer needs at least one more. Please shorten the prompt.",
            "messages",
        )
    if max_tokens is not None and length + max_tokens > limit:
        raise ContextLengthError(
            f"This model's maximum context length is {limit} tokens. However, you asked for {max_tokens} tokens after "
            f"a prompt of {length}. Please shorten the prompt, or ask for at most {limit - length} tokens.",
            "max_tokens",
        )
    check_prompt(request.prompt, info)
    params = request.params
    for name, ids in (
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
        ("allowed_token_ids", params.allowed_token_ids),
        ("bad_words", itertools.chain.from_iterable(params.bad_words)),
    ):
        if not all(0 <= token < info.vocab_size for token in ids):
            raise InvalidParameterError(f"{name} names token ids outside 0..{info.vocab_size - 1}", name)


def check_prompt(prompt: Sequence[int], info: wire.EngineInfo) -> None:
    """Raises InvalidParameterError for token ids that the model does not have."""
    if not all(0 <= token < info.vocab_size for token in prompt):
        raise InvalidParameterError(f"the prompt holds token ids outside 0..{info.vocab_size - 1}", "prompt")


class AsyncEngine:
    """The engine, from outside. Make one with `start`; end it with `close`."""

    def __init__(
        self,
        config: EngineConfig,
        spawn: Callable[[], HostProcess],
        host: HostProcess,
        conversation: Conversation,
        listeners: list[Listener],
    ) -> None:
        """listeners: those of the conversation, and of every one that follows."""
        self.error: EngineDeadError | None = None
        """Why nobody can be served now; None again when a group has come up."""
        self.restarts = 0
        """How often a group came up in place of one that died."""
        self._config = config
        self._spawn = spawn
        self._host = host
        self._conversation = conversation
        self._listeners = listeners
        self._draining = False
        self._closing = False
        self._gone = asyncio.Event()
        self._num_readers = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._keeper = asyncio.create_task(self._keep(), name="engine-keeper")

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        on_progress: Callable[[wire.Progress], None] = _ignore,
        spawn: Callable[[], HostProcess] = HostProcess.spawn,
    ) -> AsyncEngine:
        """Start the processes, load the model, and return when it has made a first token.

        spawn: starts a host, now and whenever one has died. Raises what the engine met on its way up: CheckpointError
        and its kinds, ConfigError, EngineStartError. When it does, or is cancelled, no process is left.
        """
        if config.tensor_parallel_size > 1 and sys.platform != "linux":
            raise ConfigError(
                f"--tensor-parallel-size {config.tensor_parallel_size}: several processes share a model on Linux; "
                "leave it at 1"
            )
        host = spawn()
        listeners: list[Listener] = []
        try:
            group = await host.start_group(_num_forked(config), config.start_timeout)
            conversation = await Conversation.start(group, config, listeners, on_progress)
        except BaseException:
            await host.close()
            raise
        return cls(config, spawn, host, conversation, listeners)

    @property
    def info(self) -> wire.EngineInfo:
        """Of the group that runs, or ran last."""
        return self._conversation.info

    @property
    def stats(self) -> wire.EngineStats:
        """After the last step of the group that runs. They begin anew with each group."""
        return self._conversation.stats

    @property
    def num_ranks(self) -> int:
        """Processes that share the model."""
        return self._config.tensor_parallel_size

    @property
    def pids(self) -> list[int]:
        """Of those processes, by rank; empty when they have ended."""
        return self._conversation.pids

    def add_stats_listener(self, listener: Listener) -> None:
        """listener is called in the event loop with every step's message."""
        self._listeners.append(listener)

    @property
    def num_requests(self) -> int:
        """Requests that have not ended yet."""
        return len(self._conversation.inboxes)

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """Yield what each step adds, or several steps together where the reader is slower. The last output has a
        finish_reason. Leaving early aborts the request.

        Raises at the first step: ContextLengthError, InvalidParameterError, EngineDrainingError. Raises at any time:
        EngineDeadError.
        """
        if self.error is not None:
            raise self.error
        if self._draining:
            raise EngineDrainingError("the server is shutting down: send the request to another, or again later")
        check_request(request, self.info)
        conversation = self._conversation
        inbox = conversation.open(request.request_id)
        self._count_readers(1)
        finished = False
        try:
            conversation.send(wire.Add(request))
            while not finished:
                output = await inbox.get()
                finished = output.finish_reason is not None
                if output.finish_reason == "error" and conversation.error is not None:
                    raise conversation.error
                yield output
        finally:
            conversation.close(request.request_id)
            self._count_readers(-1)
            if not finished:
                conversation.send(wire.Abort([request.request_id]))

    def _count_readers(self, change: int) -> None:
        self._num_readers += change
        if self._num_readers:
            self._idle.clear()
        else:
            self._idle.set()

    def abort(self, request_id: str) -> None:
        """End a request; its stream ends with finish_reason "abort". Unknown and ended requests are no error."""
        self._conversation.send(wire.Abort([request_id]))

    async def num_cached(self, prompt: Sequence[int], cache_salt: str = "") -> int:
        """-> how many of a prompt's tokens a request with this salt would find in the prefix cache, as it is now.

        Raises InvalidParameterError and EngineDeadError.
        """
        if self.error is not None:
            raise self.error
        check_prompt(prompt, self.info)
        return await self._conversation.num_cached(prompt, cache_salt)

    async def drain(self, timeout: float) -> bool:  # noqa: ASYNC109  it says whether it was reached, and raises nothing
        """Take nothing new, and wait up to `timeout` seconds for what runs. -> whether all of it ended.

        A group that dies from now on is not started again.
        """
        self._draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout)
        return not self._num_readers

    async def gone(self) -> None:
        """Return when the group has died that torchrun started: who did so starts it again, all of it together."""
        await self._gone.wait()

    async def close(self, *, keeps: bool = False) -> None:
        """End every process, now. What still runs gets EngineDeadError. keeps: there are some seconds to write what a
        later start maps, unless `kill` is called meanwhile."""
        self._closing = True
        if self.error is None:
            self._conversation.send(wire.Shutdown(keeps))
            await asyncio.wait([self._keeper], timeout=CLOSE_SECONDS)
        else:
            self._keeper.cancel()  # it may be starting a group
        await self._host.close()
        await asyncio.wait([self._keeper])

    def kill(self) -> None:
        """Every process, at once; they are to be closed all the same."""
        self._host.kill()

    async def _keep(self) -> None:
        """Listen to the group; when it has died, start another."""
        try:
            while True:
                reason = await self._conversation.listen()
                self._lose(reason)
                if self._closing or self._draining:
                    return
                if self._config.position is not None:
                    self._gone.set()
                    return
                await self._start_again(reason)
        except Exception as error:  # a fault of ours: nobody may be left waiting because of it
            logger.exception("the engine's keeper failed: the server has to be started again")
            self._lose(f"{type(error).__name__} in the server")

    def _lose(self, reason: str) -> None:
        text = "the engine was shut down" if self._closing else f"the engine died: {reason}"
        self.error = EngineDeadError(text)
        self._conversation.fail(self.error)

    async def _start_again(self, reason: str) -> None:
        """Return when a group is up, however many have to be tried."""
        lost = time.monotonic()
        logger.error("the engine died: %s; requests are answered with 503 until it is up again", reason)
        for delay in _delays():
            try:
                if self._host.has_ended:
                    await self._host.close()
                    self._host = self._spawn()
                group = await self._host.start_group(_num_forked(self._config), self._config.start_timeout)
                self._conversation = await Conversation.start(group, self._config, self._listeners, _ignore)
            except (PronkError, OSError) as error:
                logger.error("the engine could not be started again, the next try is in %g s: %s", delay, error)
                # Why stands in the log: it may name a path.
                self.error = EngineDeadError(f"the engine died: {reason}; it could not be started again so far")
                await asyncio.sleep(delay)
            else:
                self.restarts += 1
                self.error = None
                logger.warning("the engine is up again, %.1f s after it died", time.monotonic() - lost)
                return


def _num_forked(config: EngineConfig) -> int:
    """-> how many ranks the host is to fork. Those that torchrun started are there already, but for rank 0."""
    return config.tensor_parallel_size if config.position is None else 1


def _delays() -> Iterator[float]:
    """-> seconds to wait after each start that failed."""
    for power in itertools.count():
        yield min(2.0**power, LONGEST_DELAY_SECONDS)
