"""The kernels that choose a token: a few looks at a row of logits, no sort, no memory of the vocabulary's size.

`SamplingBatch` says what they compute, and `kernels.sampling` does it plainly. An item is a row.

1. The largest of all, and whether all are numbers. A greedy row needs no more.
2. The race of all tokens: the best weight / noise. Without filters its winner is chosen.
3. With filters: tokens that stay are a beginning of the order "more likely first, of equals the lower id first". So the
   winner of the race, if it stays, is the winner among those that stay; and if it does not, nobody stays who is not
   before it. A look tells how many are before it and what they weigh, which says whether it stays; and it finds the
   best of those before it, the next to be asked. Mostly one look is enough; each more halves what is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pronk.kernels.cpu.code import ITEM_BYTES, Write, arguments_of, in_lanes, load_floats
from pronk.kernels.cpu.instructions import LANES
from pronk.kernels.interface import NONE_ALLOWED, NOT_FINITE
from pronk.kernels.jit.emit import F32, F64, I32, I64, Function, Value, Variable, vector

CHOOSE = ("x", "stride", "temperature", "top_k", "top_p", "min_p", "noise_keys", "out", "width")
"""x [R, V], stride bytes from row to row; the next of R numbers each, as in `SamplingBatch`; out int64 [R]."""
DIGITS = (21, 10, 0)
"""Where the digits of a float32's bits begin: 11, 11 and 10 of them."""
NUM_DIGITS = 1 << 11


def shaped(type: object, lanes: int) -> object:
    return vector(type, lanes) if lanes > 1 else type


@dataclass(frozen=True)
class Best:
    """The best so far in each lane, and in those that fill no vector: the first of equals, since a later one must be
    better to take its place."""

    f: Function
    value: Variable
    place: Variable
    last_value: Variable
    last_place: Variable

    @classmethod
    def start(cls, f: Function, value: float) -> Best:
        floats, places = vector(F32, LANES), vector(I32, LANES)
        none = (1 << 31) - 1
        return cls(
            f, f.variable(value, floats), f.variable(none, places), f.variable(value, F32), f.variable(none, I32)
        )

    def offer(self, values: Value, places: Value, lanes: int) -> None:
        value, place = (self.value, self.place) if lanes > 1 else (self.last_value, self.last_place)
        better = values > value.get()
        place.set(self.f.select(better, places, place.get()))
        value.set(self.f.select(better, values, value.get()))

    def found(self) -> tuple[Value, Value]:
        """-> the best, and the lowest place that has it: float32 and int32."""

        def better(one: tuple[Value, Value], two: tuple[Value, Value]) -> tuple[Value, Value]:
            wins = (two[0] > one[0]) | (two[0].equals(one[0]) & (two[1] < one[1]))
            return self.f.select(wins, two[0], one[0]), self.f.select(wins, two[1], one[1])

        value, place = self.value.get(), self.place.get()
        while value.type.count > 1:
            value, place = better((value.half(0), place.half(0)), (value.half(1), place.half(1)))
        return better((value.lane(0), place.lane(0)), (self.last_value.get(), self.last_place.get()))


@dataclass(frozen=True)
class RowOfLogits:
    """A row, and what it is to be weighed by."""

    f: Function
    dtype: str
    start: Value
    width: Value
    largest: Variable
    temperature: Value
    key: Value

    def each(self, body: Callable[[Value, Value, int], None]) -> None:
        """body(logits float32, their tokens int32, lanes)"""
        f = self.f
        order = f.numbers(vector(I32, LANES))

        def some(place: Value, lanes: int) -> None:
            x = load_floats(f, self.dtype, self.start + place * ITEM_BYTES[self.dtype], lanes)
            token = place.to(I32)
            body(x, order + token.broadcast(LANES) if lanes > 1 else token, lanes)

        in_lanes(f, self.width, some)

    def spread(self, value: Value, lanes: int) -> Value:
        return value.broadcast(lanes) if lanes > 1 else value

    def scaled(self, x: Value, lanes: int) -> Value:
        """Logarithms of likelihoods, 0 for the most likely."""
        return (x - self.spread(self.largest.get(), lanes)) / self.spread(self.temperature, lanes)

    def score(self, weight: Value, tokens: Value, lanes: int) -> Value:
        return weight / exponential(self.f, self.key, tokens, lanes)


