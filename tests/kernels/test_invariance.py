"""Promise 1, for each operation of the CPU set: a row's bits are those it has alone, whatever else is in the step.

Nothing here is close to: every comparison is torch.equal. Work is dealt out to two threads as they come, so that no run
is like another. Other numbers of threads, and other instructions, are compared in tests/kernels/cpu.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pronk.kernels import cases
from pronk.kernels.cases import Heads
from pronk.kernels.cpu import CpuKernels
from pronk.kernels.interface import LayerCache, Queries, Weight

POOL = 48
"""Rows that batches are drawn from."""

each_dtype = pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


cpu = CpuKernels(2)


def batches(x: Tensor) -> Iterator[tuple[list[int], Tensor]]:
    """x [POOL, ...] -> which rows are in a batch, and the batch: every size around a tile's, rows in falling order,
    one row in every place, a row beside itself, and batches that begin in the middle of a row of tiles in memory."""
    for size in (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 48):
        for first in {0, 1, POOL - size}:
            if first + size <= POOL:
                yield list(range(first, first + size)), x[first : first + size]
    falling = list(range(POOL - 1, -1, -1))
    yield falling, x[falling]
    for place in range(18):
        rows = [1 + other % 40 for other in range(18)]
        rows[place] = 0
        yield rows, x[rows]
    yield [5] * 19, x[[5] * 19]


def assert_rows_stand_alone(operation: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """operation: rows in, as many rows out."""
    alone = torch.cat([operation(x[row : row + 1]) for row in range(len(x))])
    assert alone.unique(dim=0).shape[0] > 1 or alone[0].numel() < 4, "rows that are all alike show nothing"
    for rows, batch in batches(x):
        assert torch.equal(operation(batch), alone[rows]), f"differs in a batch of the rows {rows}"


LINEAR_SHAPES = ((3072, 2048), (2048, 8192), (1000, 96), (512, 64), (192, 96), (17, 33), (16, 16), (1, 1), (3, 257))
"""Outputs and inputs: of the 1B, of tiny models, and odd ones."""


@each_dtype
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
def test_linear(shape: tuple[int, int], dtype: torch.dtype) -> None:
    source = cases.generator(1)
    weight = cpu.pack(cases.normal(source, *shape, dtype=dtype))
    x = cases.normal(source, POOL, shape[1], dtype=dtype)
    if shape[0] * shape[1] < 2**20:
        assert_rows_stand_alone(lambda rows: cpu.linear(rows, weight), x)
    else:
        assert_some_rows_stand_alone(weight, x)


def assert_some_rows_stand_alone(weight: Weight, x: Tensor) -> None:
    alone = {row: cpu.linear(x[row : row + 1], weight)[0] for row in (0, 1, 9, 47)}
    for rows in ([0, 1], [9, 47, 1, 0], list(range(16)), list(range(1, 18)), list(range(47, -1, -1))):
        together = cpu.linear(x[rows], weight)
        for row in alone.keys() & set(rows):
            assert torch.equal(together[rows.index(row)], alone[row]), f"row {row} differs in {rows}"


@each_dtype
def test_linear_with_any_neighbours(dtype: torch.dtype) -> None:
    source = cases.generator(2)
    weights = [cpu.pack(cases.normal(source, *shape, dtype=dtype)) for shape in ((1000, 96), (65, 130))]
    inputs = [cases.normal(source, POOL, weight.in_features, dtype=dtype) for weight in weights]
    alone = [
        torch.cat([cpu.linear(row.unsqueeze(0), weight) for row in x])
        for x, weight in zip(inputs, weights, strict=True)
    ]

    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, 1), st.lists(st.integers(0, POOL - 1), min_size=1, max_size=70))
    def check(which: int, rows: list[int]) -> None:
        assert torch.equal(cpu.linear(inputs[which][rows], weights[which]), alone[which][rows])

    check()


@each_dtype
def test_a_row_of_nan_or_infinity_stays_alone(dtype: torch.dtype) -> None:
    source = cases.generator(3)
    weight = cpu.pack(cases.normal(source, 192, 96, dtype=dtype))
    x = cases.normal(source, 20, 96, dtype=dtype)
    alone = cpu.linear(x, weight)
    x[3], x[7] = torch.nan, torch.inf
    others = [row for row in range(20) if row not in (3, 7)]
    assert torch.equal(cpu.linear(x, weight)[others], alone[others])


@each_dtype
@pytest.mark.parametrize("width", [1, 17, 64, 1000, 2048, 8192])
def test_norms(width: int, dtype: torch.dtype) -> None:
    source = cases.generator(4)
    weight = cases.normal(source, width, dtype=dtype)
    x, residual = (cases.normal(source, POOL, width, dtype=dtype) for _ in range(2))
    both = torch.stack([x, residual], dim=1)
    assert_rows_stand_alone(lambda rows: cpu.rms_norm(rows, weight, cases.EPS), x)
    assert_rows_stand_alone(
        lambda rows: torch.stack(cpu.add_rms_norm(rows[:, 0], rows[:, 1], weight, cases.EPS), dim=1), both
    )


@each_dtype
@pytest.mark.parametrize("width", [1, 17, 64, 1000, 8192])
def test_silu_mul(width: int, dtype: torch.dtype) -> None:
    gate_up = cases.normal(cases.generator(5), POOL, 2 * width, dtype=dtype) * 4
    assert_rows_stand_alone(cpu.silu_mul, gate_up)


@each_dtype
def test_silu_mul_does_not_depend_on_the_column(dtype: torch.dtype) -> None:
    """A vector's last elements go the same way as the others: what a pair gives is the same in every place."""
    pair = cases.normal(cases.generator(6), 200, 2, dtype=dtype) * 4
    alone = torch.cat([cpu.silu_mul(row.unsqueeze(0)) for row in pair])
    for width in (2, 3, 7, 15, 16, 17, 31, 33, 200):
        together = cpu.silu_mul(torch.cat([pair[:width, 0], pair[:width, 1]]).unsqueeze(0))
        assert torch.equal(together[0], alone[:width, 0])


