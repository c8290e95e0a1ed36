"""The kernels that go through each row of a step by itself: norms, SiLU · mul, rotation and cache, rounding to int8.

An item is a row (a token). Sums go by lanes, each in ascending order, which a tree joins; their shape depends on the
width alone (promise 1). A row that is not finite makes every result of its own not finite, and no other's.
"""

from __future__ import annotations

from collections.abc import Callable

from pronk.kernels.cpu.code import ITEM_BYTES, Write, arguments_of, in_lanes, load_floats, rounded, store_floats
from pronk.kernels.cpu.instructions import LANES
from pronk.kernels.jit.emit import F32, I8, I32, I64, Function, Value, vector

LARGEST = {1: 127.0, 2: 16319.0}
"""By the planes that a number is spread over: 127 · 128 + 63, since the second plane holds -64 to 63."""
SMALLEST = 1.1754943508222875e-38
"""Normal number of float32."""

RMS_NORM = ("x", "residual", "weight", "out", "total", "width", "eps")
SILU_MUL = ("gate_up", "out", "width")
ROPE = ("qkv", "positions", "cos_sin", "slots", "keys", "values", "out", "num_heads", "num_kv_heads", "head_dim",
        "block_size")  # fmt: skip
QUANTIZE = ("x", "out", "scales", "width", "padded_width")
FIND_LARGEST = ("x", "ids", "values", "width")
WIDEN = ("x", "out", "width", "padded_width")


def _each_row(f: Function, body: Callable[[Value], None]) -> None:
    with f.loop(f.argument("first"), f.argument("last")) as row:
        body(row)


def write_rms_norm(dtype: str, *, adds: bool) -> Write:
    """adds: x and the residual are added, rounded and stored, and then normed. eps: its bits as float32."""
    size = ITEM_BYTES[dtype]

    def write(f: Function) -> None:
        a = arguments_of(f, RMS_NORM)

        def norm(row: Value) -> None:
            start = row * a["width"] * size
            source = a["total"] if adds else a["x"]
            sums = f.variable(f.value(0.0, vector(F32, LANES)))
            rest = f.variable(f.value(0.0, F32))

            def square(place: Value, lanes: int) -> None:
                at = start + place * size
                x = load_floats(f, dtype, a["x"] + at, lanes)
                if adds:
                    x = rounded(f, dtype, x + load_floats(f, dtype, a["residual"] + at, lanes))
                    store_floats(f, dtype, x, a["total"] + at)
                into = sums if lanes > 1 else rest
                into.set(into.get() + x * x)

            in_lanes(f, a["width"], square)
            total = f.tree(sums.get(), lambda one, two: one + two) + rest.get()
            eps = a["eps"].to(I32).bits(F32)
            scale = 1.0 / f.square_root(total / a["width"].to(F32) + eps)

            def scaled(place: Value, lanes: int) -> None:
                at = start + place * size
                factor = scale.broadcast(lanes) if lanes > 1 else scale
                normed = rounded(f, dtype, load_floats(f, dtype, source + at, lanes) * factor)
                weight = load_floats(f, dtype, a["weight"] + place * size, lanes)
                store_floats(f, dtype, normed * weight, a["out"] + at)

            in_lanes(f, a["width"], scaled)

        _each_row(f, norm)

    return write


def write_silu_mul(dtype: str) -> Write:
    """gate · up / (1 + e^-gate). width: F."""
    size = ITEM_BYTES[dtype]

    def write(f: Function) -> None:
        a = arguments_of(f, SILU_MUL)

        def row_of(row: Value) -> None:
            start = row * a["width"] * (2 * size)

            def multiply(place: Value, lanes: int) -> None:
                gate = load_floats(f, dtype, a["gate_up"] + start + place * size, lanes)
                up = load_floats(f, dtype, a["gate_up"] + start + (a["width"] + place) * size, lanes)
                # e^-|gate| never overflows: 1 / (1 + e^-g) is e^g / (1 + e^g) as well.
                power = f.exponential(f.value(0.0, gate.type) - f.absolute(gate))
                share = f.select(gate >= 0.0, f.value(1.0, gate.type), power) / (power + 1.0)
                store_floats(f, dtype, gate * share * up, a["out"] + (row * a["width"] + place) * size)

            in_lanes(f, a["width"], multiply)

        _each_row(f, row_of)

    return write


