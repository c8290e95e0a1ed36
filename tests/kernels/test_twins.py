"""Every operation of every kernel set against its definition, run in float64, within bounds derived in
`pronk.kernels.cases`; and the definition against torch's and transformers' own.

Whatever an operation allocates and does not write reads as NaN here, and so does every place of a cache that no
sequence holds: neither may reach a result.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pronk.kernels import cases, for_device, reference
from pronk.kernels.cases import AttentionCase, AttentionInputs, LinearCase, RopeCase, RowsCase
from pronk.kernels.cpu import CpuKernels
from pronk.kernels.interface import Kernels, LayerCache, WeightFormat

SETS: dict[str, Kernels] = {"cpu": CpuKernels(2), "reference": reference}
"""`reference` in the case's dtype is held to the same bounds: it is what runs where no faster set does."""

each_set = pytest.mark.parametrize("kernels", SETS.values(), ids=SETS.keys())
each_dtype = pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def each(table: tuple[object, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", table, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> Iterator[None]:
    """torch fills what it allocates with NaN in this mode."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small products are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """actual in a working dtype; expected and bound in float64, of the same shape."""
    assert actual.shape == expected.shape == bound.shape
    error = (actual.double() - expected).abs()
    outside = ~(error <= bound)  # a NaN is outside too
    if outside.any():
        worst = (error / bound).nan_to_num(torch.inf).argmax()
        place = [int(index) for index in torch.unravel_index(worst, error.shape)]
        pytest.fail(
            f"{int(outside.sum())} of {error.numel()} elements are outside; at {place}: {actual.flatten()[worst]} "
            f"instead of {expected.flatten()[worst]}, off by {error.flatten()[worst]:.3g}, "
            f"allowed {bound.flatten()[worst]:.3g}"
        )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal, NaN for NaN."""
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@each_set
@each_dtype
@each(cases.LINEAR)
def test_linear(kernels: Kernels, case: LinearCase, dtype: torch.dtype) -> None:
    x, weight = cases.linear_inputs(case, dtype, seed=1)
    kept = x.clone()
    packed = kernels.pack(weight)
    assert (packed.out_features, packed.in_features) == (case.out_features, case.in_features)
    assert packed.nbytes >= weight.numel()
    actual = kernels.linear(x, packed)
    expected = x.double() @ weight.double().t()
    assert actual.dtype == dtype
    assert_within(actual, expected, cases.linear_bound(x, weight, expected, dtype))
    assert torch.equal(x, kept)


SCALED = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}
"""The largest number of each format."""


@pytest.mark.parametrize("format", SCALED)
def test_the_definition_of_packing_is_rounding_to_the_nearest(format: WeightFormat) -> None:
    """Of a row's, or a group's, numbers over its largest: no number of the format is nearer to any of them."""
    _, weight = cases.linear_inputs(LinearCase("", 1, 96, 40), torch.float32, seed=12)
    weight[7] = 0.0
    weight[8, 3] *= 1e6
    packed = reference.pack(weight, format)
    assert packed.scales is not None
    group = 32 if format == "int4" else 96
    grouped = weight.view(40, -1, group)
    scales = packed.scales.view(40, -1)
    expected = (grouped.abs().amax(-1) / SCALED[format]).clamp(min=torch.finfo(torch.float32).tiny)
    assert torch.equal(scales, expected)
    numbers = numbers_of(format)
    scaled = (grouped / scales.unsqueeze(-1)).double()
    off = (packed.data.double().view_as(scaled) - scaled).abs()
    nearest = (scaled.unsqueeze(-1) - numbers).abs().amin(-1)
    # A quotient may come out a rounding above the largest.
    assert (off <= nearest + scaled.abs() * cases.FLOAT32_ROUNDOFF).all()
    assert torch.isin(packed.data.double(), numbers).all()
    unpacked = reference.unpack(packed)
    assert unpacked.dtype == torch.float32
    assert torch.equal(unpacked, (packed.data.float().view_as(grouped) * scales.unsqueeze(-1)).view_as(weight))
    assert not unpacked[7].any()


def numbers_of(format: WeightFormat) -> Tensor:
    """All numbers of a format, but for int8's -128 and int4's -8, which have no opposite."""
    if format == "fp8":
        every = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn).double()
        return every[every.isfinite()]
    return torch.arange(-SCALED[format], SCALED[format] + 1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("format", "given", "kept"),
    [
        ("int8", [127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [127, 0, 2, 2, 0, -2]),
        ("int4", [-7.0, 0.5, 1.5, 2.5, -2.5, 6.5], [-7, 0, 2, 2, -2, 6]),
        ("fp8", [448.0, 17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10], [448, 16, 20, -16, 0, 2.0**-8]),
    ],
)
def test_packing_rounds_ties_to_even(format: WeightFormat, given: list[float], kept: list[float]) -> None:
    weight = F.pad(torch.tensor([given]), (0, 32 - len(given)))
    packed = reference.pack(weight, format)
    assert packed.scales is not None
    assert packed.scales.eq(1.0).all()
    assert packed.data[0, : len(given)].tolist() == kept


@each_set
@each_dtype
def test_linear_of_packed_weights(kernels: Kernels, dtype: torch.dtype) -> None:
    """In every format that a set has, the product is that of the numbers that the packed ones stand for."""
    x, weight = cases.linear_inputs(LinearCase("", 17, 96, 40), dtype, seed=13)
    for format in kernels.WEIGHT_FORMATS:
        packed = kernels.pack(weight, format)
        assert (packed.out_features, packed.in_features, packed.format) == (40, 96, format)
        numbers = reference.unpack(reference.pack(weight, format))
        expected = x.double() @ numbers.double().t()
        bound = cases.int8_bound if format == "int8" and kernels is SETS["cpu"] else cases.linear_bound
        assert_within(kernels.linear(x, packed), expected, bound(x, numbers, expected, dtype))


@each_set
@each_dtype
@pytest.mark.parametrize("heights", [[64], [32, 16, 17], [33, 7, 40], [16, 0, 3]], ids=str)
def test_a_weight_in_parts_is_packed_like_the_whole(kernels: Kernels, dtype: torch.dtype, heights: list[int]) -> None:
    """To the bit, and copied: what the parts were views of may be gone."""
    source = cases.generator(19)
    parts = [cases.normal(source, height, 96, dtype=dtype) for height in heights]
    for format in kernels.WEIGHT_FORMATS:
        whole = kernels.pack(torch.cat(parts), format)
        given = [part.clone() for part in parts]
        packed = kernels.pack(given, format)
        for part in given:
            part.fill_(torch.nan)
        assert (packed.out_features, packed.in_features) == (sum(heights), 96)
        for name, tensor in vars(whole).items():
            if isinstance(tensor, Tensor):
                assert same_bits(vars(packed)[name].contiguous(), tensor.contiguous()), name


@each_set
def test_packing_says_how_large_it_is(kernels: Kernels) -> None:
    weight = torch.ones(64, 128, dtype=torch.bfloat16)
    for format in kernels.WEIGHT_FORMATS:
        packed = kernels.pack(weight, format)
        scales = {"plain": 0, "int8": 4 * 64, "fp8": 4 * 64, "int4": 4 * 64 * 128 // 32}[format]
        assert (0 if packed.scales is None else packed.scales.nbytes) == scales
        assert packed.nbytes == sum(part.nbytes for part in vars(packed).values() if isinstance(part, Tensor))


@each_set
def test_packing_refuses_what_a_set_has_not(kernels: Kernels) -> None:
    for format in set(get_args(WeightFormat)) - set(kernels.WEIGHT_FORMATS):
        with pytest.raises(ValueError, match="choose"):
            kernels.pack(torch.ones(8, 64), format)
    if "int4" in kernels.WEIGHT_FORMATS:
        with pytest.raises(ValueError, match="multiple of 32"):
            kernels.pack(torch.ones(8, 48), "int4")


@each_set
@each_dtype
def test_linear_silu_mul_is_the_two_one_after_the_other(kernels: Kernels, dtype: torch.dtype) -> None:
    """To the bit, with the rounding in between."""
    x, weight = cases.linear_inputs(LinearCase("", 17, 96, 2 * 21), dtype, seed=14)
    for format in kernels.WEIGHT_FORMATS:
        packed = kernels.pack(weight, format)
        actual = kernels.linear_silu_mul(x, packed)
        assert actual.dtype == dtype
        assert actual.shape == (17, 21)
        assert torch.equal(actual, kernels.silu_mul(kernels.linear(x, packed)))


@each_set
@each_dtype
def test_linear_rope_and_cache_is_the_two_one_after_the_other(kernels: Kernels, dtype: torch.dtype) -> None:
    """To the bit, in the caches too, where a negative slot writes nothing."""
    case = RopeCase("", cases.Heads(64, 2, 3), 16, 33)
    inputs = cases.rope_inputs(case, dtype, seed=15)
    x, weight = cases.linear_inputs(LinearCase("", 33, 96, inputs.qkv.shape[1]), dtype, seed=15)
    slots = inputs.slots.clone()
    slots[::4] = -1
    fused, apart = (
        LayerCache(*(torch.full(inputs.cache_shape, torch.nan, dtype=dtype) for _ in range(2))) for _ in range(2)
    )
    packed = kernels.pack(weight)
    actual = kernels.linear_rope_and_cache(x, packed, inputs.positions, inputs.cos_sin, slots, fused)
    qkv = kernels.linear(x, packed)
    assert torch.equal(actual, kernels.rope_and_cache(qkv, inputs.positions, inputs.cos_sin, slots, apart))
    assert same_bits(fused.keys, apart.keys)
    assert same_bits(fused.values, apart.values)
    written = fused.values.isfinite().all(-1).all(1).flatten().nonzero().flatten()
    assert torch.equal(written, slots[slots >= 0].sort().values)


@each_set
@each_dtype
def test_linear_argmax(kernels: Kernels, dtype: torch.dtype) -> None:
    x, weight = cases.linear_inputs(LinearCase("", 33, 96, 1000), dtype, seed=16)
    packed = kernels.pack(weight)
    ids, largest = kernels.linear_argmax(x, packed)
    assert (ids.dtype, largest.dtype) == (torch.int64, torch.float32)
    for row, index, value in zip(kernels.linear(x, packed).tolist(), ids.tolist(), largest.tolist(), strict=True):
        assert value == max(row)
        assert index == row.index(value)


@each_set
def test_linear_argmax_of_equals_and_of_what_is_not_finite(kernels: Kernels) -> None:
    """Equal is what rounding to the dtype makes equal, and infinite what it makes infinite."""
    weight = torch.zeros(70, 64)
    weight[[9, 5, 61], 0] = 1.0
    weight[[20, 30], 1] = 2048.0
    weight[30, 4] = 0.5  # 2048.5 is 2048 in float16
    weight[40, 2], weight[69, 3] = 60000.0, -60000.0
    x = torch.zeros(7, 64)
    x[0, 0] = 3.0
    x[1, [1, 4]] = 1.0
    x[2, 2] = 1.0
    x[3, 2] = 2.0
    x[4, 3] = 2.0
    x[5, 0] = torch.nan
    x[6, 0] = torch.inf
    ids, largest = kernels.linear_argmax(x.half(), kernels.pack(weight.half()))
    assert ids.tolist() == [5, 20, 40, -1, -1, -1, -1]
    assert largest[:5].tolist() == [3.0, 2048.0, 60000.0, torch.inf, 0.0]
    assert largest[5:].isnan().all()


@each_set
@each_dtype
@each(cases.ROWS)
def test_embedding(kernels: Kernels, case: RowsCase, dtype: torch.dtype) -> None:
    source = cases.generator(2)
    table = cases.normal(source, 50, case.width, dtype=dtype)
    ids = torch.randint(50, (case.num_rows,), generator=source)
    ids[0] = 49
    expected = torch.stack([table[int(index)] for index in ids])
    assert torch.equal(kernels.embedding(ids, table), expected)


@each_set
@each_dtype
@each(cases.ROWS)
def test_rms_norm(kernels: Kernels, case: RowsCase, dtype: torch.dtype) -> None:
    source = cases.generator(3)
    x = cases.normal(source, case.num_rows, case.width, dtype=dtype) * 3
    weight = cases.normal(source, case.width, dtype=dtype)
    kept = x.clone()
    expected = reference.rms_norm(x.double(), weight.double(), cases.EPS)
    actual = kernels.rms_norm(x, weight, cases.EPS)
    assert actual.dtype == dtype
    assert_within(actual, expected, cases.norm_bound(expected, dtype))
    assert torch.equal(x, kept)


@each_set
@each_dtype
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_rms_norm_of_small_and_large_rows(kernels: Kernels, dtype: torch.dtype, scale: float) -> None:
    """With eps, a row of zeros gives zeros; squares that float16 cannot hold are taken in float32."""
    x = (cases.normal(cases.generator(4), 3, 64, dtype=torch.float32) * scale).to(dtype)
    weight = torch.ones(64, dtype=dtype)
    expected = reference.rms_norm(x.double(), weight.double(), cases.EPS)
    assert_within(kernels.rms_norm(x, weight, cases.EPS), expected, cases.norm_bound(expected, dtype))


@each_set
@each_dtype
@each(cases.ROWS)
def test_add_rms_norm(kernels: Kernels, case: RowsCase, dtype: torch.dtype) -> None:
    source = cases.generator(5)
    x = cases.normal(source, case.num_rows, case.width, dtype=dtype)
    residual = cases.normal(source, case.num_rows, case.width, dtype=dtype) * 10
    weight = cases.normal(source, case.width, dtype=dtype)
    kept = x.clone(), residual.clone()
    normed, total = kernels.add_rms_norm(x, residual, weight, cases.EPS)
    assert normed.dtype == total.dtype == dtype
    exact = x.double() + residual.double()
    assert_within(total, exact, cases.rounded(exact, torch.zeros_like(exact), dtype))
    # The norm is of the sum as it was rounded.
    expected = reference.rms_norm(total.double(), weight.double(), cases.EPS)
    assert_within(normed, expected, cases.norm_bound(expected, dtype))
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])


