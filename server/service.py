"""Service: what is served and whether it can be asked, from the first second of the process to its last.

loading -> ready -> draining, and failed from any of them while the engine is gone. Knows the engine by its face only
(`Engine`), and neither HTTP nor how a model is loaded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from pronk.engine.errors import EngineDeadError, EngineDrainingError, PronkError
from pronk.engine.model.config import GenerationDefaults
from pronk.engine.request import Grammar, Output, Request
from pronk.engine.tokenizer import Tokenizer, Vocabulary
from pronk.engine.wire import EngineInfo, EngineStats, Step
from pronk.server.chat.template import ChatTemplate, normalise
from pronk.server.errors import RETRY_AFTER_SECONDS, NotReadyError, QueueFullError

GRAMMARS_AT_ONCE = 2
"""How many grammars are checked at once: as many as `pronk.engine.grammar` has processes for."""


class Engine(Protocol):
    """What the server asks of pronk.engine.client.AsyncEngine."""

    error: EngineDeadError | None
    restarts: int

    @property
    def info(self) -> EngineInfo: ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def num_ranks(self) -> int: ...

    @property
    def num_requests(self) -> int: ...

    def generate(self, request: Request) -> AsyncIterator[Output]: ...

    async def num_cached(self, prompt: Sequence[int], cache_salt: str, /) -> int: ...

    def add_stats_listener(self, listener: Callable[[Step], None], /) -> None: ...

    async def gone(self) -> None: ...

    async def drain(self, seconds: float, /) -> bool: ...

    async def close(self, *, keeps: bool = False) -> None: ...

    def kill(self) -> None: ...


@dataclass(frozen=True)
class ServedModel:
    """A loaded model with everything that turns messages into tokens and tokens into text."""

    engine: Engine
    tokenizer: Tokenizer
    template: ChatTemplate
    defaults: GenerationDefaults
    check_grammar: Callable[[Grammar], None]
    """Raises InvalidParameterError for one that cannot be enforced. May take a second; for any thread."""
    is_checked: Callable[[Grammar], bool] = lambda grammar: False
    """Whether `check_grammar` would accept it at once, as it did lately."""
    judging: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(GRAMMARS_AT_ONCE))
    """Held while a grammar is checked: grammars that take long wait for each other, and not the threads for them."""
    created: int = field(default_factory=lambda: int(time.time()))
    """When it was loaded, in seconds since 1970."""

    @property
    def vocabulary(self) -> Vocabulary:
        return self.tokenizer.vocabulary

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset(self.engine.info.eos_token_ids)

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """messages: as OpenAI's API spells them; options: those of ChatTemplate.render. -> the prompt's token ids.

        Raises InvalidParameterError.
        """
        return self.template.render(normalise(messages), **options)


class Phase(Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Service:
    """The one thing that changes in a server's life; every route is handed it."""

    def __init__(self, names: tuple[str, ...], *, max_waiting: int | None = None) -> None:
        """names: those that clients may ask for the model by; answers carry the first.

        max_waiting: answers that may wait for their first step; None: any number.
        """
        self.names = names
        self._max_waiting = max_waiting
        self.model: ServedModel | None = None
        self._draining = False
        self._failure: PronkError | None = None

    @property
    def phase(self) -> Phase:
        if self.failure is not None:
            return Phase.FAILED
        if self._draining:
            return Phase.DRAINING
        return Phase.LOADING if self.model is None else Phase.READY

    @property
    def failure(self) -> PronkError | None:
        """Why nobody can be served: for good, or until the engine is up again."""
        return self.model.engine.error if self.model is not None and self.model.engine.error else self._failure

    def ready(self, model: ServedModel) -> None:
        """The engine has made its first token."""
        self.model = model

    def fail(self, error: PronkError) -> None:
        """The engine did not come up."""
        self._failure = error

    def drain(self) -> None:
        """Take nothing new from now on."""
        self._draining = True

    def require(self) -> ServedModel:
        """-> the model, when it can be asked. Raises NotReadyError, EngineDrainingError, or why it failed."""
        failure = self.failure
        if failure is not None:
            raise failure
        if self._draining:
            raise EngineDrainingError("The server is shutting down: send the request to another one, or again later.")
        if self.model is None:
            raise NotReadyError("The model is still loading: try again in a few seconds.")
        return self.model

    def admit(self, num_answers: int = 1) -> ServedModel:
        """Like `require`, for a request that is about to be handed to the engine. Raises also QueueFullError.

        A request that asks for more answers than may ever wait is let in when nobody waits.
        """
        model = self.require()
        # The engine's figures are those of its last step; what was handed over since then waits as well.
        waiting = max(0, model.engine.num_requests - model.engine.stats.num_running)
        if self._max_waiting is not None and waiting and waiting + num_answers > self._max_waiting:
            raise QueueFullError(
                f"Rate limit reached: {waiting} requests are waiting already. "
                f"Please try again in {RETRY_AFTER_SECONDS} seconds."
            )
        return model