@each_dtype
def test_embedding(dtype: torch.dtype) -> None:
    table = cases.normal(cases.generator(7), 500, 96, dtype=dtype)
    assert_rows_stand_alone(lambda ids: cpu.embedding(ids, table), torch.arange(POOL) * 10)


@each_dtype
@pytest.mark.parametrize("heads", [Heads(64, 2, 4), Heads(128, 2, 3), Heads(64, 1, 1)], ids=lambda heads: heads.name)
def test_rope_and_cache(heads: Heads, dtype: torch.dtype) -> None:
    """Slots do not matter, and neighbours do not: queries out, and keys and values as they stand in the cache."""
    inputs = cases.rope_inputs(cases.RopeCase("", heads, 16, POOL), dtype, seed=8)
    source = cases.generator(9)

    def run(rows: Tensor) -> Tensor:
        caches = [torch.zeros(10, heads.num_kv_heads, 16, heads.head_dim, dtype=dtype) for _ in range(2)]
        slots = torch.randperm(160, generator=source)[: len(rows)]
        q = cpu.rope_and_cache(inputs.qkv[rows], inputs.positions[rows], inputs.cos_sin, slots, LayerCache(*caches))
        return torch.cat([q, *(cache[slots // 16, :, slots % 16] for cache in caches)], dim=1)

    assert_rows_stand_alone(run, torch.arange(POOL))


class Conversation:
    """Sequences of one model, of which a step may hold any pieces. Remembers what each token gives alone."""

    def __init__(self, heads: Heads, block_size: int, dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
        source = cases.generator(10)
        self.heads, self.block_size, self.lengths = heads, block_size, lengths
        self._queries = [
            cases.normal(source, length, heads.num_heads, heads.head_dim, dtype=dtype) * 2 for length in lengths
        ]
        self._keys, self._values = (
            [cases.normal(source, heads.num_kv_heads, length, heads.head_dim, dtype=dtype) for length in lengths]
            for _ in range(2)
        )
        self._alone: dict[tuple[int, int], Tensor] = {}

    def step(self, pieces: list[tuple[int, int, int]], seed: int) -> list[Tensor]:
        """pieces: (sequence, first position, number of tokens). seed: where the blocks lie. -> [n, Q, D] of each.

        Only keys up to a piece's end are in the cache, as in a real step; the rest is NaN.
        """
        ends = [first + count for _, first, count in pieces]
        tables, cache = cases.paged(
            tuple(self._keys[index][:, :end] for (index, _, _), end in zip(pieces, ends, strict=True)),
            tuple(self._values[index][:, :end] for (index, _, _), end in zip(pieces, ends, strict=True)),
            self.block_size,
            cases.generator(seed),
        )
        lens = [count for _, _, count in pieces]
        queries = Queries(
            starts=torch.tensor([sum(lens[:index]) for index in range(len(lens))]),
            lens=torch.tensor(lens),
            context_lens=torch.tensor(ends),
            block_tables=tables,
            max_len=max(lens),
            max_context_len=max(ends),
        )
        q = torch.cat([self._queries[index][first : first + count] for index, first, count in pieces])
        plan = cpu.plan_attention(queries, num_heads=self.heads.num_heads, cache=cache)
        return list(cpu.attention(q, cache, plan).split(lens))

    def alone(self, index: int, position: int) -> Tensor:
        """A token as the only row of a step: [Q, D]."""
        if (index, position) not in self._alone:
            self._alone[index, position] = self.step([(index, position, 1)], seed=0)[0][0]
        return self._alone[index, position]

    def assert_stands_alone(self, pieces: list[tuple[int, int, int]], seed: int) -> None:
        """Looks at the first tokens of each piece, those around its middle, and the last."""
        for (index, first, count), outputs in zip(pieces, self.step(pieces, seed), strict=True):
            assert len(outputs) == count
            for offset in {0, 1, 2, 3, 4, count // 2, count // 2 + 1, count - 2, count - 1} & set(range(count)):
                expected = self.alone(index, first + offset)
                assert torch.equal(outputs[offset], expected), f"sequence {index}, position {first} + {offset}"


ATTENTION_HEADS = (
    Heads(64, 2, 4),
    Heads(128, 1, 3),
    Heads(64, 2, 1),
    Heads(128, 1, 2),
    Heads(64, 1, 8),
    Heads(128, 1, 16),
)
# Sums are float32 whatever the dtype, so float32 shows every difference; the others are rounded once more.
each_heads_and_dtype = pytest.mark.parametrize(
    ("heads", "dtype"),
    [(heads, torch.float32) for heads in ATTENTION_HEADS]
    + [(ATTENTION_HEADS[0], torch.bfloat16), (ATTENTION_HEADS[1], torch.float16)],
    ids=lambda value: value.name if isinstance(value, Heads) else str(value).removeprefix("torch."),
)


@each_heads_and_dtype
def test_attention_in_chunks(heads: Heads, dtype: torch.dtype) -> None:
    """One sequence, cut into chunks of every size around a tile's and a split's."""
    conversation = Conversation(heads, 16, dtype, (275,))
    for size in (1, 2, 3, 4, 5, 16, 19, 64, 256, 275):
        for first in range(0, 275, size):
            if first < 3 * size or first + 2 * size > 254:
                conversation.assert_stands_alone([(0, first, min(size, 275 - first))], seed=size)


# (sequence, first position, number of tokens) of sequences with 20, 260, 520 and 1030 tokens.
STEPS = [
    [(0, 19, 1), (1, 259, 1), (2, 519, 1), (3, 1029, 1)],
    [(3, 1020, 4), (2, 513, 3), (1, 254, 4), (0, 0, 4)],
    [(1, 100, 60), (0, 19, 1), (3, 1025, 5), (2, 255, 2)],
    [(0, 0, 20), (1, 259, 1), (1, 200, 30), (1, 0, 1)],
    [(2, position, 1) for position in (0, 255, 256, 257, 511, 512)],
]


@each_heads_and_dtype
def test_attention_beside_others(heads: Heads, dtype: torch.dtype) -> None:
    conversation = Conversation(heads, 64, dtype, (20, 260, 520, 1030))
    for seed, pieces in enumerate(STEPS):
        conversation.assert_stands_alone(pieces, seed)
        conversation.assert_stands_alone(pieces[::-1], seed + 100)


@each_dtype
@pytest.mark.parametrize("block_size", [16, 64])
def test_attention_in_any_step(block_size: int, dtype: torch.dtype) -> None:
    """Any pieces of any sequences in any order, over blocks in any order."""
    lengths = (33, 300, 530)
    conversation = Conversation(Heads(64, 2, 4), block_size, dtype, lengths)

    @st.composite
    def piece(draw: st.DrawFn) -> tuple[int, int, int]:
        index = draw(st.integers(0, len(lengths) - 1))
        first = draw(st.integers(0, lengths[index] - 1))
        return index, first, draw(st.integers(1, min(40, lengths[index] - first)))

    @settings(deadline=None, max_examples=25)
    @given(st.lists(piece(), min_size=1, max_size=6), st.integers(0, 2**32))
    def check(pieces: list[tuple[int, int, int]], seed: int) -> None:
        conversation.assert_stands_alone(pieces, seed)

    check()


@each_dtype
def test_attention_does_not_see_the_block_size(dtype: torch.dtype) -> None:
    """Not promised to clients, who cannot choose it, but held: keys are split by position, not by block."""
    outputs = [
        Conversation(Heads(64, 2, 4), block_size, dtype, (530,)).step([(0, 500, 30)], seed=1)[0]
        for block_size in (16, 32, 64, 128, 256)
    ]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
