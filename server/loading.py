"""From a config to a ServedModel: find the files, start the engine, and read the tokenizer meanwhile.

Knows which parts a model is made of; nothing of HTTP, of signals or of what is printed.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pronk.engine
from pronk.engine.client import AsyncEngine
from pronk.engine.config import EngineConfig, replace
from pronk.engine.host_process import HostProcess
from pronk.engine.model.config import GenerationDefaults, load_generation_defaults
from pronk.engine.newborn import Newborn
from pronk.engine.tokenizer import Tokenizer
from pronk.engine.weights.hub import resolve_model
from pronk.engine.wire import Progress
from pronk.server.chat.template import ChatTemplate, read_chat_template, template_family
from pronk.server.config import EMBEDDED_MODEL
from pronk.server.service import ServedModel

if TYPE_CHECKING:
    from pronk.engine.grammar import GrammarCompiler

T = TypeVar("T")


async def load_model(
    config: EngineConfig, on_progress: Callable[[Progress], None], newborn: Newborn | None = None
) -> ServedModel:
    """newborn: becomes the engine's host. -> a model that can make tokens. Raises CheckpointError and its kinds,
    ConfigError, EngineStartError.

    When it is cancelled, the engine's process is gone before it returns.
    """
    folder = await _in_thread(
        lambda: resolve_model(config.model or str(embedded_folder()), load_format=config.load_format)
    )
    starting = asyncio.create_task(
        AsyncEngine.start(replace(config, model=str(folder)), on_progress=on_progress, spawn=_spawner(newborn)),
        name="engine-start",
    )
    try:
        tokenizer, template, defaults = await _in_thread(lambda: read_text_side(folder))
        make_compiler = await _in_thread(_grammar_compiler)
        engine = await starting
    except BaseException:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        raise
    grammars = make_compiler(tokenizer.vocabulary, engine.info.eos_token_ids)
    return ServedModel(engine, tokenizer, template, defaults, grammars.check, grammars.is_checked)


def _spawner(newborn: Newborn | None) -> Callable[[], HostProcess]:
    """-> what makes the engine's hosts: the first of the newborn, if there is one."""

    def spawn() -> HostProcess:
        if newborn is None or newborn.is_taken:
            return HostProcess.spawn()
        return HostProcess(*newborn.take())

    return spawn


def _grammar_compiler() -> type[GrammarCompiler]:
    """It brings numpy, which the server's first answers need not wait for."""
    from pronk.engine.grammar import GrammarCompiler

    return GrammarCompiler


def embedded_folder() -> Path:
    """Where the model that comes with Pronk lies."""
    return Path(pronk.engine.__path__[0]) / EMBEDDED_MODEL


def read_text_side(folder: Path) -> tuple[Tokenizer, ChatTemplate, GenerationDefaults]:
    """What the server's process needs of a checkpoint: no weights. Raises CheckpointError."""
    tokenizer = Tokenizer.from_folder(folder)
    template = ChatTemplate(tokenizer, template_family(read_chat_template(folder)))
    return tokenizer, template, load_generation_defaults(folder)


async def _in_thread(work: Callable[[], T]) -> T:
    """Like asyncio.to_thread, but nobody waits for the thread when the process ends: a download cannot be cancelled."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(setter: Callable[[Any], None], value: object) -> None:
        if not result.done():
            setter(value)

    def run() -> None:
        try:
            value = work()
        except BaseException as error:  # noqa: BLE001  handed over whole to whoever waits
            loop.call_soon_threadsafe(settle, result.set_exception, error)
        else:
            loop.call_soon_threadsafe(settle, result.set_result, value)

    threading.Thread(target=run, name="loading", daemon=True).start()
    return await result
