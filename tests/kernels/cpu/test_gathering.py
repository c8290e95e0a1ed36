"""Operations that are launched together have the bits that they have one by one, whatever their shapes.

Shapes that fit are handed from kernel to kernel; odd ones are copied by torch in between, which must find them made.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pronk.kernels.cpu import CpuKernels
from pronk.kernels.interface import LayerCache, Queries, Weight, WeightFormat

BLOCK, BLOCKS = 16, 40
DTYPES = [torch.bfloat16, torch.float32]
WIDTHS = st.sampled_from([16, 32, 45, 64, 96, 128, 200])


class Block:
    """Something like a layer, of any width: attention and an MLP, twice."""

    def __init__(
        self, kernels: CpuKernels, dtype: torch.dtype, format: WeightFormat, hidden: int, inner: int, tokens: int
    ) -> None:
        self.generator = torch.Generator().manual_seed(hidden * 1000 + inner * 10 + tokens)
        self.kernels, self.dtype, self.format = kernels, dtype, format
        self.table = self.weight(300, hidden, "plain")
        self.qkv = self.weight(8 * 32, hidden, format)  # 4 query heads, 2 KV heads of 32
        self.o = self.weight(hidden, 4 * 32, format)
        self.gate_up = self.weight(2 * inner, hidden, format)
        self.down = self.weight(hidden, inner, format)
        self.norm = self.random(hidden)
        self.cos_sin = self.random(BLOCK * BLOCKS, 32).float()
        self.ids = torch.randint(300, (tokens,), generator=self.generator)
        self.tokens = tokens
        self.positions = torch.arange(tokens)
        self.queries = Queries(
            starts=torch.tensor([0]),
            lens=torch.tensor([tokens]),
            context_lens=torch.tensor([tokens]),
            block_tables=torch.arange(BLOCKS).view(1, -1),
            max_len=tokens,
            max_context_len=tokens,
        )

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def weight(self, rows: int, columns: int, format: WeightFormat) -> Weight:
        return self.kernels.pack(self.random(rows, columns) / columns**0.5, format)

    def __call__(self) -> list[Tensor]:
        """-> all that came into being, and the cache."""
        kernels = self.kernels
        shape = (BLOCKS, 2, BLOCK, 32)
        cache = LayerCache(*(torch.zeros(shape, dtype=self.dtype) for _ in range(2)))
        residual = kernels.embedding(self.ids, self.table)
        x = kernels.rms_norm(residual, self.norm, 1e-5)
        seen = [residual]
        for _ in range(2):
            plan = kernels.plan_attention(self.queries, num_heads=4, cache=cache)
            q = kernels.linear_rope_and_cache(x, self.qkv, self.positions, self.cos_sin, self.positions, cache)
            attended = kernels.linear(kernels.attention(q, cache, plan).flatten(1), self.o)
            x, residual = kernels.add_rms_norm(attended, residual, self.norm, 1e-5)
            mlp = kernels.linear(kernels.linear_silu_mul(x, self.gate_up), self.down)
            x, residual = kernels.add_rms_norm(mlp, residual, self.norm, 1e-5)
            seen += [x, residual]
        turned = kernels.silu_mul(x.t()[:, : self.tokens // 2 * 2])  # a view, whose numbers are not side by side
        return [*seen, turned, cache.keys, cache.values]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["plain", "int8"])
@settings(deadline=None, max_examples=20)
@given(hidden=WIDTHS, inner=WIDTHS, tokens=st.integers(1, 70), threads=st.sampled_from([1, 3]))
def test_together_is_one_by_one(
    dtype: torch.dtype, format: WeightFormat, hidden: int, inner: int, tokens: int, threads: int
) -> None:
    kernels = CpuKernels(threads)
    block = Block(kernels, dtype, format, hidden, inner, tokens)
    expected = block()
    for _ in range(2):  # the second finds memory of the first
        with kernels.gathering():
            found = block()
        assert all(map(torch.equal, found, expected))


def test_results_last_as_long_as_their_tensors() -> None:
    kernels = CpuKernels(1)
    block = Block(kernels, torch.float32, "plain", 64, 64, 5)
    with kernels.gathering():
        first = block()
    kept = [each.clone() for each in first]
    other = Block(kernels, torch.float32, "plain", 64, 96, 5)
    for _ in range(3):
        with kernels.gathering():
            other()
    assert all(map(torch.equal, first, kept))


def test_after_an_error_operations_are_launched_one_by_one_again() -> None:
    kernels = CpuKernels(1)
    block = Block(kernels, torch.float32, "plain", 64, 64, 5)
    expected = block()

    def fail() -> None:
        with kernels.gathering():
            block()
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert all(map(torch.equal, block(), expected))


def test_a_recording_gathers_by_itself() -> None:
    kernels = CpuKernels(1)
    weight, x = kernels.pack(torch.randn(32, 64)), torch.randn(3, 64)
    expected = kernels.linear(x, weight)

    def step() -> Tensor:
        with kernels.gathering():
            return kernels.linear(x, weight)

    replay, result = kernels.capture(step)
    replay()
    assert torch.equal(result, expected)
