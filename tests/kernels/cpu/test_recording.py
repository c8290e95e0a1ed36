"""A recorded step and the same step launched operation by operation: the same bits, whatever the lengths."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pronk.kernels.cpu import CpuKernels
from pronk.kernels.cpu.recording import Pool
from pronk.kernels.interface import LayerCache, Queries, WeightFormat

BLOCK = 16
MOST_BLOCKS = 80
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64


class Step:
    """One layer's attention for sequences that decode, with torch's operations around it."""

    def __init__(self, kernels: CpuKernels, num_seqs: int) -> None:
        generator = torch.Generator().manual_seed(num_seqs)
        shape = (MOST_BLOCKS, KV_HEADS, BLOCK, HEAD_DIM)
        self.kernels = kernels
        self.cache = LayerCache(*(torch.randn(shape, generator=generator) for _ in range(2)))
        self.weight = kernels.pack(torch.randn(45, HEADS * HEAD_DIM, generator=generator))  # padded: its rows are cut
        self.q = torch.randn(num_seqs, HEADS, HEAD_DIM, generator=generator)
        self.lens = torch.zeros(num_seqs, dtype=torch.int64)
        self.context_lens = torch.zeros(num_seqs, dtype=torch.int64)
        self.rows = torch.zeros(num_seqs, dtype=torch.int64)
        order = torch.randperm(MOST_BLOCKS, generator=generator)
        self.queries = Queries(
            starts=torch.arange(num_seqs),
            lens=self.lens,
            context_lens=self.context_lens,
            block_tables=torch.stack([order.roll(n) for n in range(num_seqs)]),
            max_len=1,
            max_context_len=MOST_BLOCKS * BLOCK,
        )

    def set(self, context_lens: list[int], rows: list[int]) -> None:
        self.lens.fill_(1)
        self.context_lens.copy_(torch.tensor(context_lens))
        self.rows.copy_(torch.tensor(rows))

    def __call__(self) -> Tensor:
        plan = self.kernels.plan_attention(self.queries, num_heads=HEADS, cache=self.cache)
        attended = self.kernels.attention(self.q * 0.5, self.cache, plan).flatten(1)
        hidden = self.kernels.linear(attended, self.weight)
        again = torch.where(hidden > 0, hidden, hidden - 1).to(torch.float32)
        again[0] += 1
        turned = again[self.rows].t().contiguous()
        return self.kernels.silu_mul(turned.flatten().view(1, -1)[:, : len(self.rows) * 44].reshape(len(self.rows), 44))


@pytest.fixture(scope="module", params=[1, 3, 16])
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    """Few threads share out sequences, many the parts of one."""
    return CpuKernels(request.param)


@pytest.mark.parametrize("inference", [False, True])
@settings(deadline=None, max_examples=25)
@given(st.data())
def test_replays_have_the_bits_of_launches(kernels: CpuKernels, inference: bool, data: st.DataObject) -> None:
    """inference: torch then leaves operations whole that it else takes apart, `contiguous` for one."""
    num_seqs = data.draw(st.integers(1, 4))
    with torch.inference_mode(inference):
        step = Step(kernels, num_seqs)
        replay, result = kernels.capture(step)
        lengths = st.lists(st.integers(1, MOST_BLOCKS * BLOCK), min_size=num_seqs, max_size=num_seqs)
        places = st.lists(st.integers(0, num_seqs - 1), min_size=num_seqs, max_size=num_seqs)
        for context_lens, rows in data.draw(st.lists(st.tuples(lengths, places), min_size=1, max_size=4)):
            step.set(context_lens, rows)
            expected = step()
            replay()
            assert torch.equal(result, expected)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["plain", "int8"])
@pytest.mark.parametrize(("outputs", "inputs"), [(517, 64), (64, 40), (517, 30), (48, 64)])
def test_sizes_that_are_padded(
    inference: bool, dtype: torch.dtype, format: WeightFormat, outputs: int, inputs: int
) -> None:
    kernels = CpuKernels(1)
    with torch.inference_mode(inference):
        x = torch.randn(3, inputs).to(dtype)
        weight = kernels.pack(torch.randn(outputs, inputs).to(dtype), format)
        table = kernels.pack(torch.randn(9, inputs).to(dtype))

        def step() -> tuple[Tensor, Tensor, Tensor]:
            rows = kernels.embedding(torch.tensor([1, 8, 5]), table)  # ids that nobody but the recording holds
            return kernels.linear(x + rows, weight), kernels.linear_argmax(x, weight)[0], rows

        replay, results = kernels.capture(step)
        gc.collect()
        for _ in range(2):
            x.copy_(torch.randn(3, inputs))
            expected = step()
            replay()
            for result, right in zip(results, expected, strict=True):
                assert torch.equal(result, right)


def test_recordings_share_memory_and_hold_their_results() -> None:
    """As of a step that is replayed after another: each reads what it wrote itself."""
    kernels = CpuKernels(1)
    steps = [Step(kernels, count) for count in (2, 3)]
    captured = [kernels.capture(step) for step in steps]
    for step in steps:
        step.set([700] * len(step.rows), list(range(len(step.rows))))
    for _ in range(2):
        for step, (replay, result) in zip(steps, captured, strict=True):
            expected = step()
            replay()
            assert torch.equal(result, expected)


def test_nothing_is_launched_while_it_is_recorded() -> None:
    kernels = CpuKernels(1)
    step = Step(kernels, 1)
    step.set([5], [0])
    expected = step()
    replay, result = kernels.capture(step)
    assert not torch.equal(result, expected)
    replay()
    assert torch.equal(result, expected)
    assert torch.equal(step(), expected)  # and afterwards launches are launched


def test_a_step_that_looks_at_what_it_computes_is_refused() -> None:
    kernels = CpuKernels(1)
    x = torch.ones(2, 32)
    with pytest.raises(TypeError, match="brings a step's numbers to the host"):
        kernels.capture(lambda: kernels.silu_mul(x).sum().item())
    assert torch.equal(kernels.silu_mul(x), kernels.silu_mul(x.clone()))  # it launches again


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.int64])
def test_a_piece_comes_back_when_the_last_view_of_it_is_gone(dtype: torch.dtype) -> None:
    pool = Pool()
    one = pool.empty((3, 50), dtype)
    assert one.shape == (3, 50)
    assert one.dtype == dtype
    place = one.data_ptr()
    view = one[1:]
    del one
    gc.collect()
    other = pool.empty((3, 50), dtype)
    assert other.data_ptr() != place
    del view
    gc.collect()
    assert pool.empty((3, 49), dtype).data_ptr() == place
    assert pool.empty((0, 5), dtype).shape == (0, 5)


def test_a_step_without_sequences_replays() -> None:
    """As when it is captured on nothing but padding."""
    kernels = CpuKernels(2)
    step = Step(kernels, 2)
    replay, result = kernels.capture(step)
    replay()
    assert result.shape == (2, 22)
