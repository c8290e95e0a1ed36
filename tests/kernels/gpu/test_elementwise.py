"""Norms, SiLU · mul, rotary positions and embedding: against their definitions, and each row against itself alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pronk.kernels import cases, reference
from pronk.kernels.cases import Heads, RopeCase
from pronk.kernels.gpu.activation import silu_mul_rows as silu_mul
from pronk.kernels.gpu.embedding import embedding
from pronk.kernels.gpu.norm import add_rms_norm, rms_norm
from pronk.kernels.gpu.rope import rope_and_cache
from pronk.kernels.interface import LayerCache

each_dtype = pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_width = pytest.mark.parametrize("width", [1, 17, 64, 1000, 2048, 3072])
ROWS = 5


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """actual in a working dtype; expected and bound in float64, of the same shape."""
    assert actual.shape == expected.shape == bound.shape
    error = (actual.double() - expected).abs()
    outside = ~(error <= bound)  # a NaN is outside too
    assert not outside.any(), f"{int(outside.sum())} of {error.numel()} off, by {(error / bound).max()} of the bound"


def assert_rows_stand_alone(operation: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """A row's bits are those it has alone, and in a batch of another size and order."""
    together = operation(x)
    for row in range(len(x)):
        assert torch.equal(operation(x[row : row + 1]), together[row : row + 1])
    assert torch.equal(operation(x.flip(0)[:3].contiguous()), together.flip(0)[:3])


@each_dtype
@each_width
def test_rms_norm(device: str, width: int, dtype: torch.dtype) -> None:
    source = cases.generator(1)
    x = (cases.normal(source, ROWS, width, dtype=dtype) * 3).to(device)
    weight = cases.normal(source, width, dtype=dtype).to(device)
    kept = x.clone()
    actual = rms_norm(x, weight, cases.EPS)
    expected = reference.rms_norm(x.double(), weight.double(), cases.EPS)
    assert actual.dtype == dtype
    assert_within(actual, expected, cases.norm_bound(expected, dtype))
    assert torch.equal(x, kept)
    assert_rows_stand_alone(lambda rows: rms_norm(rows, weight, cases.EPS), x)


@each_dtype
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_rms_norm_of_small_and_large_rows(device: str, dtype: torch.dtype, scale: float) -> None:
    x = (cases.normal(cases.generator(2), 3, 64, dtype=torch.float32) * scale).to(dtype).to(device)
    weight = torch.ones(64, dtype=dtype, device=device)
    expected = reference.rms_norm(x.double(), weight.double(), cases.EPS)
    assert_within(rms_norm(x, weight, cases.EPS), expected, cases.norm_bound(expected, dtype))


def test_rms_norm_rounds_before_the_weight(device: str) -> None:
    """Meta's order and Hugging Face's: normed, rounded, times the weight, rounded. Nearly all of the definition's bits;
    a row's mean square may differ in its last one."""
    source = cases.generator(3)
    x, weight = (cases.normal(source, *shape, dtype=torch.bfloat16).to(device) for shape in ((8, 2048), (2048,)))
    same = rms_norm(x, weight, cases.EPS) == reference.rms_norm(x, weight, cases.EPS)
    assert same.float().mean() > 0.999
    once = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + cases.EPS) * weight).to(x.dtype)
    assert (rms_norm(x, weight, cases.EPS) == once).float().mean() < 0.9


@each_dtype
@each_width
def test_add_rms_norm(device: str, width: int, dtype: torch.dtype) -> None:
    """The sum has the definition's bits, and the norm those of `rms_norm` of the sum."""
    source = cases.generator(4)
    x = cases.normal(source, ROWS, width, dtype=dtype).to(device)
    residual = (cases.normal(source, ROWS, width, dtype=dtype) * 10).to(device)
    weight = cases.normal(source, width, dtype=dtype).to(device)
    kept = x.clone(), residual.clone()
    normed, total = add_rms_norm(x, residual, weight, cases.EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(total, weight, cases.EPS))
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])


