"""tools + tool_choice -> the engine's Grammar under which a small model cannot miss.

Pure functions of what the request says. Knows the notation of the grammar library (Lark with `%json`), and nothing of
how it is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pronk.engine.request import Grammar

if TYPE_CHECKING:
    from pronk.server.chat.tools import Choice, Function


def call_grammar(
    functions: Sequence[Function],
    choice: Choice,
    *,
    parallel: bool,
    response_format: Grammar | None = None,
) -> Grammar | None:
    """functions: those that may be called."""
    raise NotImplementedError