def exponential(f: Function, key: Value, tokens: Value, lanes: int) -> Value:
    """`noise.exponential` from the same random bits, in float32: -log(1 - u), u in (0, 1). Where u is small it is
    2 · artanh(u / (2 - u)), by its series, whose next term is 3e-10 of the sum."""

    def spread(value: Value) -> Value:
        return value.broadcast(lanes) if lanes > 1 else value

    bits = tokens * -0x61C8864F + spread(key.to(I32))  # 0x9E3779B1
    bits = mix32(mix32(bits) ^ spread((key >> 32).to(I32)))
    u, rest = (_share_of_1(f, each, lanes) for each in (bits, bits ^ -1))
    s = u / (2.0 - u)
    z = s * s
    series = s * 2.0 * (z * (z * (z * (z * (1 / 9) + 1 / 7) + 1 / 5) + 1 / 3) + 1.0)
    return f.select(u < 0.25, series, 0.0 - f.logarithm(rest))


def _share_of_1(f: Function, bits: Value, lanes: int) -> Value:
    """32 bits without a sign -> (bits + 1/2) / 2^32, float32."""
    whole = bits.to(shaped(F32, lanes))
    return (f.select(bits < 0, whole + 2.0**32, whole) + 0.5) * 2.0**-32


def mix32(x: Value) -> Value:
    """MurmurHash3's 32-bit finaliser (Appleby), as in `noise`."""
    x = (x ^ (x >> 16)) * -0x7A143595  # 0x85EBCA6B
    x = (x ^ (x >> 13)) * -0x3D4D51CB  # 0xC2B2AE35
    return x ^ (x >> 16)


def write_choose(dtype: str, *, adjusted: bool) -> Write:
    """adjusted: the row was looked at before; -inf forbids in it."""

    def write(f: Function) -> None:
        a = arguments_of(f, CHOOSE)
        counts = f.stack(4 * NUM_DIGITS)
        with f.loop(f.argument("first"), f.argument("last")) as number:

            def own(name: str, type: object, size: int, number: Value = number) -> Value:
                return f.load(a[name] + number * size, type)

            row = RowOfLogits(
                f, dtype, a["x"] + number * a["stride"], a["width"], f.variable(float("-inf"), F32),
                own("temperature", F32, 4), own("noise_keys", I64, 8),
            )  # fmt: skip
            token = _largest(row, adjusted=adjusted)
            with f.when((token.get() >= 0) & (row.temperature > 0.0)):
                winner, total = _race(row)
                token.set(winner)
                top_k, top_p = own("top_k", I32, 4).to(I64), own("top_p", F32, 4)
                min_p = own("min_p", F32, 4)
                with f.when((top_k > 0) | (top_p < 1.0) | (min_p > 0.0)):
                    weight = f.variable(total)
                    with f.when((top_k > 0) & (top_k < a["width"]) & (top_p < 1.0)):
                        weight.set(_weight_of_top_k(row, top_k, counts))
                    _settle(row, token, top_k, top_p, weight.get(), min_p)
            f.store(token.get(), a["out"] + number * 8)

    return write


def _largest(row: RowOfLogits, *, adjusted: bool) -> Variable:
    """-> the most likely token, int64; NOT_FINITE or NONE_ALLOWED. Sets the row's largest."""
    f = row.f
    best = Best.start(f, float("-inf"))
    # x - x is 0, or NaN for what is not finite.
    faults = [f.variable(0.0, vector(F32, LANES)), f.variable(0.0, F32)]

    def look(x: Value, tokens: Value, lanes: int) -> None:
        best.offer(x, tokens, lanes)
        if not adjusted:
            into = faults[0] if lanes > 1 else faults[1]
            into.set(into.get() + (x - x))

    row.each(look)
    value, place = best.found()
    row.largest.set(value)
    token = f.variable(f.select(value > float("-inf"), place.to(I64), NONE_ALLOWED))
    fault = f.tree(faults[0].get(), lambda one, two: one + two) + faults[1].get()
    token.set(f.select(fault.equals(0.0), token.get(), NOT_FINITE))
    return token


def _race(row: RowOfLogits) -> tuple[Value, Value]:
    """-> the winner among all tokens, int64; and what all weigh, float64."""
    f = row.f
    best = Best.start(f, -1.0)
    total = _Sum(f)

    def run(x: Value, tokens: Value, lanes: int) -> None:
        weight = f.exponential(row.scaled(x, lanes))
        total.add(weight, lanes)
        best.offer(row.score(weight, tokens, lanes), tokens, lanes)

    row.each(run)
    return best.found()[1].to(I64), total.get()


class _Sum:
    """Of float32 numbers, in float64."""

    def __init__(self, f: Function) -> None:
        self._f = f
        self._lanes, self._last = f.variable(0.0, vector(F64, LANES)), f.variable(0.0, F64)

    def add(self, values: Value, lanes: int) -> None:
        into = self._lanes if lanes > 1 else self._last
        into.set(into.get() + values.to(shaped(F64, lanes)))

    def get(self) -> Value:
        return self._f.tree(self._lanes.get(), lambda one, two: one + two) + self._last.get()


