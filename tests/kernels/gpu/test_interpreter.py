"""The interpreter calculates as torch does, bit for bit, and refuses what a GPU leaves open."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU in this process")

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
WIDE = FLOATS[:3]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def every_number(dtype: torch.dtype) -> Tensor:
    """All numbers of a format with 8 or 16 bits, infinities included; of float32, one or more of every 2^16 bit
    patterns, with ties and their neighbours. No NaN."""
    if dtype.itemsize == 1:
        numbers = torch.arange(2**8).to(torch.uint8).view(dtype)
    elif dtype.itemsize == 2:
        numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    else:
        low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
        upper = torch.arange(-(2**15), 2**15)
        numbers = (upper * 2**16 + low[upper % 6]).to(torch.int32).view(dtype)
    return numbers[~numbers.float().isnan()].contiguous()


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit, a NaN being any NaN."""
    assert actual.dtype == expected.dtype
    wide = actual.float(), expected.float()
    same = (actual.view(torch.uint8) == expected.view(torch.uint8)).view(len(actual), -1).all(-1)
    same |= wide[0].isnan() & wide[1].isnan()
    wrong = (~same).nonzero().flatten()
    assert not len(wrong), f"{len(wrong)} differ, first: {wide[0][wrong[0]]} instead of {wide[1][wrong[0]]}"


@triton.jit
def cast_kernel(source, target, count, SIZE: tl.constexpr):
    places = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    numbers = tl.load(source + places, mask=places < count, other=0.0)
    tl.store(target + places, numbers.to(target.dtype.element_ty), mask=places < count)


def cast(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    target = torch.empty(len(numbers), dtype=dtype)
    cast_kernel[(triton.cdiv(len(numbers), 65536),)](numbers, target, len(numbers), SIZE=65536)
    return target


@pytest.mark.parametrize("target", FLOATS, ids=name)
@pytest.mark.parametrize("source", FLOATS, ids=name)
def test_casts_round_to_the_nearest(source: torch.dtype, target: torch.dtype) -> None:
    numbers = every_number(source)
    expected = numbers.float()
    if target.itemsize == 1 and target != source:
        expected = expected.clamp(-torch.finfo(target).max, torch.finfo(target).max)
    assert_same(cast(numbers, target), expected.to(target))


def test_float8_saturates_and_keeps_nan() -> None:
    """What cvt.rn.satfinite.e4m3x2 gives, by PTX's definition: ties to even, the largest instead of an overflow."""
    numbers = torch.tensor([447.0, 448.0, 463.0, 464.0, 1e9, torch.inf, -torch.inf, 17.0, 19.0, 2.0**-10, torch.nan])
    expected = torch.tensor([448.0, 448.0, 448.0, 448.0, 448.0, 448.0, -448.0, 16.0, 20.0, 0.0, torch.nan])
    torch.testing.assert_close(cast(numbers, torch.float8_e4m3fn).float(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("source", WIDE, ids=name)
def test_casts_to_integers_saturate(source: torch.dtype) -> None:
    numbers = torch.tensor([0.0, 1.9, -1.9, 200.0, -200.0, 3e9, -3e9, torch.inf, torch.nan], dtype=source)
    wide = torch.where(numbers.isnan(), 0.0, numbers.double()).trunc()
    for dtype in (torch.int8, torch.int32):
        limits = torch.iinfo(dtype)
        assert torch.equal(cast(numbers, dtype), wide.clamp(limits.min, limits.max).to(dtype))
    whole = torch.tensor([0, 1, -127, 127, 3], dtype=torch.int8)
    assert torch.equal(cast(whole, source), whole.to(source))


@triton.jit
def arithmetic_kernel(x, y, target, count, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    a = tl.load(x + places, mask=places < count, other=1.0)
    b = tl.load(y + places, mask=places < count, other=1.0)
    if OPERATION == "add":
        result = a + b
    elif OPERATION == "sub":
        result = a - b
    elif OPERATION == "mul":
        result = a * b
    elif OPERATION == "div":
        result = a / b
    elif OPERATION == "maximum":
        result = tl.maximum(a, b)
    elif OPERATION == "where":
        result = tl.where(a < b, a, b)
    elif OPERATION == "neg":
        result = -a
    elif OPERATION == "abs":
        result = tl.abs(a)
    else:
        result = tl.clamp(a, b, b)
    tl.store(target + places, result, mask=places < count)


DEFINITIONS: dict[str, Any] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "where": lambda a, b: torch.where(a < b, a, b),
    "neg": lambda a, b: -a,
    "abs": lambda a, b: a.abs(),
    "clamp": lambda a, b: b + a * 0,
}


@pytest.mark.parametrize("operation", DEFINITIONS)
@pytest.mark.parametrize("dtype", WIDE, ids=name)
def test_arithmetic_rounds_once(dtype: torch.dtype, operation: str) -> None:
    numbers = every_number(dtype)
    numbers = numbers[numbers.float().abs() < 1e30]
    if operation == "neg":
        numbers = numbers[numbers != 0]  # before 3.8 Triton negates by subtracting from 0, which loses a zero's sign
    other = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(1))].contiguous()
    numbers = numbers.contiguous()
    target = torch.empty_like(numbers)
    arithmetic_kernel[(1,)](numbers, other, target, len(numbers), OPERATION=operation, SIZE=65536)
    assert_same(target, DEFINITIONS[operation](numbers, other))


@triton.jit
def dot_kernel(
    x, y, target, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, TOTAL: tl.constexpr
):
    a = tl.load(x + tl.arange(0, M)[:, None] * K + tl.arange(0, K)[None, :])
    b = tl.load(y + tl.arange(0, K)[:, None] * N + tl.arange(0, N)[None, :])
    product = tl.dot(a, b, input_precision=PRECISION, out_dtype=TOTAL)
    tl.store(target + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], product)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=name)
