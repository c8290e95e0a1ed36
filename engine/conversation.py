"""Conversation: what the server and one group say to each other, from the group's start to its end.

Everything that is a group's own lives here and ends with it: who waits for outputs, who waits for an answer, what the
last step said. So nothing of a group that died reaches the one that comes after it. Lives on one asyncio event loop.
Knows `wire`; not how processes are started, and not what happens after the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Sequence

import msgspec

from pronk.engine import errors, wire
from pronk.engine.config import EngineConfig
from pronk.engine.errors import EngineDeadError, EngineStartError, InvalidParameterError, PronkError
from pronk.engine.host_process import HostedGroup
from pronk.engine.inbox import Inbox
from pronk.engine.request import Output

Listener = Callable[[wire.Step], None]


class Conversation:
    """Begins with `start`; goes on while `listen` runs; ends with `fail`."""

    def __init__(
        self, group: HostedGroup, frames: wire.Frames, info: wire.EngineInfo, listeners: Sequence[Listener]
    ) -> None:
        self.info = info
        self.stats = wire.EngineStats(blocks_total=info.num_blocks)
        """After the last step."""
        self.error: EngineDeadError | None = None
        """Why it is over, for those who were waiting."""
        self.inboxes: dict[str, Inbox] = {}
        self._group = group
        self._listeners = listeners
        self._frames = frames
        self._queries = itertools.count()
        self._answers: dict[int, asyncio.Future[int]] = {}

    @classmethod
    async def start(
        cls,
        group: HostedGroup,
        config: EngineConfig,
        listeners: Sequence[Listener],
        on_progress: Callable[[wire.Progress], None],
    ) -> Conversation:
        """Have a new group load the model, and return when it has made a first token.

        listeners: are called with every step's message; others may join them later. Raises what the engine met on its
        way up: CheckpointError and its kinds, ConfigError, EngineStartError.
        """
        frames = wire.Frames(wire.FromEngine)
        try:
            group.writer.write(wire.encode(wire.Start(config)))
            info = await _until_ready(group, frames, on_progress)
        except msgspec.MsgspecError as error:
            group.writer.close()
            raise EngineStartError(f"the engine sent what cannot be read while it was starting: {error}") from error
        except BaseException:
            group.writer.close()
            raise
        return cls(group, frames, info, listeners)

    @property
    def pids(self) -> list[int]:
        """The group's processes, by rank; empty when it has ended."""
        return self._group.pids

    async def listen(self) -> str:
        """Hand out what comes until the group has ended, and nothing of it is left. -> why it ended."""
        failed = ""
        try:
            while data := await _read(self._group.reader):
                for message in self._frames.feed(data):
                    if isinstance(message, wire.Step):
                        self._deliver(message)
                    elif isinstance(message, wire.CachedCount):
                        self._answer(message)
                    elif isinstance(message, wire.Failed):
                        failed = _failure(message)
        except msgspec.MsgspecError as error:
            failed = f"rank 0 sent what cannot be read: {error}"
            self._group.kill()
        end = await self._group.end()
        await self._hang_up()
        return failed if failed and end.rank == 0 else end.reason

    def fail(self, error: EngineDeadError) -> None:
        """It is over: whoever waits is told so."""
        self.error = error
        self.stats = wire.EngineStats(blocks_total=self.stats.blocks_total)
        for request_id, inbox in self.inboxes.items():
            inbox.put(Output(request_id=request_id, finish_reason="error", error=str(error)))
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)

    def send(self, message: wire.ToEngine) -> None:
        """To a group that has ended, nothing is sent."""
        # Not awaited: a message is small against the socket's buffer, and the transport keeps what does not fit.
        if not self._group.writer.is_closing():
            self._group.writer.write(wire.encode(message))

    def open(self, request_id: str) -> Inbox:
        """-> where this request's outputs will be. To be closed. Raises InvalidParameterError for an id in use."""
        if request_id in self.inboxes:
            raise InvalidParameterError(f"a request with the id {request_id!r} is running", "request_id")
        inbox = self.inboxes[request_id] = Inbox()
        return inbox

    def close(self, request_id: str) -> None:
        """Nobody waits for this request's outputs any more."""
        del self.inboxes[request_id]

    async def num_cached(self, prompt: Sequence[int], cache_salt: str) -> int:
        """See `wire.CountCached`. Raises EngineDeadError."""
        query = next(self._queries)
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._answers[query] = answer
        try:
            self.send(wire.CountCached(query, list(prompt), cache_salt))
            return await answer
        finally:
            del self._answers[query]

    async def _hang_up(self) -> None:
        self._group.writer.close()
        with contextlib.suppress(OSError):
            await self._group.writer.wait_closed()

    def _deliver(self, step: wire.Step) -> None:
        self.stats = step.stats
        for output in step.outputs:
            inbox = self.inboxes.get(output.request_id)
            if inbox is not None:  # else its reader left, and the abort is on its way
                inbox.put(output)
        for listener in self._listeners:
            listener(step)

    def _answer(self, count: wire.CachedCount) -> None:
        answer = self._answers.get(count.query)
        if answer is not None and not answer.done():  # else nobody waits for it any more
            answer.set_result(count.num_tokens)


async def _until_ready(
    group: HostedGroup, frames: wire.Frames, on_progress: Callable[[wire.Progress], None]
) -> wire.EngineInfo:
    failed = None
    while data := await _read(group.reader):
        for message in frames.feed(data):
            if isinstance(message, wire.Progress):
                on_progress(message)
            elif isinstance(message, wire.EngineInfo):
                return message
            elif isinstance(message, wire.Failed):
                failed = message
    end = await group.end()
    if failed is not None and (end.rank == 0 or _is_on_purpose(failed)):
        raise _start_error(failed)
    raise EngineStartError(f"the engine ended while it was starting: {end.reason}")


async def _read(reader: asyncio.StreamReader) -> bytes:
    """What has arrived; nothing when the other end is gone, however it went."""
    try:
        return await reader.read(wire.READ_SIZE)
    except ConnectionError:
        return b""


def _start_error(failed: wire.Failed) -> PronkError:
    """The engine's own error where it is one that Pronk raises on purpose, else a fault of ours with its traceback."""
    if _is_on_purpose(failed):
        error: PronkError = getattr(errors, failed.kind)(failed.message)
        return error
    return EngineStartError(
        f"the engine failed while it was starting: {failed.kind}: {failed.message}\n{failed.traceback}"
    )


def _failure(failed: wire.Failed) -> str:
    """Clients read it. An error that nobody raised on purpose may hold a path: it stands in the engine's own log."""
    return failed.message if _is_on_purpose(failed) else f"rank 0 failed with {failed.kind}"


def _is_on_purpose(failed: wire.Failed) -> bool:
    """Whether its error is one of Pronk's own, which says what to do."""
    kind = getattr(errors, failed.kind, None)
    return isinstance(kind, type) and issubclass(kind, PronkError)
