"""The text of an answer -> content and tool calls, piece by piece, in one machine for streams and whole answers.

Fed the same text it returns the same parts, however the text is cut; neighbouring parts of one kind may be joined:
content by concatenation, deltas of the same call by concatenating their arguments.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeAlias


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
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        """names: of the functions that may be called; parallel: else calls after the first are left out."""
        self.num_calls = 0
        """Calls that were returned so far."""

    def feed(self, text: str) -> list[Part]:
        """Take the next piece; -> what is now certain, in order; often nothing."""
        raise NotImplementedError

    def finish(self) -> list[Part]:
        """No text follows. -> what was held back. `feed` must not be called after it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Call:
    """A whole tool call."""

    id: str
    name: str
    arguments: str
    """JSON as text; broken off where the answer was cut."""


def fold(parts: Collection[Part]) -> tuple[str | None, list[Call]]:
    """-> content (None where there is none) and the calls in order."""
    raise NotImplementedError