def test_norms_take_rows_that_are_apart(device: str) -> None:
    """Some columns of a wider table, as a fused product leaves them; columns that are apart are refused."""
    source = cases.generator(5)
    table = cases.normal(source, ROWS, 3 * 64, dtype=torch.bfloat16).to(device)
    weight = cases.normal(source, 64, dtype=torch.bfloat16).to(device)
    x, residual = table[:, 64:128], table[:, 128:]
    assert torch.equal(rms_norm(x, weight, cases.EPS), rms_norm(x.contiguous(), weight, cases.EPS))
    apart = add_rms_norm(x, residual, weight, cases.EPS)
    together = add_rms_norm(x.contiguous(), residual.contiguous(), weight, cases.EPS)
    assert torch.equal(apart[0], together[0])
    assert torch.equal(apart[1], together[1])
    with pytest.raises(ValueError, match="not contiguous"):
        rms_norm(table[:, ::3], weight, cases.EPS)


@each_dtype
@pytest.mark.parametrize("width", [1, 17, 1000, 1024, 3000])
def test_silu_mul(device: str, width: int, dtype: torch.dtype) -> None:
    gate_up = (cases.normal(cases.generator(6), ROWS, 2 * width, dtype=dtype) * 4).to(device)
    kept = gate_up.clone()
    actual = silu_mul(gate_up)
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = gate * torch.sigmoid(gate) * up
    assert actual.dtype == dtype
    assert_within(actual, expected, cases.silu_mul_bound(expected, up, dtype))
    assert torch.equal(gate_up, kept)
    assert_rows_stand_alone(silu_mul, gate_up)


@each_dtype
def test_silu_mul_everywhere(device: str, dtype: torch.dtype) -> None:
    """No overflow on the way makes a NaN, and e^x is as good far from zero as near it."""
    gate = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([-1e4, -1e-30, -0.0, 0.0, 1e-30, 1e4])])
    gate_up = torch.cat([gate, torch.full_like(gate, -1.5)]).to(dtype).unsqueeze(0).to(device)
    wide_gate, up = gate_up.double().chunk(2, dim=-1)
    expected = wide_gate * torch.sigmoid(wide_gate) * up
    assert_within(silu_mul(gate_up), expected, cases.silu_mul_bound(expected, up, dtype))


ROPE = [
    RopeCase(f"{heads.name}-p{block_size}", heads, block_size, ROWS)
    for heads, block_size in (
        (Heads(64, 8, 4), 16),
        (Heads(128, 8, 3), 64),
        (Heads(64, 1, 1), 64),
        (Heads(128, 2, 3), 16),
        (Heads(64, 1, 16), 16),
    )
]
each_rope = pytest.mark.parametrize("case", ROPE, ids=lambda case: case.name)


def empty_cache(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, scaled: bool) -> LayerCache:
    """Of NaN."""
    keys, values = (torch.full(shape, math.nan, device=device).to(dtype) for _ in range(2))
    scales = [torch.full(shape[:3], math.nan, device=device) for _ in range(2)] if scaled else [None, None]
    return LayerCache(keys, values, *scales)


def as_bytes(cache: LayerCache) -> list[Tensor]:
    """Each tensor of the cache."""
    tensors = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    return [tensor.view(torch.uint8) for tensor in tensors if tensor is not None]