def test_dot(dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(2)
    x, y = (torch.randn(shape, generator=source) * 20 for shape in ((16, 64), (64, 32)))
    x, y = x.to(dtype), y.to(dtype)
    whole = dtype == torch.int8
    target = torch.empty(16, 32, dtype=torch.int32 if whole else torch.float32)
    total = tl.int32 if whole else tl.float32
    dot_kernel[(1,)](x, y, target, M=16, N=32, K=64, PRECISION="ieee", TOTAL=total)
    assert torch.equal(target, (x.double() @ y.double()).to(target.dtype))


def test_a_dot_does_not_depend_on_its_shape() -> None:
    source = torch.Generator().manual_seed(3)
    x, y = torch.randn(128, 256, generator=source), torch.randn(256, 128, generator=source)
    whole = torch.empty(128, 128)
    dot_kernel[(1,)](x, y, whole, M=128, N=128, K=256, PRECISION="ieee", TOTAL=tl.float32)
    for rows, columns in ((16, 16), (32, 128), (64, 16)):
        part = torch.empty(rows, columns)
        some = y[:, :columns].contiguous()
        dot_kernel[(1,)](x, some, part, M=rows, N=columns, K=256, PRECISION="ieee", TOTAL=tl.float32)
        assert torch.equal(part, whole[:rows, :columns])


@triton.jit
def fma_kernel(x, y, z, target):
    tl.store(target, tl.fma(tl.load(x), tl.load(y), tl.load(z)))


def test_fma_rounds_once() -> None:
    """1 + 2^-24 + 2^-60 lies above a tie that float32 and float64 alone would both round down."""
    x, y, z = (torch.tensor([number]) for number in (38737 * 433 * 2.0**-30, 17 * 241 * 2.0**-30, 1.0))
    assert int(x.double() * y.double() * 2**60) == 2**36 + 1
    target = torch.empty(1)
    fma_kernel[(1,)](x, y, z, target)
    assert target.item() == 1 + 2.0**-23
    fma_kernel[(1,)](x, -y, -z, target)
    assert target.item() == -1 - 2.0**-23


@triton.jit
def reduce_kernel(source, sums, largest, places, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(source + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :])
    tl.store(sums + tl.arange(0, R), tl.sum(x, axis=1))
    highest, where = tl.max(x, axis=1, return_indices=True)
    tl.store(largest + tl.arange(0, R), highest)
    tl.store(places + tl.arange(0, R), where)


def reduce(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    sums, largest, places = torch.empty(rows), torch.empty(rows), torch.empty(rows, dtype=torch.int32)
    reduce_kernel[(1,)](x, sums, largest, places, R=rows, C=columns)
    return sums, largest, places


def test_reductions() -> None:
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(4))
    x[3, 5] = x[3, 9] = 10.0
    sums, largest, places = reduce(x)
    assert torch.equal(sums, x.double().sum(1).float())
    assert torch.equal(largest, x.amax(1))
    assert torch.equal(places.long(), torch.tensor([int(row.argmax()) for row in x]))
    assert places[3] == 5
    assert torch.equal(reduce(x[4:5].contiguous())[0], sums[4:5])


@triton.jit
def loop_kernel(bounds, target):
    total = 0
    for step in range(tl.load(bounds), tl.load(bounds + 1)):
        total += step
    tl.store(target, total)


def test_a_loop_takes_loaded_bounds() -> None:
    target = torch.zeros(1, dtype=torch.int32)
    loop_kernel[(1,)](torch.tensor([3, 6], dtype=torch.int32), target)
    assert target.item() == 12


@triton.jit
def masked_kernel(source, target, count, SIZE: tl.constexpr):
    tl.store(target + tl.arange(0, SIZE), tl.load(source + tl.arange(0, SIZE), mask=tl.arange(0, SIZE) < count))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32, torch.int64, torch.int8], ids=name)
