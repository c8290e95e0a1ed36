"""A thread with room on its stack: the grammar library calls itself once for each level of a grammar, and a stack that
overflows ends the process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

JUDGE_STACK = 8 << 20
COMPILER_STACK = 16 << 20
"""Bytes. What a judge had room for, the compiler has room for as well."""

_Result = TypeVar("_Result")
_starting = threading.Lock()


def run_deep(work: Callable[[], _Result], stack: int) -> _Result:
    """Call `work` in a thread with a stack of so many bytes, and wait for it. -> its result; raises what it raises."""
    results: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001  raised again below
            errors.append(error)

    thread = threading.Thread(target=run, name="grammar")
    with _starting:
        before = threading.stack_size(stack)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
