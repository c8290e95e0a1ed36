"""The kernels of linear layers: x [T, K] times the transpose of a weight [N, K].

Layout. Outputs lie in blocks of LANES, and inputs in units of four bytes: a unit is one float32, two bfloat16 or
float16, or four int8. [N / LANES][K / unit][LANES][unit]: one vector holds a unit of every output of a block, and to
read a block is to read memory in order, whatever the instructions are. AMX's tiles are 16 such vectors.

int8. A weight's numbers have 8 bits, and those of x 15: a row becomes two of int8, of which one counts 128 times as
much as the other. The largest number of a row sets its scale, and in a Llama's activations it is often dozens of times
what the others are: with 8 bits little would be left of them. Few streams wait for the weights anyway.

Numbers, promise 1. An output is a lane, and its products are added in the order of the inputs, by one `fma` each; in
integers the order is of no matter. On tiles the instruction has an order of its own, the same for each row of x. None
depends on T, or on the other rows.

Speed. Few rows: a weight is read once, and its time is the memory's. Many rows: a weight's group of blocks stays in the
L2 cache while all rows pass by it, some at a time, whose sums fill the registers. The memory is asked AHEAD of time:
without that, several streams of reads, and reads by tiles, leave it idle for a fifth to a half of the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llvmlite import ir

from pronk.kernels.cpu.code import ITEM_BYTES, Write, arguments_of, store_floats
from pronk.kernels.cpu.instructions import (
    LANES,
    TILE_BYTES,
    TILE_ROWS,
    Dot,
    Instructions,
    configure_tiles,
    dot_product,
    is_offset,
    load_tile,
    multiply_tiles,
    release_tiles,
    store_tile,
    zero_tile,
)
from pronk.kernels.jit.emit import F16, F32, I8, I32, Function, Value, Variable, vector

Kind = Literal["float32", "bfloat16", "float16", "int8"]
"""Of a weight's numbers."""

PLANES = 2
"""Rows of int8 for each row of x."""
PLANE_FACTOR = 128.0
"""What the first of them counts more than the second."""
UNIT = {"float32": 1, "bfloat16": 2, "float16": 2, "int8": 4}
"""Inputs in four bytes."""
AHEAD = 4096
"""Bytes."""
GROUP = 2
"""Blocks that are multiplied together: an item of the work."""
ARGUMENTS = ("weights", "x", "out", "num_rows", "num_units", "out_stride", "weight_scales", "weight_sums", "x_scales",
             "config", "last_config")  # fmt: skip
"""Addresses; counts; bytes from one row of `out` to the next. x is float32 [rows, inputs], or for tiles bfloat16; for
int8 weights it is int8 [rows, 2, inputs], as `rows.write_quantize` makes it, with scales. num_rows counts `out`'s.
last_config: of the tiles of the last rows, fewer than 2 * TILE_ROWS of x."""


@dataclass(frozen=True)
class Job:
    """The arguments as values, and the group that is being multiplied."""

    f: Function
    kind: Kind
    output: str
    arguments: dict[str, Value]
    group: Value

    def __getattr__(self, name: str) -> Value:
        """An argument."""
        return self.arguments[name]

    @property
    def block_bytes(self) -> Value:
        return self.num_units * (4 * LANES)

    def block(self, number: Value | int) -> Value:
        """The address of one of the group's blocks."""
        return self.weights + (self.group * GROUP + number) * self.block_bytes

    def outputs(self, array: str, number: Value | int, type: ir.Type) -> Value:
        """What an array of four bytes an output holds for a block."""
        return self.f.load(self.arguments[array] + (self.group * GROUP + number) * (4 * LANES), type)

    def store(self, values: Value, row: Value, number: Value | int) -> None:
        """values float32 [LANES], rounded to the output's dtype."""
        place = self.out + row * self.out_stride + (self.group * GROUP + number) * (LANES * ITEM_BYTES[self.output])
        store_floats(self.f, self.output, values, place)


