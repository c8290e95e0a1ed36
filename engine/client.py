"""AsyncEngine: the engine as the server's process sees it. Starts the engine's own process, and speaks `wire` with it.

Lives on one asyncio event loop. Knows no tensor and no text; every request ends with a finish reason or an error, also
when the other process is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec

from pronk.engine import errors, wire
from pronk.engine.config import EngineConfig
from pronk.engine.errors import (
    ContextLengthError,
    EngineDeadError,
    EngineDrainingError,
    EngineStartError,
    InvalidParameterError,
    PronkError,
)
from pronk.engine.inbox import Inbox
from pronk.engine.request import Output, Request

READ_SIZE = 1 << 20


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
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        info: wire.EngineInfo,
        frames: wire.Frames,
    ) -> None:
        self.info = info
        self.stats = wire.EngineStats(blocks_total=info.num_blocks)
        self.error: EngineDeadError | None = None
        self._process = process
        self._reader = reader
        self._writer = writer
        self._frames = frames
        self._inboxes: dict[str, Inbox] = {}
        self._queries = itertools.count()
        self._answers: dict[int, asyncio.Future[int]] = {}
        self._listeners: list[Callable[[wire.Step], None]] = []
        self._draining = False
        self._closing = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._receiver = asyncio.create_task(self._receive(), name="engine-receiver")

    @classmethod
    async def start(
        cls, config: EngineConfig, *, on_progress: Callable[[wire.Progress], None] = _ignore
    ) -> AsyncEngine:
        """Start the engine's process, load the model, and return when it has made a first token.

        Raises what the engine met on its way up: CheckpointError and its kinds, ConfigError, EngineStartError.
        """
        process, ours = _spawn()
        reader, writer = await asyncio.open_connection(sock=ours, limit=READ_SIZE)
        frames = wire.Frames(wire.FromEngine)
        try:
            writer.write(wire.encode(wire.Start(config)))
            info = await cls._until_ready(process, reader, frames, on_progress)
        except BaseException:
            process.kill()
            process.wait()
            writer.close()
            raise
        return cls(process, reader, writer, info, frames)

    @staticmethod
    async def _until_ready(
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        frames: wire.Frames,
        on_progress: Callable[[wire.Progress], None],
    ) -> wire.EngineInfo:
        while data := await _read(reader):
            for message in frames.feed(data):
                if isinstance(message, wire.Progress):
                    on_progress(message)
                elif isinstance(message, wire.EngineInfo):
                    return message
                elif isinstance(message, wire.Failed):
                    raise _start_error(message)
        code = await asyncio.to_thread(process.wait)
        raise EngineStartError(f"the engine's process ended while it was starting ({_exit(code)})")

    def add_stats_listener(self, listener: Callable[[wire.Step], None]) -> None:
        """listener is called in the event loop with every step's message."""
        self._listeners.append(listener)

    @property
    def num_requests(self) -> int:
        """Requests that have not ended yet."""
        return len(self._inboxes)

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
        if request.request_id in self._inboxes:
            raise InvalidParameterError(f"a request with the id {request.request_id!r} is running", "request_id")
        inbox = Inbox()
        self._inboxes[request.request_id] = inbox
        self._idle.clear()
        finished = False
        try:
            self._send(wire.Add(request))
            while not finished:
                output = await inbox.get()
                finished = output.finish_reason is not None
                if output.finish_reason == "error" and self.error is not None:
                    raise self.error
                yield output
        finally:
            self._forget(request.request_id)
            if not finished and self.error is None:
                self._send(wire.Abort([request.request_id]))

    def abort(self, request_id: str) -> None:
        """End a request; its stream ends with finish_reason "abort". Unknown and ended requests are no error."""
        if self.error is None:
            self._send(wire.Abort([request_id]))

    async def num_cached(self, prompt: Sequence[int], cache_salt: str = "") -> int:
        """-> how many of a prompt's tokens a request with this salt would find in the prefix cache, as it is now.

        Raises InvalidParameterError and EngineDeadError.
        """
        if self.error is not None:
            raise self.error
        check_prompt(prompt, self.info)
        query = next(self._queries)
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._answers[query] = answer
        try:
            self._send(wire.CountCached(query, list(prompt), cache_salt))
            return await answer
        finally:
            del self._answers[query]

    async def drain(self, timeout: float) -> bool:  # noqa: ASYNC109  it says whether it was reached, and raises nothing
        """Take nothing new, and wait up to `timeout` seconds for what runs. -> whether all of it ended."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout)
        return not self._inboxes

    async def close(self) -> None:
        """End the engine's process, now. What still runs gets EngineDeadError."""
        self._closing = True
        if self.error is None:
            self._send(wire.Shutdown())
        try:
            await asyncio.wait_for(asyncio.to_thread(self._process.wait, 10), 11)
        except (subprocess.TimeoutExpired, TimeoutError):
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        await self._receiver
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def _send(self, message: wire.ToEngine) -> None:
        # Not awaited: a message is small against the socket's buffer, and the transport keeps what does not fit.
        self._writer.write(wire.encode(message))

    def _forget(self, request_id: str) -> None:
        self._inboxes.pop(request_id, None)
        if not self._inboxes:
            self._idle.set()

    async def _receive(self) -> None:
        reason = ""
        try:
            while data := await _read(self._reader):
                for message in self._frames.feed(data):
                    if isinstance(message, wire.Step):
                        self._deliver(message)
                    elif isinstance(message, wire.CachedCount):
                        self._answer(message)
                    elif isinstance(message, wire.Failed):
                        reason = _failure(message)
        except msgspec.MsgspecError as error:
            reason = f"it sent what cannot be read: {error}"
            self._process.kill()
        code = await asyncio.to_thread(self._process.wait)
        self._die(reason or _exit(code))

    def _deliver(self, step: wire.Step) -> None:
        self.stats = step.stats
        for output in step.outputs:
            inbox = self._inboxes.get(output.request_id)
            if inbox is not None:  # else its reader left, and the abort is on its way
                inbox.put(output)
        for listener in self._listeners:
            listener(step)

    def _answer(self, count: wire.CachedCount) -> None:
        answer = self._answers.get(count.query)
        if answer is not None and not answer.done():  # else nobody waits for it any more
            answer.set_result(count.num_tokens)

    def _die(self, reason: str) -> None:
        text = "the engine was shut down" if self._closing else f"the engine's process died ({reason})"
        self.error = EngineDeadError(text)
        for request_id, inbox in self._inboxes.items():
            inbox.put(Output(request_id=request_id, finish_reason="error", error=text))
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(self.error)


