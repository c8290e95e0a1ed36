"""Recording: what a step launches, gathered once, and launched again with a few calls.

Python needs some 40 microseconds for an operation of a step whose weights have just swept the caches, and a step of a
small model has two hundred. A replay makes the same launches with the same numbers, so it cannot differ from them.

What is recorded: launches of kernels, in their order, and between them what is not a kernel: torch's operations, which
are done again and their results put where they were, and plans. Nothing is launched meanwhile: what kernels would have
written is not there, and must not decide what happens next. Tensors that come into being lie in memory that all
recordings share; so a replay's results last until the next replay.

Knows torch's operations; not what kernels do.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pronk.kernels.jit.threads import Launch, Launches, Team

Result = TypeVar("Result")
Call = Callable[[], object]

SMALLEST = 128
"""Bytes: a line of the cache, and the next one, which is fetched with it."""
NEW = frozenset(
    {
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.new_empty.default,
    }
)
"""Operations that give memory with nothing in it."""


@dataclass(frozen=True)
class Recording:
    """What was written down, to be called again."""

    calls: Sequence[Call]
    constants: Sequence[Tensor]
    """Held: launches know their addresses."""

    def __call__(self) -> None:
        for call in self.calls:
            call()


class Recorder:
    """Writes down."""

    def __init__(self) -> None:
        self._parts: list[Launch | Call] = []
        self._constants: list[Tensor] = []

    def add(self, part: Launch | Call) -> None:
        self._parts.append(part)

    def keep(self, constant: Tensor) -> None:
        """constant: numbers that the host wrote."""
        self._constants.append(constant)

    def recording(self, team: Team) -> Recording:
        """Neighbouring launches become one call."""
        found: list[Call] = []
        launches: list[Launch] = []

        def close() -> None:
            if launches:
                found.append(functools.partial(team.replay, Launches(launches)))
                launches.clear()

        for part in self._parts:
            if isinstance(part, Launch):
                launches.append(part)
            else:
                close()
                found.append(part)
        close()
        return Recording(found, self._constants)


class Pool:
    """Memory that the tensors of all recordings share. A piece that no tensor of a recording has any more is given to
    the next: when a replay comes there, it is done with it as well."""

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """-> a tensor with anything in it."""
        count = torch.Size(shape).numel()
        if not count:
            return torch.empty(shape, dtype=dtype)
        num_bytes = count * dtype.itemsize
        # Few sizes, so that a piece suits many tensors.
        size = max(SMALLEST, 1 << (num_bytes - 1).bit_length())
        pieces = self._free.setdefault(size, [])
        piece = pieces.pop() if pieces else torch.zeros(size, dtype=torch.uint8)
        # A view of the piece would not say when it and its own views are gone; a tensor on foreign memory does.
        borrowed = (ctypes.c_char * num_bytes).from_address(piece.data_ptr())
        weakref.finalize(borrowed, pieces.append, piece).atexit = False
        return torch.frombuffer(borrowed, dtype=dtype).view(shape)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes torch's operations down while they are done."""

    def __init__(self, recorder: Recorder, pool: Pool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder
        self._pool = pool

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch's compiler, which would have to be kept off this mode, is not imported: that takes it a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        do = functools.partial(func, *args, **(kwargs or {}))
        result = do()
        if func in NEW:
            return self._pool.empty(result.shape, result.dtype)
        if not isinstance(result, Tensor):
            raise TypeError(f"{func} brings a step's numbers to the host, where no recording can follow them")
        if func is torch.ops.aten.lift_fresh.default:
            self._recorder.keep(result)
        elif func._schema.is_mutable:
            self._recorder.add(do)
        elif not _is_view(result, args):
            self._recorder.add(functools.partial(_redo, do, result))
        return result


def _redo(do: Callable[[], Tensor], result: Tensor) -> None:
    result.copy_(do())


def _is_view(result: Tensor, args: Sequence[Any]) -> bool:
    """Some operations (`contiguous`, `to`) are one only if they need not copy: what they are declared to be says
    nothing."""
    places = [each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)]
    return result.untyped_storage().data_ptr() in places


def record(
    run: Callable[[], Result], team: Team, pool: Pool, using: Callable[[Recorder | None], None]
) -> tuple[Recording, Result]:
    """-> what does again all that `run` would do, and run's result, into whose tensors each replay writes.

    using: is told who writes launches down, and in the end that nobody does. Raises TypeError where run looks at
    numbers that a step computes.
    """
    recorder = Recorder()
    with ExitStack() as stack:
        using(recorder)
        stack.callback(using, None)
        with _Operations(recorder, pool):
            result = run()
    return recorder.recording(team), result
