"""The kernels that lay a weight out for `products`, rows becoming vectors of a unit of each; and find a row again."""

from __future__ import annotations

from pronk.kernels.cpu.code import Write, arguments_of
from pronk.kernels.cpu.instructions import LANES, transposed
from pronk.kernels.jit.emit import I8, I32, I64, Function, Value, vector

ROWS_OF = ("ids", "data", "out", "num_units")
WORDS = vector(I32, LANES)
INTERLEAVE = ("rows", "row_bytes", "num_rows", "row_units", "out", "num_units", "sums")


def write_interleave(*, sums: bool) -> Write:
    """Block `item` of LANES rows: rows [num_rows] of row_units units each, row_bytes apart -> [num_units, LANES] units.
    sums: also the sums of int8 rows, int32 [num_rows, padded]. What no row has is left as it is."""

    def write(f: Function) -> None:
        a = arguments_of(f, INTERLEAVE)
        with f.loop(f.argument("first"), f.argument("last")) as block:
            out = a["out"] + block * a["num_units"] * (4 * LANES)
            rows = a["rows"] + block * LANES * a["row_bytes"]
            count = f.smaller(a["num_rows"] - block * LANES, LANES)
            # A square of LANES rows and units at a time, in registers, as far as there are such.
            square = f.select(count >= LANES, a["row_units"] // LANES * LANES, 0)
            with f.loop(0, square, LANES) as unit:
                lines = [f.load(rows + a["row_bytes"] * lane + unit * 4, WORDS) for lane in range(LANES)]
                for number, line in enumerate(transposed(lines)):
                    f.store(line, out + (unit + number) * (4 * LANES))
            with f.loop(0, count) as lane, f.loop(square, a["row_units"]) as unit:
                f.store(f.load(rows + lane * a["row_bytes"] + unit * 4, I32), out + (unit * LANES + lane) * 4)
            if sums:
                _add_up(f, out, a["num_units"], a["sums"] + block * (4 * LANES))

    return write


def write_rows_of(f: Function) -> None:
    """Rows again, by their numbers: ids int64 [T] -> [T, num_units] units."""
    a = arguments_of(f, ROWS_OF)
    with f.loop(f.argument("first"), f.argument("last")) as token:
        row = f.load(a["ids"] + token * 8, I64)
        place = a["data"] + row // LANES * a["num_units"] * (4 * LANES) + row % LANES * 4
        with f.loop(0, a["num_units"]) as unit:
            f.store(f.load(place + unit * (4 * LANES), I32), a["out"] + (token * a["num_units"] + unit) * 4)


def _add_up(f: Function, block: Value, num_units: Value, place: Value) -> None:
    total = f.variable(f.value(0, vector(I32, LANES)))
    with f.loop(0, num_units) as unit:
        wide = f.load(block + unit * (4 * LANES), vector(I8, 4 * LANES)).to(vector(I32, 4 * LANES))
        for number in range(4):
            total.set(total.get() + wide.lanes(range(number, 4 * LANES, 4)))
    f.store(total.get(), place)