def write_rope_and_cache(dtype: str) -> Write:
    """See `Kernels.rope_and_cache`."""
    size = ITEM_BYTES[dtype]

    def write(f: Function) -> None:
        a = arguments_of(f, ROPE)
        head_dim, num_heads, num_kv_heads = a["head_dim"], a["num_heads"], a["num_kv_heads"]
        half, head_bytes = head_dim // 2, head_dim * size

        def turn(source: Value, target: Value, angles: Value) -> None:
            def pair(place: Value, lanes: int) -> None:
                first = load_floats(f, dtype, source + place * size, lanes)
                second = load_floats(f, dtype, source + (half + place) * size, lanes)
                cos = load_floats(f, "float32", angles + place * 4, lanes)
                sin = load_floats(f, "float32", angles + (half + place) * 4, lanes)
                store_floats(f, dtype, first * cos - second * sin, target + place * size)
                store_floats(f, dtype, second * cos + first * sin, target + (half + place) * size)

            in_lanes(f, half, pair)

        def copy(source: Value, target: Value) -> None:
            def some(place: Value, lanes: int) -> None:
                store_floats(f, dtype, load_floats(f, dtype, source + place * size, lanes), target + place * size)

            in_lanes(f, head_dim, some)

        def token(row: Value) -> None:
            own = a["qkv"] + row * (num_heads + num_kv_heads * 2) * head_bytes
            angles = a["cos_sin"] + f.load(a["positions"] + row * 8, I64) * head_dim * 4
            with f.loop(0, num_heads) as head:
                turn(own + head * head_bytes, a["out"] + (row * num_heads + head) * head_bytes, angles)
            slot = f.load(a["slots"] + row * 8, I64)
            with f.when(slot >= 0), f.loop(0, num_kv_heads) as head:
                block, place = slot // a["block_size"], slot % a["block_size"]
                target = ((block * num_kv_heads + head) * a["block_size"] + place) * head_bytes
                turn(own + (num_heads + head) * head_bytes, a["keys"] + target, angles)
                copy(own + (num_heads + num_kv_heads + head) * head_bytes, a["values"] + target)

        _each_row(f, token)

    return write


def write_quantize(dtype: str, planes: int) -> Write:
    """x [T, width] -> int8 [T, planes, padded_width] and scales float32 [T]: x is about scale · plane, or scale ·
    (128 · first plane + second plane), and its largest magnitude has the largest number. Nobody writes to places past
    the width. The scale of a row that is not finite is not."""
    size = ITEM_BYTES[dtype]

    def write(f: Function) -> None:
        a = arguments_of(f, QUANTIZE)

        def quantize(row: Value) -> None:
            start = row * a["width"] * size
            largest = f.variable(f.value(0.0, vector(F32, LANES)))
            last = f.variable(f.value(0.0, F32))

            def measure(place: Value, lanes: int) -> None:
                into = largest if lanes > 1 else last
                x = f.absolute(load_floats(f, dtype, a["x"] + start + place * size, lanes))
                into.set(f.maximum(into.get(), x))

            in_lanes(f, a["width"], measure)
            most = f.maximum(f.tree(largest.get(), f.maximum), last.get())
            # A row of zeros has any scale; one that is not zero keeps the quotient finite.
            scale = f.maximum(most / LARGEST[planes], f.value(SMALLEST, F32))
            f.store(scale, a["scales"] + row * 4)

            def round_off(place: Value, lanes: int) -> None:
                x = load_floats(f, dtype, a["x"] + start + place * size, lanes)
                ints, bytes = (vector(I32, lanes), vector(I8, lanes)) if lanes > 1 else (I32, I8)
                nearest = f.nearest(x / (scale.broadcast(lanes) if lanes > 1 else scale))
                number = nearest.to(ints)
                target = a["out"] + row * a["padded_width"] * planes + place
                if planes == 2:
                    # The shift brings zeros in, and the sign is among the bits that then are left out.
                    upper = (number + 64) >> 7
                    f.store((number - (upper << 7)).to(bytes), target + a["padded_width"])
                    number = upper
                f.store(number.to(bytes), target)

            in_lanes(f, a["width"], round_off)

        _each_row(f, quantize)

    return write