def _settle(row: RowOfLogits, token: Variable, top_k: Value, top_p: Value, weight: Value, min_p: Value) -> None:
    """token: the winner of the whole race; becomes the winner among those that the filters leave. weight: of the top_k,
    or of all."""
    f = row.f
    most = top_p.to(F64) * weight
    least = f.select(min_p > 0.0, f.logarithm(f.select(min_p > 0.0, min_p, 1.0)), float("-inf"))
    with f.repeat_while() as repeat:
        own = load_floats(f, row.dtype, row.start + token.get() * ITEM_BYTES[row.dtype], 1)
        number = token.get().to(I32)
        best, before = Best.start(f, -1.0), _Sum(f)
        count = [f.variable(0, vector(I32, LANES)), f.variable(0, I32)]

        def look(x: Value, tokens: Value, lanes: int) -> None:
            mine, place = row.spread(own, lanes), row.spread(number, lanes)
            is_before = (x > mine) | (x.equals(mine) & (tokens < place))
            weights = f.exponential(row.scaled(x, lanes))
            before.add(f.select(is_before, weights, 0.0), lanes)
            into = count[0] if lanes > 1 else count[1]
            into.set(into.get() + f.select(is_before, f.value(1, into.get().type), 0))
            best.offer(f.select(is_before, row.score(weights, tokens, lanes), -1.0), tokens, lanes)

        row.each(look)
        num_before = (f.tree(count[0].get(), lambda one, two: one + two) + count[1].get()).to(I64)
        within = ((top_k <= 0) | (num_before < top_k)) & ((top_p >= 1.0) | (before.get() <= most))
        stays = num_before.equals(0) | (within & (row.scaled(own, 1) >= least))
        token.set(f.select(stays, token.get(), best.found()[1].to(I64)))
        repeat.stop_when(stays)


def _ordered_bits(x: Value, lanes: int) -> Value:
    """float32, no NaN -> 32 bits whose order without a sign is that of the numbers; equal where they are."""
    ints = shaped(I32, lanes)
    bits = (x + 0.0).bits(ints)  # + 0.0: of -0.0 and 0.0 only one is left
    return bits ^ ((0 - (bits >> 31)) | -(1 << 31))


def _weight_of_top_k(row: RowOfLogits, top_k: Value, counts: Value) -> Value:
    """-> float64: what the top_k most likely weigh together. The last of them is found by its bits, 11 at a time: how
    many tokens agree with it so far, and go on in which way, says what its next ones are (a radix select)."""
    f = row.f
    prefix, wanted = f.variable(0), f.variable(top_k)
    for shift in DIGITS:
        mask = (1 << (10 if shift == 0 else 11)) - 1
        above = shift + (10 if shift == 0 else 11)
        with f.loop(0, NUM_DIGITS) as number:
            f.store(f.value(0, I32), counts + number * 4)
        with f.loop(0, row.width) as place:
            x = load_floats(f, row.dtype, row.start + place * ITEM_BYTES[row.dtype], 1)
            bits = _ordered_bits(x, 1).zero_extended(I64)
            with f.when((bits >> above).equals(prefix.get())):
                slot = counts + ((bits >> shift) & mask) * 4
                f.store(f.load(slot, I32) + 1, slot)
        digit = f.variable(mask)
        with f.repeat_while() as repeat:
            here = f.load(counts + digit.get() * 4, I32).to(I64)
            repeat.stop_when(here >= wanted.get())
            wanted.set(wanted.get() - here)
            digit.set(digit.get() - 1)
        prefix.set((prefix.get() << (10 if shift == 0 else 11)) | digit.get())
    total, equal = _Sum(f), f.variable(0.0, F32)

    def weigh(x: Value, _: Value, lanes: int) -> None:
        bits, last = _ordered_bits(x, lanes), row.spread(prefix.get().to(I32), lanes)
        weights = f.exponential(row.scaled(x, lanes))
        # Compared without a sign: the highest bit turned, and then with one.
        more = (bits ^ -(1 << 31)) > (last ^ -(1 << 31))
        total.add(f.select(more, weights, 0.0), lanes)
        same = f.select(bits.equals(last), weights, f.value(0.0, weights.type))
        equal.set(f.maximum(equal.get(), f.tree(same, f.maximum) if lanes > 1 else same))

    row.each(weigh)
    return total.get() + equal.get().to(F64) * wanted.get().to(F64)