def write_product(instructions: Instructions, kind: Kind, output: str) -> Write:
    """kind: of the weight's numbers; output: the dtype that results are rounded to."""

    def write(f: Function) -> None:
        arguments = arguments_of(f, ARGUMENTS)
        tiles = on_tiles(instructions, kind)
        if tiles:
            scratch = f.stack(4 * TILE_ROWS * TILE_BYTES)
        with f.loop(f.argument("first"), f.argument("last")) as group:
            job = Job(f, kind, output, arguments, group)
            if tiles:
                _multiply_on_tiles(job, scratch)
            else:
                _multiply_in_lanes(job, instructions)
        if tiles:
            release_tiles(f)

    return write


def on_tiles(instructions: Instructions, kind: Kind) -> bool:
    return instructions.tiles and kind in ("bfloat16", "int8")


# In lanes


def _multiply_in_lanes(job: Job, instructions: Instructions) -> None:
    """As many rows and blocks at a time as there are registers for their sums: 24 of 32; or 8 or 10 of 16, where a
    vector takes two. What rows are left go by in smaller tiles."""
    f = job.f
    together = range(GROUP) if instructions.wide else (0,)
    if job.kind == "int8":
        sizes: tuple[int, ...] = (6, 4, 2, 1) if instructions.wide else (2, 1)
    else:
        sizes = (12, 8, 4, 2, 1) if instructions.wide else (5, 4, 3, 2, 1)
    with f.loop(0, GROUP, len(together)) as first:
        blocks = [first + n for n in together]
        full = job.num_rows // sizes[0] * sizes[0]
        with f.loop(0, full, sizes[0]) as row:
            _tile(job, instructions, row, sizes[0], blocks)
        done = full
        for count in sizes[1:]:
            rest = (job.num_rows - done) // count
            with f.when(rest > 0):
                _tile(job, instructions, done, count, blocks)
            done = done + rest * count


def _tile(job: Job, instructions: Instructions, row: Value, count: int, numbers: list[Value]) -> None:
    """`count` rows of x from `row` on, by these blocks of the group."""
    if job.kind == "int8":
        _tile_of_integers(job, instructions.dot, row, count, numbers)
    else:
        _tile_of_floats(job, row, count, numbers)


def _tile_of_floats(job: Job, row: Value, count: int, numbers: list[Value]) -> None:
    f, unit = job.f, UNIT[job.kind]
    zero = f.value(0.0, vector(F32, LANES))
    sums = [[Variable(f, zero) for _ in range(count)] for _ in numbers]
    row_bytes = job.num_units * (4 * unit)
    rows = [job.x + (row + m) * row_bytes for m in range(count)]
    blocks = [job.block(number) for number in numbers]
    with f.loop(0, job.num_units) as k:
        weights = [_numbers(f, job.kind, block + k * (4 * LANES)) for block in blocks]
        for i in range(unit):
            for m in range(count):
                x = f.load(rows[m] + k * (4 * unit) + 4 * i, F32).broadcast(LANES)
                for n in range(len(blocks)):
                    sums[n][m].set(f.fma(weights[n][i], x, sums[n][m].get()))
    for n, number in enumerate(numbers):
        for m in range(count):
            job.store(sums[n][m].get(), row + m, number)


def _numbers(f: Function, kind: Kind, address: Value) -> list[Value]:
    """-> a vector for each number of the unit: float32 [LANES]."""
    f.prefetch(address + AHEAD)
    floats = vector(F32, LANES)
    if kind == "float32":
        return [f.load(address, floats)]
    if kind == "bfloat16":
        pairs = f.load(address, vector(I32, LANES))
        return [(pairs << 16).bits(floats), (pairs & -65536).bits(floats)]
    halves = f.load(address, vector(F16, 2 * LANES))
    return [halves.lanes(range(i, 2 * LANES, 2)).to(floats) for i in range(2)]


