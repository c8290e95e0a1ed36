"""The instructions of other machines, as far as this one can run them, and other numbers of threads: int8 gives the
same numbers by all of them, floats the same bits by all that add in the order of the inputs; each is row-invariant.

Code for a processor without AVX-512 is compiled as for that processor, so that its registers are the narrow ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pronk.kernels import cases, reference
from pronk.kernels.cpu import CpuKernels
from pronk.kernels.cpu.instructions import Instructions, of_this_machine
from pronk.kernels.jit import compiler

HERE = of_this_machine()


def machines() -> Iterator[tuple[str, Instructions, str | None]]:
    """-> name, instructions, and the processor to compile for; None: this one."""
    has = compiler.features()
    yield "this", HERE, None
    yield "plain", Instructions(tiles=False, dot="plain", wide=False), None
    if HERE.tiles:
        yield "no-tiles", replace(HERE, tiles=False), None
    if "avx2" in has and "fma" in has:
        yield "avx2", Instructions(tiles=False, dot="avx2", wide=False), "haswell"
    if "avxvnni" in has:
        yield "avxvnni", Instructions(tiles=False, dot="vnni256", wide=False), None
    if "avx512bw" in has:
        yield "avx512", Instructions(tiles=False, dot="avx2", wide=True), "skylake-avx512"


MACHINES = {name: (instructions, processor) for name, instructions, processor in machines()}
each_machine = pytest.mark.parametrize("name", MACHINES)


@contextmanager
def compiled_for(processor: str | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        if processor is not None:
            patch.setattr(compiler, "host", lambda: (processor, ""))
        yield


def kernels_of(name: str, num_threads: int = 1) -> CpuKernels:
    return CpuKernels(num_threads, MACHINES[name][0])


def linear(name: str, x: Tensor, weight: Tensor, format: str, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Also checks that some of the rows have the same bits alone."""
    with compiled_for(MACHINES[name][1], monkeypatch):
        kernels = kernels_of(name)
        packed = kernels.pack(weight, format)  # type: ignore[arg-type]
        together = kernels.linear(x, packed)
        for row in range(0, len(x), 7):
            assert torch.equal(kernels.linear(x[row : row + 1], packed)[0], together[row])
    return together


