"""Linear layers of the GPU set: against float64, and against themselves, bit by bit: any number of rows, any place of a
row, fused or not. In the interpreter (or on a GPU: pytest -m gpu)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pronk.kernels import cases, gpu, reference
from pronk.kernels.cases import Heads, LinearCase
from pronk.kernels.gpu import vendor
from pronk.kernels.gpu.linear import UNLIMITED, launch_for
from pronk.kernels.gpu.linear_tiles import order_of, stages_within, tile_of
from pronk.kernels.interface import LayerCache, Weight, WeightFormat

each_format = pytest.mark.parametrize("format", gpu.WEIGHT_FORMATS)
each_dtype = pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

SMALL = (
    LinearCase("whole-blocks", 2, 1024, 40),
    LinearCase("odd-outputs", 17, 512, 21),
    LinearCase("odd-inputs", 3, 96, 40),
    LinearCase("odd-inputs-in-parts", 5, 1056, 8),
    LinearCase("many-rows", 70, 512, 72),
)
"""Inputs that int4's groups divide."""
ODD = tuple(case for case in cases.LINEAR if case.name in ("2x33-17", "1x1-1", "15x257-3", "33x16-16"))
MODEL = tuple(case for case in cases.LINEAR if case.in_features >= 2048)
ROWS = (1, 2, 15, 16, 17, 64, 65, 130)
"""Around the ends of tiles of 16, 32, 64 and 128 rows."""