def _tile_of_integers(job: Job, dot: Dot, row: Value, count: int, numbers: list[Value]) -> None:
    f = job.f
    zero = f.value(0, vector(I32, LANES))
    sums = [[Variable(f, zero) for _ in range(PLANES * count)] for _ in numbers]
    rows = [job.x + (row * PLANES + m) * job.num_units * 4 for m in range(PLANES * count)]
    blocks = [job.block(number) for number in numbers]
    with f.loop(0, job.num_units) as k:
        weights = []
        for block in blocks:
            address = block + k * (4 * LANES)
            f.prefetch(address + AHEAD)
            weights.append(f.load(address, vector(I8, 4 * LANES)))
        for m, address in enumerate(rows):
            x = f.load(address + k * 4, I32)
            if is_offset(dot):
                x = x ^ -0x7F7F7F80
            x = x.broadcast(LANES).bits(vector(I8, 4 * LANES))
            for n in range(len(blocks)):
                sums[n][m].set(dot_product(f, dot, sums[n][m].get(), weights[n], x))
    for n, number in enumerate(numbers):
        scales = job.outputs("weight_scales", number, vector(F32, LANES))
        totals = [each.get() for each in sums[n]]
        if is_offset(dot):
            totals = [total - (job.outputs("weight_sums", number, vector(I32, LANES)) << 7) for total in totals]
        for m in range(count):
            job.store(_scaled(job, totals[PLANES * m], totals[PLANES * m + 1], scales, row + m), row + m, number)


def _scaled(job: Job, upper: Value, lower: Value, scales: Value, row: Value) -> Value:
    """The sums of both planes -> what they stand for: float32 [LANES]. Each is converted, the two are added, the sum is
    multiplied by the weight's scale and then by x's: always so, with whatever instructions the sums were made."""
    floats = vector(F32, LANES)
    x_scale = job.f.load(job.x_scales + row * 4, F32).broadcast(LANES)
    return (upper.to(floats) * PLANE_FACTOR + lower.to(floats)) * scales * x_scale


# On tiles: 0 to 3 hold sums of (rows, block), 4 and 5 rows, 6 and 7 blocks


def _multiply_on_tiles(job: Job, scratch: Value) -> None:
    """Rows of x two tiles at a time, and then those that are left, in one tile or two; the group's weights are in the
    cache meanwhile."""
    f = job.f
    num_rows = job.num_rows * (PLANES if job.kind == "int8" else 1)
    full = num_rows // (2 * TILE_ROWS) * (2 * TILE_ROWS)
    left = num_rows - full
    with f.when(full > 0):
        configure_tiles(f, job.config)
        with f.loop(0, full, 2 * TILE_ROWS) as row:
            _tiles(job, scratch, row, [f.value(TILE_ROWS), f.value(TILE_ROWS)])
    with f.when(left > 0):
        configure_tiles(f, job.last_config)
        with f.when(left > TILE_ROWS):
            _tiles(job, scratch, full, [f.value(TILE_ROWS), left - TILE_ROWS])
        with f.when(left <= TILE_ROWS):
            _tiles(job, scratch, full, [left])


def _tiles(job: Job, scratch: Value, row: Value, tile_rows: list[Value]) -> None:
    """Rows from `row` on: so many in each tile."""
    f = job.f
    row_bytes = job.num_units * 4
    count = len(tile_rows)
    rows = [job.x + (row + m * TILE_ROWS) * row_bytes for m in range(count)]
    blocks = [job.block(n) for n in range(GROUP)]
    for tile in range(2 * count):
        zero_tile(f, tile)
    with f.loop(0, job.num_units, TILE_ROWS) as k:
        for m, address in enumerate(rows):
            load_tile(f, 4 + m, address + k * 4, row_bytes)
        for n, block in enumerate(blocks):
            place = block + k * TILE_BYTES
            for line in range(TILE_ROWS):
                f.prefetch(place + (AHEAD + line * TILE_BYTES))
            load_tile(f, 6 + n, place, f.value(TILE_BYTES))
            for m in range(count):
                multiply_tiles(f, 2 * m + n, 4 + m, 6 + n, integers=job.kind == "int8")
    for m, num_rows in enumerate(tile_rows):
        for n in range(GROUP):
            tile = 2 * m + n
            place = scratch + tile * TILE_ROWS * TILE_BYTES
            store_tile(f, tile, place, f.value(TILE_BYTES))
            first = row + m * TILE_ROWS
            if job.kind == "bfloat16":
                with f.loop(0, num_rows) as i:
                    job.store(f.load(place + i * TILE_BYTES, vector(F32, LANES)), first + i, n)
                continue
            scales = job.outputs("weight_scales", n, vector(F32, LANES))
            with f.loop(0, num_rows, PLANES) as i:
                totals = [f.load(place + (i + plane) * TILE_BYTES, vector(I32, LANES)) for plane in range(PLANES)]
                own = (first + i) // PLANES
                job.store(_scaled(job, totals[0], totals[1], scales, own), own, n)
