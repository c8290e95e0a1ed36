"""The compiled kernels of one process: each is compiled, or found on the disk, when it is first asked for.

A kernel is launched when it is asked for, or written down while a step is recorded (`recording`). Knows how kernels are
called; not what they do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from llvmlite import ir
from torch import Tensor

from pronk.kernels.cpu.instructions import LANES, Instructions
from pronk.kernels.cpu.recording import Recorder
from pronk.kernels.jit import emit
from pronk.kernels.jit.compiler import Library, fingerprint, load
from pronk.kernels.jit.emit import F16, F32, I16, I64, Function, Value, vector
from pronk.kernels.jit.threads import Launch, Team, Work

SOURCES = [Path(emit.__file__), *sorted(Path(__file__).parent.glob("*.py"))]
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""Those of activations, and their names in those of kernels."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Write = Callable[[Function], None]


class Code:
    """Kernels for one machine and one team of threads."""

    def __init__(self, team: Team, instructions: Instructions) -> None:
        self.team = team
        self.instructions = instructions
        self.recorder: Recorder | None = None
        """While a step is recorded."""
        self._libraries: dict[str, Library] = {}
        self._addresses: dict[str, int] = {}

    def run(self, name: str, write: Write, arguments: Sequence[int], num_items: int, cost: float) -> None:
        """name: unlike any other kernel's, its parameters in it. write: emits what it does to items `first` to `last`,
        for the address of its `arguments`. cost: nanoseconds of an item, roughly."""
        self.run_as_planned(name, write, arguments, Work(num_items, cost))

    def run_as_planned(self, name: str, write: Write, arguments: Sequence[int], work: Work) -> None:
        """`run`, with work that a plan writes down, and writes anew before each replay."""
        address = self._addresses.get(name)
        if address is None:
            address = self._compile(name, write)
        if self.recorder is None:
            self.team.run(address, arguments, work)
        else:
            self.recorder.add(Launch(address, arguments, work))

    def before_replays(self, write: Callable[[], None]) -> None:
        """write: has been called; it writes down what there is to do for what follows, anew for each replay."""
        if self.recorder is not None:
            self.recorder.add(write)

    def fingerprint(self) -> str:
        """Of the kernels' sources, and of all else that their code depends on."""
        return fingerprint(SOURCES, str(self.instructions))

    def _compile(self, name: str, write: Write) -> int:
        def module() -> ir.Module:
            found = ir.Module(name)
            with Function(found, name, ["arguments", "first", "last"]) as f:
                write(f)
            return found

        library = load(name, SOURCES, str(self.instructions), module)
        self._libraries[name] = library
        self._addresses[name] = library.address(name)
        return self._addresses[name]


def arguments_of(f: Function, names: Sequence[str]) -> dict[str, Value]:
    """The int64 arguments of a kernel, by names."""
    place = f.argument("arguments")
    return {name: f.load(place + 8 * number, I64) for number, name in enumerate(names)}


def load_floats(f: Function, dtype: str, address: Value, lanes: int) -> Value:
    """-> float32: a vector, or for one lane a number."""

    def shaped(type: ir.Type) -> ir.Type:
        return vector(type, lanes) if lanes > 1 else type

    if dtype == "float32":
        return f.load(address, shaped(F32))
    if dtype == "float16":
        return f.load(address, shaped(F16)).to(shaped(F32))
    return f.widen_bfloat16(f.load(address, shaped(I16)))


def rounded(f: Function, dtype: str, value: Value) -> Value:
    """float32 -> float32, rounded to the dtype."""
    if dtype == "float32":
        return value
    if dtype == "float16":
        shape = value.type
        half = vector(F16, shape.count) if isinstance(shape, ir.VectorType) else F16
        return value.to(half).to(shape)
    return f.widen_bfloat16(f.narrow_to_bfloat16(value))


def store_floats(f: Function, dtype: str, value: Value, address: Value) -> None:
    """value float32; rounded to the dtype."""
    if dtype == "bfloat16":
        value = f.narrow_to_bfloat16(value)
    elif dtype == "float16":
        value = value.to(vector(F16, value.type.count) if isinstance(value.type, ir.VectorType) else F16)
    f.store(value, address)


def in_lanes(f: Function, count: Value, body: Callable[[Value, int], None]) -> None:
    """body(place, lanes) for all of `count` numbers: LANES at a time, and then those that are left one by one."""
    full = count // LANES * LANES
    for start, stop, lanes in ((f.value(0), full, LANES), (full, count, 1)):
        with f.loop(start, stop, lanes) as place:
            body(place, lanes)


def contiguous(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.contiguous()