@each_set
@each_dtype
@each(cases.ROWS)
def test_silu_mul(kernels: Kernels, case: RowsCase, dtype: torch.dtype) -> None:
    source = cases.generator(6)
    gate_up = cases.normal(source, case.num_rows, 2 * case.width, dtype=dtype) * 4
    kept = gate_up.clone()
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = gate * torch.sigmoid(gate) * up
    actual = kernels.silu_mul(gate_up)
    assert actual.dtype == dtype
    assert_within(actual, expected, cases.silu_mul_bound(expected, up, dtype))
    assert torch.equal(gate_up, kept)


@each_set
@each_dtype
def test_silu_mul_far_from_zero(kernels: Kernels, dtype: torch.dtype) -> None:
    """No overflow in between makes a NaN."""
    gate = torch.tensor([-1e4, -200.0, -89.0, -88.0, -17.0, -1e-3, 0.0, 1e-3, 17.0, 88.0, 89.0, 200.0, 1e4])
    gate_up = torch.cat([gate, torch.full_like(gate, -1.5)]).to(dtype).unsqueeze(0)
    wide_gate, up = gate_up.double().chunk(2, dim=-1)
    expected = wide_gate * torch.sigmoid(wide_gate) * up
    assert_within(kernels.silu_mul(gate_up), expected, cases.silu_mul_bound(expected, up, dtype))