def each(table: tuple[LinearCase, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", table, ids=lambda case: case.name)


def made(case: LinearCase, dtype: torch.dtype, format: WeightFormat, device: str) -> tuple[Tensor, Weight, Tensor]:
    """-> x, the packed weight, and the numbers that it stands for, as the reference packs them."""
    x, weight = (tensor.to(device) for tensor in cases.linear_inputs(case, dtype, seed=1))
    return x, gpu.pack(weight, format), reference.unpack(reference.pack(weight, format))


def assert_product(actual: Tensor, x: Tensor, weight: Tensor) -> None:
    expected = x.double() @ weight.double().t()
    bound = cases.linear_bound(x, weight, expected, x.dtype)
    assert actual.dtype == x.dtype
    assert actual.shape == expected.shape
    assert ((actual.double() - expected).abs() <= bound).all()


@each_format
@each_dtype
@each(SMALL)
def test_linear(case: LinearCase, dtype: torch.dtype, format: WeightFormat, device: str) -> None:
    x, packed, weight = made(case, dtype, format, device)
    kept = x.clone()
    assert_product(gpu.linear(x, packed), x, weight)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("format", ["plain", "int8", "fp8"])
@each(ODD)
def test_linear_of_odd_shapes(case: LinearCase, format: WeightFormat, device: str) -> None:
    x, packed, weight = made(case, torch.bfloat16, format, device)
    assert_product(gpu.linear(x, packed), x, weight)


def test_linear_of_more_tiles_of_rows_than_go_side_by_side(device: str) -> None:
    x, packed, weight = made(LinearCase("", 600, 64, 130), torch.bfloat16, "plain", device)
    assert_product(gpu.linear(x, packed), x, weight)


@each_format
@each(MODEL)
def test_linear_of_a_model(case: LinearCase, format: WeightFormat, device: str) -> None:
    if device == "cpu":
        pytest.skip("too large for the interpreter")
    x, packed, weight = made(case, torch.bfloat16, format, device)
    assert_product(gpu.linear(x, packed), x, weight)


@each_format
@pytest.mark.parametrize("num_inputs", [96, 1024, 1056])
def test_packed_numbers_are_the_references(num_inputs: int, format: WeightFormat, device: str) -> None:
    """Times one and added to zeros, a number stays what it is."""
    weight = cases.normal(cases.generator(2), 20, num_inputs, dtype=torch.float32).to(device)
    weight[3] = 0.0
    packed = gpu.pack(weight, format)
    assert (packed.out_features, packed.in_features, packed.format) == (20, num_inputs, format)
    places = torch.tensor([0, 31, 32, 63, 64, 95, num_inputs // 2, num_inputs - 1])
    rows = torch.nn.functional.one_hot(places, num_inputs).float().to(device)
    expected = reference.unpack(reference.pack(weight, format))
    assert torch.equal(gpu.linear(rows, packed), expected[:, places].t())


def test_packed_bytes(device: str) -> None:
    weight = torch.ones(64, 128, dtype=torch.bfloat16, device=device)
    sizes = {format: gpu.pack(weight, format).nbytes for format in gpu.WEIGHT_FORMATS}
    assert sizes == {"plain": 64 * 256, "int8": 64 * 132, "fp8": 64 * 132, "int4": 64 * (64 + 16)}
    assert gpu.pack(weight).data.data_ptr() == weight.data_ptr(), "a plain weight may be shared with the embedding"


@each_format
@pytest.mark.parametrize("heights", [[40], [16, 3, 21]], ids=str)
def test_a_weight_in_parts_is_packed_like_the_whole(heights: list[int], format: WeightFormat, device: str) -> None:
    weight = cases.normal(cases.generator(5), 40, 96, dtype=torch.bfloat16).to(device)
    whole, packed = gpu.pack(weight, format), gpu.pack(weight.split(heights), format)
    assert torch.equal(packed.data.view(torch.uint8), whole.data.view(torch.uint8))
    assert (packed.scales is None and whole.scales is None) or torch.equal(packed.scales, whole.scales)  # type: ignore[arg-type]
    if format == "plain":
        is_kept = packed.data.data_ptr() == weight.data_ptr()
        assert is_kept == (heights == [40] and device != "cpu"), "what lies on a device is no view of a file"


def cancelling(num_rows: int, num_inputs: int, num_outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and weight whose exact products are 0: what comes out is the error of the sum alone, all of its bits to be seen
    in any dtype. The second half takes back the first, in another order of int4's groups."""
    half = LinearCase("", num_rows, num_inputs // 2, num_outputs)
    x, weight = cases.linear_inputs(half, dtype, seed=4)
    x = x * 1024  # else the errors are below what float16 has
    order = torch.randperm(num_inputs // 2 // 32, generator=cases.generator(5))
    again = (order.unsqueeze(1) * 32 + torch.arange(32)).flatten()
    return torch.cat([x, -x[:, again]], dim=1), torch.cat([weight, weight[:, again]], dim=1)


@pytest.mark.parametrize("num_inputs", [1024, 1088], ids=["whole-blocks", "odd-inputs"])
@pytest.mark.parametrize(
    ("format", "dtype"),
    [(format, torch.bfloat16) for format in gpu.WEIGHT_FORMATS]
    + [("plain", torch.float32), ("plain", torch.float16), ("int8", torch.float16)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_a_row_has_the_same_bits_anywhere(
    format: WeightFormat, dtype: torch.dtype, num_inputs: int, device: str
) -> None:
    """In any number of rows, at any place, whatever the others hold."""
    x, weight = (tensor.to(device) for tensor in cancelling(max(ROWS), num_inputs, 24, dtype))
    packed = gpu.pack(weight, format)
    whole = gpu.linear(x, packed)
    assert (whole != 0).float().mean() > 0.25
    assert whole.abs().max() < 0.01
    for number, num_rows in enumerate(ROWS):
        start = min(7 * number, len(x) - num_rows)
        assert torch.equal(gpu.linear(x[start : start + num_rows], packed), whole[start : start + num_rows]), num_rows
    for place, num_rows in ((0, 3), (11, 12), (16, 20), (40, 70)):
        others = torch.full_like(x[:num_rows], math.nan)
        others[place] = x[5]
        assert torch.equal(gpu.linear(others, packed)[place], whole[5])


@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "format", "tile"),
    [
        (2, 8192, "plain", (16, 32)),
        (20, 4096, "plain", (32, 32)),
        (40, 8192, "plain", (64, 64)),
        (130, 3072, "plain", (128, 64)),
        (130, 6144, "plain", (128, 128)),
        (130, 6144, "int8", (128, 128)),
    ],
)
def test_an_output_has_the_same_bits_in_any_tile(
    num_rows: int, num_outputs: int, format: WeightFormat, tile: tuple[int, int], device: str
) -> None:
    """A weight of many outputs is cut into larger tiles: the first and the last of them must not notice."""
    x, weight = (tensor.to(device) for tensor in cancelling(num_rows, 512, num_outputs, torch.bfloat16))
    constants = launch_for(num_rows, num_outputs, 512, format, x.dtype, UNLIMITED).constants
    assert (constants["BLOCK_M"], constants["BLOCK_N"]) == tile
    whole = gpu.linear(x, gpu.pack(weight, format))
    for outputs in (slice(0, 24), slice(-24, None)):
        few = gpu.pack(weight[outputs].contiguous(), format)
        assert torch.equal(whole[:, outputs], gpu.linear(x, few))
        assert torch.equal(whole[-1:, outputs], gpu.linear(x[-1:], few))


def test_rows_of_a_larger_tensor(device: str) -> None:
    x, packed, _ = made(LinearCase("", 4, 512, 24), torch.bfloat16, "plain", device)
    wide = torch.full((4, 700), math.nan, dtype=x.dtype, device=device)
    wide[:, 100:612] = x
    assert torch.equal(gpu.linear(wide[:, 100:612], packed), gpu.linear(x, packed))


def test_no_rows(device: str) -> None:
    x, packed, _ = made(LinearCase("", 1, 64, 24), torch.bfloat16, "plain", device)
    assert gpu.linear(x[:0], packed).shape == (0, 24)
    assert gpu.linear_silu_mul(x[:0], packed).shape == (0, 12)
    assert [tensor.shape for tensor in gpu.linear_argmax(x[:0], packed)] == [(0,), (0,)]


@pytest.mark.parametrize(
    ("num_rows", "format", "dtype"),
    [(num_rows, format, torch.bfloat16) for num_rows in (3, 20, 70) for format in gpu.WEIGHT_FORMATS]
    + [(3, "plain", torch.float32), (3, "plain", torch.float16)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_linear_silu_mul_is_the_two_one_after_the_other(
    num_rows: int, format: WeightFormat, dtype: torch.dtype, device: str
) -> None:
    x, packed, _ = made(LinearCase("", num_rows, 544, 2 * 21), dtype, format, device)
    fused = gpu.linear_silu_mul(x, packed)
    assert fused.dtype == dtype
    assert torch.equal(fused, gpu.silu_mul(gpu.linear(x, packed)))


@dataclass(frozen=True)
class RopeInputs:
    positions: Tensor
    cos_sin: Tensor
    slots: Tensor

    @classmethod
    def of(cls, case: cases.RopeCase, device: str) -> RopeInputs:
        made = cases.rope_inputs(case, torch.float32, seed=3)
        slots = made.slots.clone()
        slots[1::3] = -1
        return cls(made.positions.to(device), made.cos_sin.to(device), slots.to(device))


def empty_cache(case: cases.RopeCase, dtype: torch.dtype, scaled: bool, device: str) -> LayerCache:
    """Full of NaN."""
    shape = cases.rope_inputs(case, torch.float32, seed=3).cache_shape
    kept = torch.float8_e4m3fn if scaled else dtype
    keys, values = (torch.full(shape, math.nan, device=device).to(kept) for _ in range(2))
    scales = (torch.full(shape[:3], math.nan, device=device) if scaled else None for _ in range(2))
    return LayerCache(keys, values, *scales)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain-cache", "float8-cache"])
@pytest.mark.parametrize("heads", [Heads(64, 2, 4), Heads(128, 1, 3)], ids=lambda heads: heads.name)
@pytest.mark.parametrize(("num_rows", "dtype"), [(4, torch.bfloat16), (4, torch.float32), (35, torch.bfloat16)])
def test_linear_rope_and_cache_is_the_two_one_after_the_other(
    num_rows: int, dtype: torch.dtype, heads: Heads, scaled: bool, device: str
) -> None:
    """Caches included: what no slot names stays as it was."""
    width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    x, packed, _ = made(LinearCase("", num_rows, 256, width), dtype, "plain", device)
    case = cases.RopeCase("", heads, 16, num_rows)
    inputs = RopeInputs.of(case, device)
    fused_cache, cache = (empty_cache(case, dtype, scaled, device) for _ in range(2))
    fused = gpu.linear_rope_and_cache(x, packed, inputs.positions, inputs.cos_sin, inputs.slots, fused_cache)
    queries = gpu.rope_and_cache(gpu.linear(x, packed), inputs.positions, inputs.cos_sin, inputs.slots, cache)
    assert torch.equal(fused, queries)
    for name in ("keys", "values", "key_scales", "value_scales"):
        ours, theirs = getattr(fused_cache, name), getattr(cache, name)
        assert ours is theirs is None or torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), name


@each_format
def test_linear_rope_and_cache_of_each_format(format: WeightFormat, device: str) -> None:
    """And against the reference: the order of heads and pairs is its own."""
    heads = Heads(64, 1, 2)
    x, packed, _ = made(LinearCase("", 5, 256, 4 * 64), torch.bfloat16, format, device)
    case = cases.RopeCase("", heads, 16, 5)
    inputs = RopeInputs.of(case, device)
    fused_cache, cache = (empty_cache(case, torch.bfloat16, False, device) for _ in range(2))
    fused = gpu.linear_rope_and_cache(x, packed, inputs.positions, inputs.cos_sin, inputs.slots, fused_cache)
    queries = reference.rope_and_cache(gpu.linear(x, packed), inputs.positions, inputs.cos_sin, inputs.slots, cache)
    assert torch.equal(fused, queries)
    assert torch.equal(fused_cache.keys.view(torch.int16), cache.keys.view(torch.int16))
    assert torch.equal(fused_cache.values.view(torch.int16), cache.values.view(torch.int16))


@each_format
@pytest.mark.parametrize("num_rows", [3, 20, 70])
def test_linear_argmax(num_rows: int, format: WeightFormat, device: str) -> None:
    x, packed, _ = made(LinearCase("", num_rows, 256, 101), torch.bfloat16, format, device)
    ids, largest = gpu.linear_argmax(x, packed)
    expected_ids, expected = reference.largest(gpu.linear(x, packed))
    assert (ids.dtype, largest.dtype) == (torch.int64, torch.float32)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(largest, expected)


def test_linear_argmax_takes_the_lowest_of_equals(device: str) -> None:
    """In one tile, and in tiles far from each other."""
    weight = torch.full((70, 64), -1.0)
    weight[[5, 9, 61], 0] = 1.0
    weight[[33, 69], 1] = 3.0
    x = torch.zeros(2, 64)
    x[0, 0], x[1, 1] = 2.0, 0.5
    ids, largest = gpu.linear_argmax(x.to(device, torch.bfloat16), gpu.pack(weight.to(device, torch.bfloat16)))
    assert ids.tolist() == [5, 33]
    assert largest.tolist() == [2.0, 1.5]


def test_linear_argmax_is_of_outputs_as_they_are_rounded(device: str) -> None:
    weight = torch.tensor([[0.0, 0.0], [256.0, 0.5], [256.0, 1.0]]).repeat(1, 32)
    x = torch.zeros(1, 64)
    x[0, :2] = 1.0
    ids, largest = gpu.linear_argmax(x.to(device, torch.bfloat16), gpu.pack(weight.to(device, torch.bfloat16)))
    assert (ids.item(), largest.item()) == (1, 256.0)  # 256.5 and 257 are both 256 in bfloat16


def test_linear_argmax_sees_what_is_not_finite(device: str) -> None:
    weight = torch.zeros(70, 64)
    weight[40, 0], weight[3, 1], weight[69, 2] = 60000.0, 1.0, -60000.0
    x = torch.zeros(6, 64)
    x[0, 0] = 1.0
    x[1, 0] = 2.0  # 120000 is infinite in float16
    x[2, 2] = 2.0  # so is -120000, which is not the largest
    x[3, 1] = math.nan
    x[4, 1] = math.inf  # infinite, and times 0 NaN
    x[5, 1] = 3.0
    ids, largest = gpu.linear_argmax(x.to(device, torch.float16), gpu.pack(weight.to(device, torch.float16)))
    assert ids.tolist() == [40, -1, -1, -1, -1, 3]
    assert largest[:3].tolist() == [60000.0, math.inf, 0.0]
    assert largest[3:5].isnan().all()
    assert largest[5].item() == 3.0


def test_what_is_refused(device: str) -> None:
    weight = torch.zeros(8, 48, device=device)
    with pytest.raises(ValueError, match="multiple of 32"):
        gpu.pack(weight, "int4")
    with pytest.raises(ValueError, match="load both in one dtype"):
        gpu.linear(torch.zeros(1, 48, dtype=torch.bfloat16, device=device), gpu.pack(weight))
    with pytest.raises(ValueError, match="choose float32, bfloat16 or float16"):
        gpu.linear(torch.zeros(1, 48, dtype=torch.float64, device=device), gpu.pack(weight))
    with pytest.raises(ValueError, match="rows of 48 numbers"):
        gpu.linear(torch.zeros(1, 47, device=device), gpu.pack(weight))


@each_format
@each_dtype
def test_the_order_of_a_sum_knows_no_rows(dtype: torch.dtype, format: WeightFormat) -> None:
    """What a launch's constants say of the order is the same for all rows."""
    for num_outputs, num_inputs in ((3072, 2048), (2048, 8192), (16384, 2048), (128256, 2048), (24, 96)):
        launches = [launch_for(rows, num_outputs, num_inputs, format, dtype, UNLIMITED) for rows in (*ROWS, 3000)]
        orders = {(launch.constants["BLOCK_K"], launch.constants["SEGMENTS"]) for launch in launches}
        assert len(orders) == 1


def test_few_rows_fill_the_device() -> None:
    """One row of the 1B's, the 3B's and the 8B's layers: a program for nearly each of 132 multiprocessors."""
    for num_outputs in (2048, 3072, 4096, 5120, 6144, 16384, 28672):
        for format in ("plain", "int8", "fp8"):
            launch = launch_for(1, num_outputs, 4096, format, torch.bfloat16, UNLIMITED)
            assert launch.num_programs >= 128
            assert launch.constants["AT_ONCE"]


def test_stages_fit_into_shared_memory() -> None:
    """99 KiB are a consumer card's."""
    for format in gpu.WEIGHT_FORMATS:
        order = order_of(4096, format, torch.bfloat16)
        for rows in ROWS:
            tile = tile_of(rows, 4096, format, torch.bfloat16)
            assert stages_within(99 << 10, tile, order, format, torch.bfloat16) >= 2
            assert stages_within(1 << 30, tile, order, format, torch.bfloat16) == tile.num_stages


def test_the_vendors_products_are_an_option(device: str) -> None:
    """For many rows, and for plain weights; the rest has the set's own bits."""
    steps: list[tuple[int, WeightFormat]] = [(vendor.FEW_ROWS, "plain"), (70, "int8"), (70, "plain")]
    for num_rows, format in steps:
        x, packed, weight = made(LinearCase("", num_rows, 256, 4 * 64), torch.bfloat16, format, device)
        product = vendor.linear(x, packed)
        assert_product(product, x, weight)
        if (num_rows, format) != (70, "plain"):
            assert torch.equal(product, gpu.linear(x, packed))
        assert torch.equal(vendor.linear_silu_mul(x, packed), gpu.silu_mul(product))
        case = cases.RopeCase("", Heads(64, 1, 2), 16, num_rows)
        inputs = RopeInputs.of(case, device)
        ours, theirs = (empty_cache(case, torch.bfloat16, False, device) for _ in range(2))
        queries = vendor.linear_rope_and_cache(x, packed, inputs.positions, inputs.cos_sin, inputs.slots, ours)
        expected = gpu.rope_and_cache(product, inputs.positions, inputs.cos_sin, inputs.slots, theirs)
        assert torch.equal(queries, expected)
        assert torch.equal(ours.keys.view(torch.int16), theirs.keys.view(torch.int16))


def test_the_option_has_whatever_the_set_has() -> None:
    assert all(hasattr(vendor, name) for name in gpu.__all__)
    assert vendor.rms_norm is gpu.rms_norm
    assert vendor.linear is not gpu.linear
