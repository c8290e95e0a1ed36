"""The text of an answer -> content and tool calls, piece by piece, in one machine for streams and whole answers.

Fed the same text it returns the same parts, however the text is cut; neighbouring parts of one kind may be joined:
content by concatenation, deltas of the same call by concatenating their arguments.

Calls are what `tool_forms` reads, wherever one begins; all else is content, text that begins like a call and goes on
otherwise included. Whitespace before a call that begins the answer, what stands between two calls, and whitespace after
the last are part of the calls' form and not content.

A call is certain, and given out, when its name is known and its arguments have begun with a first value, or are empty;
from then on arguments come as they are read. When such arguments turn out not to be JSON, the call keeps what it has,
as it does when the answer is cut off, and the rest is content. A pythonic call is certain at its end only.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

from pronk.server.chat.tool_forms import OPENERS, TAUGHT_OPENERS, read_calls
from pronk.server.chat.tool_literals import MANY, PLAIN, MismatchError, Steps

_OPENER = re.compile(f"[{re.escape(OPENERS)}]")
_TAUGHT_OPENER = re.compile(f"[{re.escape(TAUGHT_OPENERS)}]")


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What is added to one tool call. The first of a call has its id and name (and perhaps arguments already); those
    that follow have arguments only. index counts the answer's calls from 0."""

    index: int
    id: str | None
    name: str | None
    arguments: str


Part: TypeAlias = "str | CallDelta"
"""str is content, never empty."""


@dataclass(frozen=True)
class Call:
    """A whole tool call."""

    id: str
    name: str
    arguments: str
    """JSON as text; broken off where the answer was."""


def fold(parts: Iterable[Part]) -> tuple[str | None, list[Call]]:
    """The parts of a whole answer -> its content, None where there is none, and its calls in order."""
    content: list[str] = []
    calls: list[Call] = []
    for part in parts:
        if isinstance(part, str):
            content.append(part)
        elif part.id is not None and part.name is not None:
            calls.append(Call(part.id, part.name, part.arguments))
        else:
            call = calls[part.index]
            calls[part.index] = Call(call.id, call.name, call.arguments + part.arguments)
    return "".join(content) if content else None, calls


def new_call_id() -> str:
    """An id as OpenAI's look."""
    return f"call_{uuid.uuid4().hex[:24]}"


class ToolParser:
    """One choice's text. Never raises for any text.

    Give it the text of every delta through `feed`, and call `finish` once after the last: it returns what was held.
    """

    def __init__(
        self,
        names: Collection[str],
        *,
        parallel: bool = True,
        taught_only: bool = False,
        anywhere: bool = True,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        """names: of the functions that may be called; parallel: else calls after the first are left out; taught_only:
        other forms than that which the template teaches are content; anywhere: else calls after content are content.
        """
        self._names = tuple(names)
        self._taught_only = taught_only
        self._opener = (_TAUGHT_OPENER if taught_only else _OPENER) if anywhere else None
        self._answer = _Answer(parallel=parallel, new_id=new_id)
        self._takes_many = False
        # What reads calls now; None inside content. An answer may begin with a call.
        self._reader: Steps[NoReturn] | None = self._start()

    @property
    def num_calls(self) -> int:
        """Calls that were returned so far."""
        return self._answer.num_calls

    def feed(self, text: str) -> list[Part]:
        """Take the next piece; -> what is now certain, in order; often nothing."""
        place = 0
        while place < len(text):
            if self._reader is None:
                opener = self._opener.search(text, place) if self._opener else None
                self._answer.content(text[place : opener.start() if opener else len(text)])
                if opener is None:
                    break
                place = opener.start()
                self._reader = self._start()
            # A character at which the reader gives up is none of the reader's: it is looked at again.
            plain = PLAIN.match(text, place) if self._takes_many else None
            piece = plain.group() if plain else text[place]
            if self._read(self._reader, piece):
                place += len(piece)
        return self._answer.take()

    def finish(self) -> list[Part]:
        """No text follows. -> what was held back. `feed` must not be called after it."""
        if self._reader is not None:
            self._read(self._reader, "")
        return self._answer.take()

    def _start(self) -> Steps[NoReturn]:
        reader = read_calls(self._names, self._answer, taught_only=self._taught_only)
        next(reader)
        self._takes_many = False
        return reader

    def _read(self, reader: Steps[NoReturn], piece: str) -> bool:
        """Whether the reader took the piece ("": the end); else what it held before is content, and it is done."""
        self._answer.held.append(piece)
        try:
            self._takes_many = reader.send(piece) is MANY
        except MismatchError:
            self._answer.give_up(at_end=not piece)
            self._reader = None
            return False
        return True


class _Answer:
    """What has been made of the text: parts not yet taken, and characters that may yet be either a call's or content.
    The Sink of `read_calls`."""

    def __init__(self, *, parallel: bool, new_id: Callable[[], str]) -> None:
        self.num_calls = 0
        self.held: list[str] = []
        """The last one is current: the character, or the plain ones, that the reader looks at."""
        self._parts: list[Part] = []
        self._parallel = parallel
        self._new_id = new_id
        self._left_out = False
        self._between_calls = False

    def take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    def content(self, text: str) -> None:
        if text and self._parts and isinstance(self._parts[-1], str):
            self._parts[-1] += text
        elif text:
            self._parts.append(text)

    def give_up(self, *, at_end: bool) -> None:
        """What was held before the current character is content, unless it only follows a call at the text's end."""
        if not (at_end and self._between_calls):
            self.content("".join(self.held[:-1]))
        self.held.clear()

    def begin(self, name: str, arguments: str) -> None:
        self._left_out = self.num_calls > 0 and not self._parallel
        if self._left_out:
            return
        self._parts.append(CallDelta(self.num_calls, self._new_id(), name, arguments))
        self.num_calls += 1

    def more(self, arguments: str) -> None:
        if self._left_out:
            return
        index = self.num_calls - 1
        last = self._parts[-1] if self._parts else None
        if isinstance(last, CallDelta) and last.index == index:
            self._parts[-1] = CallDelta(index, last.id, last.name, last.arguments + arguments)
        else:
            self._parts.append(CallDelta(index, None, None, arguments))

    def end(self) -> None:
        self._between_calls = True

    def attempt(self) -> None:
        self._between_calls = False

    def spent(self, *, current: bool) -> None:
        if current:
            self.held.clear()
        else:
            del self.held[:-1]