@each_set
@each_dtype
@each(cases.ROPE)
def test_rope_and_cache(kernels: Kernels, case: RopeCase, dtype: torch.dtype) -> None:
    inputs = cases.rope_inputs(case, dtype, seed=7)
    heads = case.heads
    cache = LayerCache(*(torch.full(inputs.cache_shape, torch.nan, dtype=dtype) for _ in range(2)))
    kept = inputs.qkv.clone()
    actual = kernels.rope_and_cache(inputs.qkv, inputs.positions, inputs.cos_sin, inputs.slots, cache)
    assert torch.equal(inputs.qkv, kept)
    assert actual.dtype == dtype

    parts = inputs.qkv.view(case.num_tokens, -1, heads.head_dim)
    q, k, v = parts.split([heads.num_heads, heads.num_kv_heads, heads.num_kv_heads], dim=1)
    table = inputs.cos_sin[inputs.positions]
    expected = turned(q, table)
    assert_within(actual, expected, cases.rope_bound(q, table, expected, dtype))

    blocks, places = inputs.slots // case.block_size, inputs.slots % case.block_size
    expected = turned(k, table)
    assert_within(cache.keys[blocks, :, places], expected, cases.rope_bound(k, table, expected, dtype))
    assert torch.equal(cache.values[blocks, :, places], v)
    for side in (cache.keys, cache.values):
        side[blocks, :, places] = torch.nan
        assert side.isnan().all(), "a place that no slot names was written"


