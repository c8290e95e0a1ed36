"""The compiled kernels of one process: each is compiled, or found on the disk, when it is first asked for.

A kernel is launched when it is asked for; or with others, while launches are gathered; or it is written down while a
step is recorded (`recording`). Knows how kernels are called; not what they do.

Launches that are gathered happen in their order, and have happened once `settle` returns. Their results lie in memory
that is given to the next tensor as soon as one is forgotten, which is the order of launches, too; torch and the host
read and write only what is settled. So tensors are made, and laid out otherwise, by methods here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from llvmlite import ir
from torch import Tensor

from pronk.kernels.cpu.instructions import LANES, Instructions
from pronk.kernels.cpu.recording import Pool, Recorder
from pronk.kernels.jit import emit
from pronk.kernels.jit.compiler import Library, fingerprint, load
from pronk.kernels.jit.emit import F16, F32, I16, I64, Function, Value, vector
from pronk.kernels.jit.threads import Launch, Launches, Team, Work

SOURCES = [Path(emit.__file__), *sorted(Path(__file__).parent.glob("*.py"))]
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""Those of activations, and their names in those of kernels."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Write = Callable[[Function], None]

Rows = tuple[Tensor, int]
"""Those of a tensor from one on."""
Argument = int | Tensor | Rows | None
"""Of a kernel: a number, or the address of a tensor; 0 for None."""


class Code:
    """Kernels for one machine and one team of threads."""

    def __init__(self, team: Team, instructions: Instructions) -> None:
        self.team = team
        self.instructions = instructions
        self.recorder: Recorder | None = None
        """While a step is recorded."""
        self._gathers = False
        self._pending: list[Launch] = []
        self._pool = Pool()
        self._held: list[Tensor] = []
        """Torch's own tensors that pending launches may know the addresses of."""
        self._libraries: dict[str, Library] = {}
        self._addresses: dict[str, int] = {}

    def run(self, name: str, write: Write, arguments: Sequence[Argument], num_items: int, cost: float) -> None:
        """name: unlike any other kernel's, its parameters in it. write: emits what it does to items `first` to `last`,
        for the address of its `arguments`. cost: nanoseconds of an item, roughly."""
        self.run_as_planned(name, write, arguments, Work(num_items, cost))

    def run_as_planned(self, name: str, write: Write, arguments: Sequence[Argument], work: Work) -> None:
        """`run`, with work that a plan writes down, and writes anew before each replay."""
        address = self._addresses.get(name)
        if address is None:
            address = self._compile(name, write)
        numbers = [each if isinstance(each, int) else _address(each) for each in arguments]
        if self.recorder is not None:
            self.recorder.add(Launch(address, numbers, work))
        elif self._gathers:
            self._pending.append(Launch(address, numbers, work))
        else:
            self.team.run(address, numbers, work)

    @contextlib.contextmanager
    def gathering(self) -> Iterator[None]:
        """Launch in the end what is asked for meanwhile. Python stays in the processor's caches so: a launch sweeps it
        out, and what it needs for the next one has to be fetched anew."""
        self._gathers = self.recorder is None
        try:
            yield
            self.settle()
        finally:
            self._gathers = False
            self._pending.clear()
            self._held.clear()

    def settle(self) -> None:
        """Launch what is pending, and wait for it."""
        if self._pending:
            self.team.replay(Launches(self._pending))
            self._pending.clear()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """For kernels to write to."""
        return self._pool.empty(shape, dtype) if self._gathers else torch.empty(shape, dtype=dtype)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """For kernels to write to in part."""
        return self._hold(torch.zeros(shape, dtype=dtype))

    def contiguous(self, x: Tensor) -> Tensor:
        """x, or a copy of it."""
        if x.is_contiguous():
            return x
        self.settle()
        return self._hold(x.contiguous())

    def widened(self, x: Tensor, width: int) -> Tensor:
        """x [n, up to width], or a copy of it with zeros after each row."""
        if x.shape[1] == width:
            return x
        self.settle()
        return self._hold(F.pad(x, (0, width - x.shape[1])))

    def _hold(self, made: Tensor) -> Tensor:
        if self._gathers:
            self._held.append(made)
        return made

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


def _address(argument: Tensor | Rows | None) -> int:
    if argument is None:
        return 0
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    tensor, first = argument
    return tensor.data_ptr() + first * tensor.stride(0) * tensor.element_size()


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