def write_largest(dtype: str) -> Write:
    """x [T, width] -> the lowest place of each row's largest number, int64 [T], -1 where one is not finite; and that
    number, float32 [T]."""
    size = ITEM_BYTES[dtype]

    def write(f: Function) -> None:
        a = arguments_of(f, FIND_LARGEST)
        values, places = f.stack(4 * LANES), f.stack(8 * LANES)

        def find(row: Value) -> None:
            start = a["x"] + row * a["width"] * size
            best = f.variable(f.value(float("-inf"), vector(F32, LANES)))
            where = f.variable(f.value(0, vector(I64, LANES)))
            # x - x is 0, or NaN for what is not finite.
            faults = f.variable(f.value(0.0, vector(F32, LANES)))
            order = f.numbers(vector(I64, LANES))
            full = a["width"] // LANES * LANES
            with f.loop(0, full, LANES) as place:
                x = load_floats(f, dtype, start + place * size, LANES)
                larger = x > best.get()
                where.set(f.select(larger, order + place.broadcast(LANES), where.get()))
                best.set(f.select(larger, x, best.get()))
                faults.set(faults.get() + (x - x))
            f.store(best.get(), values)
            f.store(where.get(), places)
            value, at = f.variable(f.value(float("-inf"), F32)), f.variable(0)
            fault = f.variable(f.tree(faults.get(), lambda one, two: one + two))

            def challenge(x: Value, place: Value) -> None:
                wins = (x > value.get()) | (x.equals(value.get()) & (place < at.get()))
                at.set(f.select(wins, place, at.get()))
                value.set(f.select(wins, x, value.get()))

            with f.loop(0, LANES) as lane:
                challenge(f.load(values + lane * 4, F32), f.load(places + lane * 8, I64))
            with f.loop(full, a["width"]) as place:
                x = load_floats(f, dtype, start + place * size, 1)
                fault.set(fault.get() + (x - x))
                challenge(x, place)
            is_finite = fault.get().equals(0.0)
            f.store(f.select(is_finite, at.get(), f.value(-1)), a["ids"] + row * 8)
            # Comparisons pass over a NaN. There is one, or an infinity, in hardly any row.
            with f.when(f.select(is_finite, f.value(0), 1).equals(1)), f.loop(0, a["width"]) as place:
                value.set(f.maximum(value.get(), load_floats(f, dtype, start + place * size, 1)))
            f.store(value.get(), a["values"] + row * 4)

        _each_row(f, find)

    return write


def write_widen(dtype: str) -> Write:
    """x [T, width] -> float32 [T, padded_width]. Places past the width are written by nobody."""
    size = ITEM_BYTES[dtype]

    def write(f: Function) -> None:
        a = arguments_of(f, WIDEN)

        def widen(row: Value) -> None:
            def some(place: Value, lanes: int) -> None:
                x = load_floats(f, dtype, a["x"] + (row * a["width"] + place) * size, lanes)
                f.store(x, a["out"] + (row * a["padded_width"] + place) * 4)

            in_lanes(f, a["width"], some)

        _each_row(f, widen)

    return write
