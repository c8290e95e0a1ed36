"""Inbox: one request's outputs on their way to whoever reads them. What comes before the reader looks is joined.

So a reader that is slow, because its own client is, costs a few bytes a token and gets fewer, larger outputs; the
engine waits for nobody. Lives on one event loop. Knows outputs; neither sockets nor text.
"""

from __future__ import annotations

import asyncio
from typing import TypeVar

from pronk.engine.request import Output

T = TypeVar("T")


class Inbox:
    """For one reader."""

    __slots__ = ("_failure", "_is_joined", "_output", "_reader")

    def __init__(self) -> None:
        self._output: Output | None = None
        self._is_joined = False
        self._failure: Output | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, output: Output) -> None:
        """What follows one with a finish_reason is not read."""
        if self._output is None:
            self._output = output
        elif output.finish_reason == "error":
            self._failure = output
        elif self._output.finish_reason is None:
            self._output = self._join(self._output, output)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def get(self) -> Output:
        """What has come since the last call, as one output; waits until there is something.

        An error is an output of its own: what came before it is not lost.
        """
        while self._output is None:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        output, self._output, self._is_joined = self._output, self._failure, False
        self._failure = None
        return output

    def _join(self, earlier: Output, later: Output) -> Output:
        """The lists of a joined output are ours and grow in place, or a long wait would cost its square."""
        owned, self._is_joined = self._is_joined, True
        return Output(
            request_id=later.request_id,
            token_ids=_grown(earlier.token_ids, later.token_ids, owned=owned),
            logprobs=_both(earlier.logprobs, later.logprobs, owned=owned),
            finish_reason=later.finish_reason,
            stop_reason=later.stop_reason,
            error=later.error,
            error_kind=later.error_kind,
            num_cached_tokens=max(earlier.num_cached_tokens, later.num_cached_tokens),
            timing=later.timing,
            prompt_logprobs=_both(earlier.prompt_logprobs, later.prompt_logprobs, owned=owned),
        )


def _grown(earlier: list[T], later: list[T], *, owned: bool) -> list[T]:
    if not owned:
        return earlier + later
    earlier += later
    return earlier


def _both(earlier: list[T] | None, later: list[T] | None, *, owned: bool) -> list[T] | None:
    """None: not asked for, or nothing yet."""
    if earlier is None or later is None:
        # Another's list is not taken over: it would grow under its owner.
        return earlier if later is None else [*later]
    return _grown(earlier, later, owned=owned)