@each_dtype
@each_rope
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "float8"])
def test_rope_and_cache_has_the_definitions_bits(device: str, case: RopeCase, dtype: torch.dtype, scaled: bool) -> None:
    """Every operation in it is rounded once by rule, so nothing is left to differ: queries, caches and scales. The
    definition runs on the CPU: on a GPU torch divides by a number by multiplying with its inverse. One token in three
    is not written."""
    inputs = cases.rope_inputs(case, dtype, seed=7)
    arguments = (inputs.qkv, inputs.positions, inputs.cos_sin, inputs.slots)
    inputs.slots[::3] = -1
    inputs.qkv[1, : case.heads.head_dim] = 0
    inputs.qkv[1, -case.heads.head_dim :] = 0  # a head whose scale is the smallest there is
    on_device = [tensor.to(device) for tensor in arguments]
    kept = inputs.qkv.clone()
    storage = torch.float8_e4m3fn if scaled else dtype
    actual = empty_cache(inputs.cache_shape, storage, device, scaled)
    expected = empty_cache(inputs.cache_shape, storage, "cpu", scaled)
    queries = rope_and_cache(*on_device, actual)
    definition = reference.rope_and_cache(*arguments, expected)
    assert torch.equal(queries.cpu(), definition)
    for ours, theirs in zip(as_bytes(actual), as_bytes(expected), strict=True):
        assert torch.equal(ours.cpu(), theirs)
    assert torch.equal(on_device[0].cpu(), kept)


@each_rope
def test_a_rotated_row_stands_alone(device: str, case: RopeCase) -> None:
    inputs = cases.rope_inputs(case, torch.bfloat16, seed=8)

    def run(rows: Tensor) -> Tensor:
        cache = empty_cache(inputs.cache_shape, torch.bfloat16, device, scaled=False)
        chosen = (tensor[rows].to(device) for tensor in (inputs.qkv, inputs.positions))
        qkv, positions = chosen
        slots = inputs.slots[rows].to(device)
        queries = rope_and_cache(qkv, positions, inputs.cos_sin.to(device), slots, cache)
        written = (side[slots // case.block_size, :, slots % case.block_size] for side in (cache.keys, cache.values))
        return torch.cat([queries, *written], dim=1)

    assert_rows_stand_alone(run, torch.arange(ROWS))


def test_rope_refuses_heads_of_an_odd_size(device: str) -> None:
    cache = empty_cache((4, 1, 16, 96), torch.bfloat16, device, scaled=False)
    with pytest.raises(ValueError, match="heads of 96"):
        rope_and_cache(torch.zeros(1, 3 * 96, dtype=torch.bfloat16, device=device), *[torch.zeros(1)] * 3, cache)


@each_dtype
@pytest.mark.parametrize("width", [1, 17, 1000, 2048])
def test_embedding(device: str, width: int, dtype: torch.dtype) -> None:
    source = cases.generator(9)
    table = cases.normal(source, 50, width, dtype=dtype).to(device)
    ids = torch.tensor([49, 0, 7, 7, 31], device=device)
    assert torch.equal(embedding(ids, table), table[ids])


def test_an_id_that_is_none_gives_nan(device: str) -> None:
    table = torch.ones(50, 64, device=device)
    rows = embedding(torch.tensor([3, -1, 50, 2**40, 49], device=device), table)
    assert rows.isnan().all(1).tolist() == [False, True, True, True, False]
    assert rows[[0, 4]].eq(1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_no_rows(device: str, dtype: torch.dtype) -> None:
    nothing, weight = torch.empty(0, 64, dtype=dtype, device=device), torch.ones(64, dtype=dtype, device=device)
    assert rms_norm(nothing, weight, cases.EPS).shape == (0, 64)
    assert [part.shape for part in add_rms_norm(nothing, nothing, weight, cases.EPS)] == [(0, 64), (0, 64)]
    assert silu_mul(nothing).shape == (0, 32)
    assert embedding(torch.empty(0, dtype=torch.int64, device=device), torch.ones(3, 4, device=device)).shape == (0, 4)
    cache = empty_cache((1, 1, 16, 16), dtype, device, scaled=False)
    empty = torch.empty(0, dtype=torch.int64, device=device)
    angles = torch.ones(1, 16, device=device)
    assert rope_and_cache(nothing, empty, angles, empty, cache).shape == (0, 2, 16)