def turned(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Pairs (i, i + D/2) as complex numbers, turned by multiplication: another way to the same rotation."""
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = cos_sin.double().unsqueeze(1).chunk(2, dim=-1)
    product = torch.complex(first, second) * torch.complex(cos, sin)
    return torch.cat([product.real, product.imag], dim=-1)


@each_set
@each_dtype
@each(cases.ATTENTION)
def test_attention(kernels: Kernels, case: AttentionCase, dtype: torch.dtype) -> None:
    inputs = cases.attention_inputs(case, dtype, seed=8)
    kept = inputs.q.clone(), inputs.cache.keys.clone(), inputs.cache.values.clone()
    actual = attend(kernels, inputs)
    expected = definition(inputs)
    assert actual.dtype == dtype
    # On tile registers weights have the dtype of what they meet.
    weights = dtype if kernels is SETS["cpu"] and dtype == torch.bfloat16 else torch.float32
    assert_within(actual, expected, cases.attention_bound(inputs, expected, dtype, weights))
    assert torch.equal(inputs.q, kept[0])
    assert same_bits(inputs.cache.keys, kept[1])
    assert same_bits(inputs.cache.values, kept[2])


@each(cases.ATTENTION)
def test_the_definition_of_attention_is_torchs(case: AttentionCase) -> None:
    inputs = cases.attention_inputs(case, torch.float64, seed=8)
    torch.testing.assert_close(definition(inputs), dense_attention(inputs), rtol=1e-12, atol=1e-12)


@each_set
def test_attention_takes_no_other_sets_plan(kernels: Kernels) -> None:
    inputs = cases.attention_inputs(cases.ATTENTION[0], torch.float32, seed=8)
    with pytest.raises(TypeError, match="another kernel set"):
        kernels.attention(inputs.q, inputs.cache, object())


def attend(kernels: Kernels, inputs: AttentionInputs) -> Tensor:
    plan = kernels.plan_attention(inputs.queries, num_heads=inputs.q.shape[1], cache=inputs.cache)
    return kernels.attention(inputs.q, inputs.cache, plan)


def definition(inputs: AttentionInputs) -> Tensor:
    """The reference in float64 on the same numbers."""
    plan = reference.plan_attention(inputs.queries, num_heads=inputs.q.shape[1], cache=inputs.cache)
    cache = LayerCache(inputs.cache.keys.double(), inputs.cache.values.double())
    return reference.attention(inputs.q.double(), cache, plan)


def dense_attention(inputs: AttentionInputs) -> Tensor:
    """torch's own, sequence by sequence, on keys and values that never were in blocks."""
    outputs = []
    pieces = zip(inputs.q.split(inputs.queries.lens.tolist()), inputs.keys, inputs.values, strict=True)
    for q, keys, values in pieces:
        num_keys = keys.shape[1]
        visible = torch.ones(num_keys, num_keys, dtype=torch.bool).tril()[num_keys - len(q) :]
        attended = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys[None], values[None], attn_mask=visible, enable_gqa=True
        )
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_definition_of_rope_is_transformers(head_dim: int, dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    case = RopeCase("", cases.Heads(head_dim, 2, 3), 16, 33)
    inputs = cases.rope_inputs(case, dtype, seed=9)
    cache = LayerCache(*(torch.zeros(inputs.cache_shape, dtype=dtype) for _ in range(2)))
    q = reference.rope_and_cache(inputs.qkv, inputs.positions, inputs.cos_sin, inputs.slots, cache)
    cos, sin = inputs.cos_sin[inputs.positions].to(dtype).chunk(2, dim=-1)
    theirs_q, theirs_k = apply_rotary_pos_emb(
        inputs.qkv[:, : 6 * head_dim].view(1, 33, 6, head_dim),
        inputs.qkv[:, 6 * head_dim : 8 * head_dim].view(1, 33, 2, head_dim),
        torch.cat([cos, cos], dim=-1)[None],
        torch.cat([sin, sin], dim=-1)[None],
        unsqueeze_dim=2,
    )
    assert torch.equal(q, theirs_q[0])
    assert torch.equal(cache.keys[inputs.slots // 16, :, inputs.slots % 16], theirs_k[0])


@each_dtype
def test_the_definition_of_rms_norm_is_transformers(dtype: torch.dtype) -> None:
    """To the bit, in every dtype: this is also where the rounding before the weight is held."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    source = cases.generator(10)
    x = cases.normal(source, 33, 96, dtype=dtype)
    theirs = LlamaRMSNorm(96, eps=cases.EPS).to(dtype)
    with torch.no_grad():
        theirs.weight.copy_(cases.normal(source, 96, dtype=dtype))
        assert torch.equal(reference.rms_norm(x, theirs.weight, cases.EPS), theirs(x))


@each_dtype
def test_silu_mul_is_transformers_mlp_gate(dtype: torch.dtype) -> None:
    """Hugging Face rounds silu(gate) before the product; ours is rounded once, so it is as near or nearer."""
    gate_up = cases.normal(cases.generator(11), 33, 2 * 96, dtype=dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    theirs = (F.silu(gate) * up).double()
    expected = gate.double() * torch.sigmoid(gate.double()) * up.double()
    ours = reference.silu_mul(gate_up).double()
    assert (ours - expected).norm() <= (theirs - expected).norm() * 1.01
    torch.testing.assert_close(ours, theirs, rtol=4 * cases.roundoff(dtype), atol=1e-6)


@each_set
def test_a_set_has_every_operation(kernels: Kernels) -> None:
    """mypy holds the types; this holds the names and the way they are called, in a running program."""
    operations = {
        name: member for name, member in vars(Kernels).items() if inspect.isfunction(member) and name[0] != "_"
    }
    assert "attention" in operations
    for name, declared in operations.items():
        ours = inspect.signature(getattr(kernels, name)).parameters.values()
        declared_parameters = list(inspect.signature(declared).parameters.values())[1:]
        assert [(p.name, p.kind) for p in ours] == [(p.name, p.kind) for p in declared_parameters], name


@each_set
def test_a_set_describes_itself(kernels: Kernels) -> None:
    for dtype in cases.DTYPES:
        assert kernels.describe(dtype)


def test_a_device_has_its_set() -> None:
    assert isinstance(for_device("cpu", num_threads=1), CpuKernels)
    with pytest.raises(ValueError, match="they are for --device cuda"):
        for_device("cpu", vendor_products=True)
    with pytest.raises(ValueError, match="choose cpu or cuda"):
        for_device("tpu")
