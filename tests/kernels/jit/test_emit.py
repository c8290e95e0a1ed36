"""What is written with `emit` computes what it says: each operator against numpy or torch, on numbers of every kind."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from llvmlite import ir

from pronk.kernels.jit.compiler import assembly, features, load
from pronk.kernels.jit.emit import BF16, F16, F32, I8, I32, I64, Function, Value, vector

Write = Callable[[Function, Sequence[Value]], None]
LANES = 16


def run(write: Write, *arguments: Any) -> None:
    """arguments: arrays, whose addresses are passed, and numbers."""
    names = [f"a{number}" for number in range(len(arguments))]

    def module() -> ir.Module:
        found = ir.Module("test")
        with Function(found, "function", names) as f:
            write(f, [f.argument(name) for name in names])
        return found

    library = load("test", [], repr(module()), module)
    passed = [each if isinstance(each, int) else each.ctypes.data for each in arguments]
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(passed))(library.address("function"))(*passed)


def floats(count: int = LANES, seed: int = 0) -> np.ndarray[Any, Any]:
    numbers = np.random.default_rng(seed).normal(0, 3, count).astype(np.float32)
    numbers[:4] = (0.0, -0.0, 1e-40, 3e38)
    return numbers


def test_sums_and_products_are_rounded_one_by_one() -> None:
    one, two, three = floats(), floats(seed=1), floats(seed=2)
    out = np.zeros((5, LANES), np.float32)

    def write(f: Function, a: Sequence[Value]) -> None:
        x, y, z = (f.load(address, vector(F32, LANES)) for address in a[:3])
        results = (x * y + z, x - y, x / (y + 7.0), 1.0 / (y + 7.0), 2.0 - x)
        for row, result in enumerate(results):
            f.store(result, a[3] + row * 4 * LANES)

    with np.errstate(over="ignore"):
        run(write, one, two, three, out)
        seven, expected = np.float32(7), [one * two + three, one - two]
        expected += [one / (two + seven), np.float32(1) / (two + seven), np.float32(2) - one]
    assert np.array_equal(out, np.stack(expected))


def test_fma_is_rounded_once() -> None:
    one, two, three = floats(), floats(seed=1), floats(seed=2)
    out = np.zeros(LANES, np.float32)

    def write(f: Function, a: Sequence[Value]) -> None:
        f.store(f.fma(*(f.load(address, vector(F32, LANES)) for address in a[:3])), a[3])

    run(write, one, two, three, out)
    with np.errstate(over="ignore"):
        exact = one.astype(np.float64) * two + three
        assert np.array_equal(out, exact.astype(np.float32))


def test_integers() -> None:
    numbers = np.array([0, 1, 7, 1 << 40, 123456789], np.int64)
    out = np.zeros((7, len(numbers)), np.int64)

    def write(f: Function, a: Sequence[Value]) -> None:
        with f.loop(0, len(numbers)) as i:
            x = f.load(a[0] + i * 8, I64)
            for row, result in enumerate((x // 7, x % 7, x * 3 - 1, x << 2, x >> 1, x & 5, x ^ 5)):
                f.store(result, a[1] + row * 8 * len(numbers) + i * 8)

    run(write, numbers, out)
    expected = (numbers // 7, numbers % 7, numbers * 3 - 1, numbers << 2, numbers >> 1, numbers & 5, numbers ^ 5)
    assert np.array_equal(out, np.stack(expected))


def test_comparisons_and_choices() -> None:
    x, y = floats(), floats(seed=1)
    x[5], y[6] = np.nan, np.nan
    x[7] = y[7]
    out = np.zeros((6, LANES), np.float32)

    def write(f: Function, a: Sequence[Value]) -> None:
        one, two = (f.load(address, vector(F32, LANES)) for address in a[:2])
        conditions = (one < two, one <= two, one > two, one >= two, one.equals(two))
        for row, condition in enumerate(conditions):
            f.store(f.select(condition, one, -1.0), a[2] + row * 4 * LANES)
        f.store(f.maximum(one, two), a[2] + 5 * 4 * LANES)

    run(write, x, y, out)
    minus = np.float32(-1)
    expected = [np.where(condition, x, minus) for condition in (x < y, x <= y, x > y, x >= y, x == y)]
    assert np.array_equal(out, np.stack([*expected, np.maximum(x, y)]), equal_nan=True)


def test_loops_variables_and_conditions() -> None:
    """The odd numbers below a limit, added up until the sum passes another; and a loop that is never entered."""
    out = np.zeros(2, np.int64)

    def write(f: Function, a: Sequence[Value]) -> None:
        total, number = f.variable(0), f.variable(0)
        with f.repeat_while() as repeat:
            with f.when((number.get() & 1).equals(1)):
                total.set(total.get() + number.get())
            number.set(number.get() + 1)
            repeat.stop_when(total.get() > a[1])
        f.store(total.get(), a[0])
        count = f.variable(0)
        with f.loop(5, 5) as _:
            count.set(count.get() + 1)
        with f.loop(0, 10, 3) as i:
            count.set(count.get() + i)
        f.store(count.get(), a[0] + 8)

    run(write, out, 30)
    assert out.tolist() == [36, 0 + 3 + 6 + 9]


@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_is_rounded_as_torch_rounds(seed: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 2**32, 4096, np.uint32)
    bits[:4] = (0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00008000)  # ties, to infinity, a subnormal
    x = bits.view(np.float32)
    narrow, wide = np.zeros(4096, np.int16), np.zeros(4096, np.float32)

    def write(f: Function, a: Sequence[Value]) -> None:
        with f.loop(0, 4096, LANES) as i:
            f.store(f.narrow_to_bfloat16(f.load(a[0] + i * 4, vector(F32, LANES))), a[1] + i * 2)
            f.store(f.widen_bfloat16(f.load(a[1] + i * 2, vector(BF16, LANES))), a[2] + i * 4)
        with f.loop(0, 3) as i:
            f.store(f.widen_bfloat16(f.narrow_to_bfloat16(f.load(a[0] + i * 4, F32))), a[2] + i * 4)

    run(write, x, narrow, wide)
    expected = torch.from_numpy(x.copy()).to(torch.bfloat16)
    numbers = torch.from_numpy(narrow).view(torch.bfloat16)
    assert torch.equal(numbers.isnan(), expected.isnan())
    assert torch.equal(numbers.nan_to_num(0.5), expected.nan_to_num(0.5))
    assert torch.equal(torch.from_numpy(wide).nan_to_num(0.5), expected.float().nan_to_num(0.5))


def test_conversions() -> None:
    x = np.array([-128, -1, 0, 1, 127, 5, 6, 7] * 2, np.int8)
    ints, halves, back = np.zeros(16, np.int32), np.zeros(16, np.float16), np.zeros(16, np.int8)

    def write(f: Function, a: Sequence[Value]) -> None:
        wide = f.load(a[0], vector(I8, LANES)).to(vector(I32, LANES))
        f.store(wide, a[1])
        f.store(wide.to(vector(F32, LANES)).to(vector(F16, LANES)), a[2])
        f.store(
            f.load(a[2], vector(F16, LANES)).to(vector(F32, LANES)).to(vector(I32, LANES)).to(vector(I8, LANES)), a[3]
        )

    run(write, x, ints, halves, back)
    assert ints.tolist() == halves.tolist() == back.tolist() == x.tolist()


def test_nearest_is_even_between_two() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 2.49, 2.51, 1e9] * 2, np.float32)
    out = np.zeros(16, np.float32)

    def write(f: Function, a: Sequence[Value]) -> None:
        f.store(f.nearest(f.load(a[0], vector(F32, LANES))), a[1])

    run(write, x, out)
    assert np.array_equal(out, np.rint(x))


def test_exponential_of_what_is_not_positive() -> None:
    x = np.concatenate([np.linspace(-100, 0, 16000), -np.logspace(-30, 0, 1600)]).astype(np.float32)
    x = np.concatenate([x, np.array([-np.inf, np.nan, -0.0, 0.0] * 4, np.float32)])
    out = np.zeros_like(x)

    def write(f: Function, a: Sequence[Value]) -> None:
        with f.loop(0, len(x), LANES) as i:
            f.store(f.exponential(f.load(a[0] + i * 4, vector(F32, LANES))), a[1] + i * 4)

    run(write, x, out)
    exact = np.exp(x.astype(np.float64))
    error = np.abs(out - exact)
    normal = x >= -87.3
    assert (error[normal] <= 2 * np.spacing(exact[normal].astype(np.float32))).all()
    assert (out[x < -87.3] == 0).all()
    assert np.array_equal(np.isnan(out), np.isnan(x))
    assert (out[x == 0] == 1).all()


def test_lanes() -> None:
    x = np.arange(16, dtype=np.int32)
    out = np.zeros((4, 8), np.int32)

    def write(f: Function, a: Sequence[Value]) -> None:
        whole = f.load(a[0], vector(I32, LANES))
        f.store(whole.half(0), a[1])
        f.store(whole.half(1), a[1] + 32)
        f.store(whole.lanes(range(15, -1, -2)), a[1] + 64)
        total = f.tree(whole, lambda one, two: one + two)
        f.store((total + whole.lane(3)).broadcast(8), a[1] + 96)

    run(write, x, out)
    assert out.tolist() == [list(range(8)), list(range(8, 16)), list(range(15, -1, -2)), [123] * 8]


def test_a_tree_adds_halves() -> None:
    x = floats()
    out = np.zeros(1, np.float32)

    def write(f: Function, a: Sequence[Value]) -> None:
        f.store(f.tree(f.load(a[0], vector(F32, LANES)), lambda one, two: one + two), a[1])

    run(write, x, out)
    expected = x
    while len(expected) > 1:
        expected = expected[: len(expected) // 2] + expected[len(expected) // 2 :]
    assert np.array_equal(out, expected)


def test_memory_of_its_own_is_aligned() -> None:
    out = np.zeros(2, np.int64)

    def write(f: Function, a: Sequence[Value]) -> None:
        first, second = f.stack(24), f.stack(64)
        f.store(first % 64, a[0])
        f.store(f.value(7), second + 8)
        f.store(f.load(second + 8, I64), a[0] + 8)

    run(write, out)
    assert out.tolist() == [0, 7]


def test_the_assembly_can_be_seen() -> None:
    module = ir.Module("seen")
    with Function(module, "doubles", ["x"]) as f:
        f.store(f.load(f.argument("x"), I64) * 2, f.argument("x"))
    assert "doubles" in assembly(module)
    assert all(name == name.strip() and name[0] not in "+-" for name in features())