@each_machine
@pytest.mark.parametrize("shape", [(33, 100), (96, 512)], ids=str)
@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_int8_is_the_same_everywhere(
    name: str, shape: tuple[int, int], num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = cases.generator(1)
    weight, x = (cases.normal(source, *each, dtype=torch.float32) for each in (shape, (num_rows, shape[1])))
    weight[3], x[0, :7] = 0.0, 40.0
    found = linear(name, x, weight, "int8", monkeypatch)
    weights = reference.pack(weight, "int8")
    assert weights.scales is not None
    scales = x.abs().amax(1, keepdim=True) / 16319
    numbers = (x / scales).round()
    upper = ((numbers + 64) / 128).floor()
    planes = [(plane.double() @ weights.data.double().t()).float() for plane in (upper, numbers - 128 * upper)]
    assert torch.equal(found, (planes[0] * 128 + planes[1]) * weights.scales * scales)


@each_machine
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_floats_are_the_same_where_they_are_added_in_order(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = cases.generator(2)
    weight, x = (cases.normal(source, *each, dtype=dtype) for each in ((70, 130), (23, 130)))
    found = linear(name, x, weight, "plain", monkeypatch)
    expected = x.double() @ weight.double().t()
    assert ((found.double() - expected).abs() <= cases.linear_bound(x, weight, expected, dtype)).all()
    if not (MACHINES[name][0].tiles and dtype == torch.bfloat16):
        assert torch.equal(found, linear("plain", x, weight, "plain", monkeypatch))


@each_machine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_and_rows_are_the_same_everywhere(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention on tile registers, of bfloat16, is a thing of its own."""
    case = cases.AttentionCase("", cases.Heads(64, 2, 3), 16, (cases.Chunk(1, 700), cases.Chunk(19, 40)))
    inputs = cases.attention_inputs(case, dtype, seed=3)
    source = cases.generator(4)
    x, residual, weight = (cases.normal(source, *each, dtype=dtype) for each in ((5, 70), (5, 70), (70,)))

    def results(kernels: CpuKernels) -> list[Tensor]:
        plan = kernels.plan_attention(inputs.queries, num_heads=6, cache=inputs.cache)
        rows = [*kernels.add_rms_norm(x, residual, weight, cases.EPS), kernels.silu_mul(x)]
        return [kernels.attention(inputs.q, inputs.cache, plan), *rows]

    with compiled_for(MACHINES[name][1], monkeypatch):
        found = results(kernels_of(name))
    alike = "this" if MACHINES[name][0].tiles else "plain"
    for one, other in zip(found, results(kernels_of(alike)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("length", [100, 512, 513, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_splits_done_apart_give_the_bits_of_splits_done_in_turn(length: int, dtype: torch.dtype) -> None:
    """One long sequence keeps many threads busy with a split each; one thread goes through them in turn."""
    case = cases.AttentionCase("", cases.Heads(64, 1, 4), 16, (cases.Chunk(1, length),))
    inputs = cases.attention_inputs(case, dtype, seed=5)
    found = []
    for num_threads in (1, 2, 7):
        kernels = CpuKernels(num_threads)
        plan = kernels.plan_attention(inputs.queries, num_heads=4, cache=inputs.cache)
        found.append(kernels.attention(inputs.q, inputs.cache, plan))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    plain = reference.plan_attention(inputs.queries, num_heads=4, cache=inputs.cache)
    exact = reference.attention(inputs.q, inputs.cache, plain)
    assert torch.allclose(found[0], exact, atol=1e-5 if dtype == torch.float32 else 0.05)


def test_a_row_that_is_not_finite_is_not_finite_in_int8() -> None:
    kernels = CpuKernels(1)
    weight = kernels.pack(cases.normal(cases.generator(6), 32, 64, dtype=torch.float32), "int8")
    x = torch.ones(4, 64)
    x[0, 3], x[1, 5], x[2] = torch.nan, torch.inf, 0.0
    out = kernels.linear(x, weight)
    assert not out[:2].isfinite().any()
    assert (out[2] == 0).all()
    assert out[3].isfinite().all()


def test_rows_of_ids_that_are_not_contiguous() -> None:
    """A copy is made of them, which must live until it was read: freed memory is written over here."""
    kernels = CpuKernels(1)
    weight = cases.normal(cases.generator(7), 500, 64, dtype=torch.bfloat16)
    packed = kernels.pack(weight)
    ids = torch.randint(500, (3000, 2), generator=cases.generator(8))[:, 0]
    for _ in range(20):
        assert torch.equal(kernels.embedding(ids, packed), weight[ids])


def test_weights_of_another_set_are_refused() -> None:
    with pytest.raises(TypeError, match="another kernel set"):
        CpuKernels(1).linear(torch.ones(1, 4), reference.pack(torch.ones(2, 4)))


@pytest.mark.parametrize(
    ("heads", "block_size", "message"),
    [(cases.Heads(24, 1, 1), 16, "multiples of 16"), (cases.Heads(64, 1, 32), 16, "32 query heads"),
     (cases.Heads(64, 1, 1), 18, "blocks of 18")],
)  # fmt: skip
def test_what_no_kernel_is_made_for(heads: cases.Heads, block_size: int, message: str) -> None:
    nobody = torch.zeros(0, dtype=torch.int64)
    cache = type(cases.attention_inputs(cases.ATTENTION[0], torch.float32, 0).cache)(
        *(torch.zeros(1, heads.num_kv_heads, block_size, heads.head_dim) for _ in range(2))
    )
    queries = cases.Queries(nobody, nobody, nobody, nobody.view(0, 1), max_len=1, max_context_len=1)
    with pytest.raises(ValueError, match=message):
        CpuKernels(1).plan_attention(queries, num_heads=heads.num_heads, cache=cache)