def test_what_a_mask_leaves_out_is_senseless(dtype: torch.dtype) -> None:
    target = torch.zeros(4, dtype=dtype)
    masked_kernel[(1,)](torch.ones(2).to(dtype), target, 2, SIZE=4)
    assert target[:2].float().eq(1).all()
    if dtype.is_floating_point:
        assert target[2:].float().isnan().all()
    else:
        assert target[2:].eq(torch.iinfo(dtype).min).all()


@pytest.mark.parametrize("count", [3, 4])
def test_a_kernel_reaches_only_for_its_tensors(count: int) -> None:
    room = torch.zeros(8)
    with pytest.raises(Exception, match="outside every tensor"):
        masked_kernel[(1,)](room[1:3], torch.empty(4), count, SIZE=4)
    with pytest.raises(Exception, match="outside every tensor"):
        masked_kernel[(1,)](room[1:5], room[5:8], 4, SIZE=4)
    masked_kernel[(1,)](room[1:5], room[4:8], 4, SIZE=4)


@triton.jit
def unclear_kernel(x, CASE: tl.constexpr):
    a = tl.load(x + tl.arange(0, 16))
    if CASE == "sum":
        tl.store(x + tl.arange(0, 1), tl.sum(a, axis=0, keep_dims=True))
    elif CASE == "argmax":
        tl.store(x + tl.arange(0, 1), tl.argmax(a, axis=0, keep_dims=True).to(tl.float32))
    elif CASE == "add":
        tl.store(x + tl.arange(0, 16), a + a)
    elif CASE == "towards zero":
        tl.store(x + tl.arange(0, 16), a.to(tl.bfloat16, fp_downcast_rounding="rtz").to(tl.float32))
    else:
        square = tl.broadcast_to(a[:, None], [16, 16])
        tl.store(x + tl.arange(0, 1), tl.sum(tl.dot(square, square), axis=None).to(x.dtype.element_ty))


@pytest.mark.parametrize(
    ("case", "dtype", "message"),
    [
        ("sum", torch.bfloat16, "convert it to float32 first"),
        ("sum", torch.float16, "convert it to float32 first"),
        ("argmax", torch.float32, "NaN"),
        ("add", torch.float8_e4m3fn, "arithmetic on float8"),
        ("towards zero", torch.float32, "to the nearest only"),
        ("dot", torch.float32, "TF32"),
    ],
)
def test_what_has_no_one_meaning_is_refused(case: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(Exception, match=message):
        unclear_kernel[(1,)](torch.full((16,), torch.nan).to(dtype), CASE=case)


TOO_LATE = """
import sys, types
from pronk.kernels import interpreter

def refusal():
    try:
        interpreter.install()
    except RuntimeError as error:
        return str(error)

sys.modules["pronk.kernels.gpu"] = types.ModuleType("pronk.kernels.gpu")
print(refusal())
del sys.modules["pronk.kernels.gpu"]
import triton
print(refusal())
"""


def test_too_late_is_refused(compiling: dict[str, str]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", TOO_LATE], env=compiling, capture_output=True, text=True, check=True, timeout=120
    )
    first, second = run.stdout.splitlines()
    assert "call install() first" in first
    assert "set TRITON_INTERPRET=1" in second