def _spawn() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """-> the engine's process, and our end of the socket to it."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "pronk.engine.process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            # A thread that spins while it waits for the others keeps the core that they, or this process, need.
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
            # A Ctrl-C on the terminal is the server's to answer: it drains, then tells the engine.
            start_new_session=True,
        )
    return process, ours


async def _read(reader: asyncio.StreamReader) -> bytes:
    """What has arrived; nothing when the other end is gone, however it went."""
    try:
        return await reader.read(READ_SIZE)
    except ConnectionError:
        return b""


def _start_error(failed: wire.Failed) -> PronkError:
    """The engine's own error where it is one that Pronk raises on purpose, else a fault of ours with its traceback."""
    kind = getattr(errors, failed.kind, None)
    if isinstance(kind, type) and issubclass(kind, PronkError):
        return kind(failed.message)
    return EngineStartError(
        f"the engine failed while it was starting: {failed.kind}: {failed.message}\n{failed.traceback}"
    )


def _failure(failed: wire.Failed) -> str:
    """Clients read it. An error that nobody raised on purpose may hold a path: it stands in the engine's own log."""
    kind = getattr(errors, failed.kind, None)
    on_purpose = isinstance(kind, type) and issubclass(kind, PronkError)
    return failed.message if on_purpose else failed.kind


def _exit(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
