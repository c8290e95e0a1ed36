"""Paged attention on the GPU set: against the definition in float64, and bit for bit against itself in other steps.

The interpreter adds exactly and rounds once, so what is held there is the order of splits and tiles. That tensor cores
keep to one order in every tile is held by the same tests on a GPU.
"""

from __future__ import annotations

import importlib
import math
import mmap
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from pronk.kernels import cases, reference
from pronk.kernels.cases import AttentionCase, AttentionInputs, Heads
from pronk.kernels.interface import LayerCache, Queries

gpu = importlib.import_module("pronk.kernels.gpu.attention")

FLOAT8 = torch.float8_e4m3fn
BY_NAME = {case.name: case for case in cases.ATTENTION}


def moved(queries: Queries, device: str) -> Queries:
    """Kernels read these by their addresses, which need not be multiples of 16."""

    def there(numbers: Tensor) -> Tensor:
        return torch.cat([numbers.new_zeros(1), numbers.flatten()]).to(device)[1:].view(numbers.shape)

    return replace(
        queries,
        starts=there(queries.starts),
        lens=there(queries.lens),
        context_lens=there(queries.context_lens),
        block_tables=there(queries.block_tables),
    )


def moved_cache(cache: LayerCache, device: str) -> LayerCache:
    sides = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    return LayerCache(*(None if side is None else side.to(device) for side in sides))  # type: ignore[arg-type]


def attend(q: Tensor, cache: LayerCache, queries: Queries, device: str) -> Tensor:
    cache = moved_cache(cache, device)
    plan = gpu.plan_attention(moved(queries, device), num_heads=q.shape[1], cache=cache)
    return gpu.attention(q.to(device), cache, plan).cpu()


def assert_right(inputs: AttentionInputs, dtype: torch.dtype, weights: torch.dtype, device: str) -> None:
    actual = attend(inputs.q, inputs.cache, inputs.queries, device)
    cache = cases.exact(inputs.cache)
    plan = reference.plan_attention(inputs.queries, num_heads=inputs.q.shape[1], cache=cache)
    expected = reference.attention(inputs.q.double(), cache, plan)
    bound = cases.attention_bound(inputs, expected, dtype, weights)
    assert actual.dtype == dtype
    error = (actual.double() - expected).abs()
    outside = ~(error <= bound)  # a NaN is outside too
    assert not outside.any(), (
        f"{int(outside.sum())} outside, by up to {(error / bound).nan_to_num(torch.inf).max():.3g}"
    )


def name_of(value: object) -> str:
    return str(getattr(value, "name", value)).removeprefix("torch.")


MOST = [
    case
    for number, case in enumerate(cases.ATTENTION)
    if case.name.startswith(("chunks", "sharp"))
    or (case.name.startswith("mixed") and number % 2)
    or case.heads in (Heads(64, 2, 4), Heads(128, 2, 3))
]
"""All heads and blocks, and for two models all steps: an interpreted case takes half a second."""


@pytest.mark.parametrize("case", MOST, ids=name_of)
def test_attention(case: AttentionCase, device: str) -> None:
    assert_right(cases.attention_inputs(case, torch.bfloat16, seed=1), torch.bfloat16, torch.bfloat16, device)


SOME = ("mixed-d64-kv2-g4-p16", "mixed-d128-kv2-g3-p64", "sharp-d64-kv2-g4-p16", "chunks-d64-kv1-g16-p16")


@pytest.mark.parametrize("name", SOME[:3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
def test_attention_of_other_dtypes(name: str, dtype: torch.dtype, device: str) -> None:
    assert_right(cases.attention_inputs(BY_NAME[name], dtype, seed=2), dtype, dtype, device)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in SOME), (SOME[0], torch.float16), (SOME[0], torch.float32)],
    ids=name_of,
)
def test_attention_over_float8(name: str, dtype: torch.dtype, device: str) -> None:
    """Against the definition on the numbers that the cache stands for."""
    inputs = cases.attention_inputs(BY_NAME[name], dtype, seed=3)
    if name.startswith("mixed"):  # scales that differ, from one token to the next, by more than float16 spans
        spread = 2.0 ** torch.randint(-20, 3, inputs.cache.values.shape[:3], generator=cases.generator(4)).unsqueeze(-1)
        keys, values = inputs.cache.keys.double(), inputs.cache.values.double() * spread
        inputs = replace(inputs, cache=LayerCache(keys, values))
    inputs = replace(inputs, cache=cases.in_float8(inputs.cache))
    assert_right(inputs, dtype, torch.float32 if dtype == torch.float32 else torch.bfloat16, device)


def test_caches_and_queries_stay_as_they_are(device: str) -> None:
    inputs = cases.attention_inputs(BY_NAME[SOME[0]], torch.bfloat16, seed=5)
    q, cache = inputs.q.to(device), moved_cache(inputs.cache, device)
    plan = gpu.plan_attention(moved(inputs.queries, device), num_heads=q.shape[1], cache=cache)
    first = gpu.attention(q, cache, plan)
    assert torch.equal(q.cpu(), inputs.q)
    for before, after in ((inputs.cache.keys, cache.keys), (inputs.cache.values, cache.values)):
        assert torch.equal(after.cpu().view(torch.int16), before.view(torch.int16))
    assert torch.equal(gpu.attention(q, cache, plan), first), "a plan serves one layer after the other"
    sparse = torch.full((q.shape[0], 2 * q.shape[1], q.shape[2]), torch.nan, dtype=q.dtype, device=device)
    sparse[:, ::2] = q
    assert torch.equal(gpu.attention(sparse[:, ::2], cache, plan), first), "queries may lie apart"


# Promise 1


class Conversation:
    """Sequences of one model, of which a step may hold any pieces. Remembers what each token gives alone."""

    def __init__(
        self, heads: Heads, block_size: int, dtype: torch.dtype, lengths: tuple[int, ...], device: str, *, scaled: bool
    ) -> None:
        source = cases.generator(10)
        self.heads, self.block_size, self.device, self.scaled = heads, block_size, device, scaled
        self._queries = [
            cases.normal(source, length, heads.num_heads, heads.head_dim, dtype=dtype) * 2 for length in lengths
        ]
        self._keys, self._values = (
            [cases.normal(source, heads.num_kv_heads, length, heads.head_dim, dtype=dtype) for length in lengths]
            for _ in range(2)
        )
        self._alone: dict[tuple[int, int], Tensor] = {}

    def step(
        self,
        pieces: list[tuple[int, int, int]],
        seed: int = 0,
        *,
        padding: int = 0,
        max_len: int | None = None,
        max_context_len: int | None = None,
    ) -> list[Tensor]:
        """pieces: (sequence, first position, number of tokens). seed: where the blocks lie. padding: places without
        tokens before, between and after. Bounds: by default no larger than they must be. -> [n, Q, D] of each.

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
        q = torch.cat([self._queries[index][first : first + count] for index, first, count in pieces])
        queries = Queries(
            starts=torch.tensor([sum(lens[:index]) for index in range(len(lens))]),
            lens=torch.tensor(lens),
            context_lens=torch.tensor(ends),
            block_tables=tables,
            max_len=max_len or max(lens),
            max_context_len=max_context_len or max(ends),
        )
        if padding:
            queries, q = _padded(queries, padding), torch.cat([q, torch.full_like(q[:1], torch.nan)])
        outputs = attend(q, cases.in_float8(cache) if self.scaled else cache, queries, self.device)
        return list(outputs[: sum(lens)].split(lens))

    def alone(self, index: int, position: int) -> Tensor:
        """A token as the only row of a step: [Q, D]."""
        if (index, position) not in self._alone:
            self._alone[index, position] = self.step([(index, position, 1)])[0][0]
        return self._alone[index, position]

    def assert_stands_alone(self, pieces: list[tuple[int, int, int]], outputs: list[Tensor]) -> None:
        """Looks at the first and the last token of each piece, and at the one in its middle."""
        for (index, first, count), rows in zip(pieces, outputs, strict=True):
            assert len(rows) == count
            for offset in {0, count // 2, count - 1}:
                expected = self.alone(index, first + offset)
                assert torch.equal(rows[offset], expected), f"sequence {index}, position {first} + {offset}"


def _padded(queries: Queries, places: int) -> Queries:
    """As the engine pads a captured step, but on all sides."""
    indices = [-1] * places
    for index in range(len(queries.lens)):
        indices += [index, *[-1] * places]
    used = torch.tensor(indices) >= 0

    def spread(numbers: Tensor, filling: int) -> Tensor:
        return torch.where(used.view(-1, *[1] * (numbers.dim() - 1)), numbers[indices], filling)

    return replace(
        queries,
        starts=spread(queries.starts, int(queries.lens.sum())),
        lens=spread(queries.lens, 0),
        context_lens=spread(queries.context_lens, 0),
        block_tables=spread(queries.block_tables, cases.UNHELD),
    )


# What is stored differs in float32 and bfloat16; what is added, in head sizes, groups and scales.
each_model = pytest.mark.parametrize(
    ("heads", "block_size", "dtype", "scaled"),
    [
        (Heads(64, 2, 4), 16, torch.bfloat16, False),
        (Heads(128, 1, 3), 64, torch.bfloat16, False),
        (Heads(64, 1, 4), 32, torch.float32, False),
        (Heads(64, 1, 3), 16, torch.bfloat16, True),
    ],
    ids=["d64-g4", "d128-g3", "float32", "float8"],
)
LENGTHS = (20, 260, 560)


@pytest.fixture
def conversation(heads: Heads, block_size: int, dtype: torch.dtype, scaled: bool, device: str) -> Conversation:
    return _conversation(heads, block_size, dtype, device, scaled)


@cache
def _conversation(heads: Heads, block_size: int, dtype: torch.dtype, device: str, scaled: bool) -> Conversation:
    """One for all tests: what a token gives alone is asked for again and again."""
    return Conversation(heads, block_size, dtype, LENGTHS, device, scaled=scaled)


@each_model
def test_a_token_in_chunks(conversation: Conversation) -> None:
    """One sequence, whole and cut into chunks: decoded in one tile and in several, and by the prefill kernel."""
    for size in (2, 5, 16, 17, 30, 100, 260):
        starts = {0, 250 // size * size, (260 - 1) // size * size}
        for first in sorted(starts):
            pieces = [(1, first, min(size, 260 - first))]
            conversation.assert_stands_alone(pieces, conversation.step(pieces, seed=size))


# (sequence, first position, number of tokens)
STEPS = [
    [(0, 19, 1), (1, 259, 1), (2, 559, 1)],
    [(2, 513, 3), (1, 254, 4), (0, 0, 4), (1, 254, 4)],
    [(1, 100, 60), (0, 19, 1), (2, 550, 5), (2, 255, 2), (0, 0, 20)],
    [(2, 480, 80), (1, 259, 1), (1, 240, 18), (1, 0, 1)],
]


@each_model
def test_a_token_beside_others(conversation: Conversation) -> None:
    for seed, pieces in enumerate(STEPS):
        conversation.assert_stands_alone(pieces, conversation.step(pieces, seed))
        conversation.assert_stands_alone(pieces[::-1], conversation.step(pieces[::-1], seed + 100))


@each_model
def test_padding_and_wide_bounds(conversation: Conversation) -> None:
    """What a captured step is given: more places than sequences, and bounds of its bucket."""
    for pieces, max_len in ((STEPS[0], 1), (STEPS[2], 512)):
        outputs = conversation.step(pieces, padding=2, max_len=max_len, max_context_len=2048)
        conversation.assert_stands_alone(pieces, outputs)


@each_model
def test_either_kernel(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for partials the prefill kernel takes whatever has several splits; with little, some of it."""
    heads = conversation.heads
    for slots in (0, 9):
        monkeypatch.setattr(gpu, "MAX_WORKSPACE", slots * heads.num_heads * (heads.head_dim + 2) * 4)
        for pieces in STEPS[:2]:
            conversation.assert_stands_alone(pieces, conversation.step(pieces))


def test_any_number_of_programs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(Heads(64, 2, 4), 16, torch.bfloat16, LENGTHS, device, scaled=False)
    expected = conversation.step(STEPS[2])
    for programs in (1, 3, 1000):
        monkeypatch.setattr(gpu, "INTERPRETED_PROGRAMS", programs)
        monkeypatch.setattr(gpu, "multiprocessors", lambda _device, programs=programs: programs)
        assert all(map(torch.equal, conversation.step(STEPS[2]), expected))


def test_any_block_size(device: str) -> None:
    """Keys are split by position, not by block."""
    outputs = [
        Conversation(Heads(64, 1, 4), block_size, torch.bfloat16, (530,), device, scaled=False).step([(0, 500, 30)])[0]
        for block_size in (16, 32, 64, 128, 256)
    ]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


# The plan


@pytest.mark.parametrize("num_seqs", [1, 7, 300])
@pytest.mark.parametrize("room", [None, 40])
def test_the_plan_hands_out_each_piece_once(
    num_seqs: int, room: int | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """num_seqs beyond what a program counts at once; places without tokens among them."""
    heads = Heads(64, 2, 4)
    if room is not None:
        monkeypatch.setattr(gpu, "MAX_WORKSPACE", room * heads.num_heads * (heads.head_dim + 2) * 4)
    source = cases.generator(20)
    lens = torch.randint(0, 40, (num_seqs,), generator=source) * torch.randint(0, 2, (num_seqs,), generator=source)
    lens[0] = 3
    contexts = torch.where(lens > 0, lens + torch.randint(0, 1000, (num_seqs,), generator=source), 0)
    starts = lens.cumsum(0) - lens
    queries = Queries(starts, lens, contexts, torch.zeros(num_seqs, 70, dtype=torch.int64), 40, 1040)
    cache = LayerCache(*(torch.zeros(1, 2, 16, 64, dtype=torch.bfloat16, device=device) for _ in range(2)))
    plan = gpu.plan_attention(moved(queries, device), num_heads=8, cache=cache)
    decodes, merges, prefills = plan.counts.tolist()

    free = room if room is not None else 10**9
    decode_items, combine_items, prefill_items = [], [], []
    slot = 0
    for sequence, (length, context) in enumerate(zip(lens.tolist(), contexts.tolist(), strict=True)):
        splits = -(-context // 256)
        wanted = length * splits if 0 < length <= 16 and splits > 1 else 0
        if 0 < length <= 16 and (wanted == 0 or slot + wanted <= free):
            for split in range(splits):
                for row in range(0, length * 4, plan.decode.constants["BLOCK_M"]):
                    decode_items.append([sequence, split * 256, row, slot if wanted else -1])
            for token in range(length if wanted else 0):
                seen = (context - length + token) // 256 + 1
                combine_items.append([int(starts[sequence]) + token, slot + token * splits, seen])
        else:
            prefill_items += [[sequence, row] for row in reversed(range(0, length * 4, plan.shape.prefill_rows))]
        slot += wanted
    assert plan.decode_items[:decodes].tolist() == decode_items
    assert plan.combine_items[:merges, :3].tolist() == combine_items
    assert plan.prefill_items[:prefills, :2].tolist() == prefill_items
    assert all(first_slot + seen <= len(plan.partial_tops) for _, first_slot, seen in combine_items), (
        "a partial without room"
    )


def test_nothing_to_do(device: str) -> None:
    """A step of padding alone, as graphs are captured on; and one without any place."""
    cache = LayerCache(*(torch.full((1, 2, 16, 64), torch.nan, device=device) for _ in range(2)))
    for places in (0, 3):
        nothing = torch.zeros(places, dtype=torch.int64)
        tables = torch.full((places, 4), cases.UNHELD)
        queries = Queries(nothing + places, nothing, nothing, tables, max_len=64, max_context_len=600)
        assert attend(torch.zeros(places, 8, 64), cache, queries, device).shape == (places, 8, 64)


@pytest.mark.parametrize("block_size", [16, 64])
def test_a_cache_of_more_than_2_to_31_elements(block_size: int, device: str) -> None:
    """Only the blocks in use are ever touched: the cache is a map of memory that nobody wrote."""
    if device != "cpu":
        pytest.skip("the same addresses, computed by the same kernel")
    shape = (2**31 // (2 * block_size * 128) + 2, 2, block_size, 128)
    pages = mmap.mmap(-1, math.prod(shape))
    keys = torch.frombuffer(pages, dtype=torch.uint8).view(FLOAT8).view(shape)
    scales = torch.frombuffer(mmap.mmap(-1, keys.numel() // 128 * 4), dtype=torch.float32).view(shape[:3])
    source = cases.generator(21)
    last = shape[0] - 2
    keys[last:] = cases.normal(source, 2, *shape[1:], dtype=torch.float32).to(FLOAT8)
    scales[last:] = 0.5
    q = cases.normal(source, 2 * block_size, 4, 128, dtype=torch.bfloat16)
    context_len = 2 * block_size - 2
    tables = torch.tensor([[last + 1, last]])
    length = context_len - 3
    whole = Queries(torch.tensor([0]), torch.tensor([length]), torch.tensor([context_len]), tables, length, context_len)
    small = LayerCache(keys[last:], keys[last:], scales[last:], scales[last:])
    for queries in (whole, replace(whole, lens=torch.tensor([1]), max_len=1)):
        expected = attend(q, small, replace(queries, block_tables=tables - last), device)
        actual = attend(q, LayerCache(keys, keys, scales, scales), queries, device)
        rows = int(queries.lens)
        assert torch.equal(actual[:rows], expected[:rows])


# Refusals


def cache_of(
    head_dim: int = 64, block_size: int = 16, dtype: torch.dtype = torch.bfloat16, *, scaled: bool = False
) -> LayerCache:
    keys, values = (torch.zeros(2, 2, block_size, head_dim).to(dtype) for _ in range(2))
    return LayerCache(keys, values, *(torch.ones(2, 2, block_size) if scaled else None for _ in range(2)))


@pytest.mark.parametrize(
    ("num_heads", "cache", "message"),
    [
        (8, cache_of(head_dim=80), "heads of 64 or 128, not 80"),
        (3, cache_of(), "3 query heads cannot share 2"),
        (8, cache_of(block_size=24), "blocks of 24 tokens"),
        (8, cache_of(block_size=512), "blocks of 512 tokens"),
        (8, cache_of(dtype=torch.float64), "float64 without scales"),
        (8, cache_of(dtype=FLOAT8), "float8_e4m3fn without scales"),
        (8, cache_of(scaled=True), "bfloat16 with scales"),
        (8, replace(cache_of(), values=cache_of(dtype=torch.float16).values), "a cache of"),
        (8, LayerCache(*(torch.zeros(2, 16, 2, 64).transpose(1, 2) for _ in range(2))), "contiguous"),
    ],
)
def test_what_there_is_no_kernel_for(num_heads: int, cache: LayerCache, message: str) -> None:
    one = torch.ones(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        gpu.plan_attention(Queries(one - 1, one, one, one.view(1, 1), 1, 1), num_heads=num_heads, cache=cache)


def test_what_a_plan_does_not_fit(device: str) -> None:
    inputs = cases.attention_inputs(BY_NAME[SOME[0]], torch.bfloat16, seed=5)
    cache = moved_cache(inputs.cache, device)
    with pytest.raises(TypeError, match="another kernel set"):
        gpu.attention(inputs.q.to(device), cache, object())
    plan = gpu.plan_attention(moved(inputs.queries, device), num_heads=8, cache=cache)
    with pytest.raises(ValueError, match=r"queries of torch\.float16"):
        gpu.attention(inputs.q.half().to(device), cache, plan)


# On a GPU only


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_one_graph_for_any_lengths() -> None:
    """Captured on padding, fed with one step after the other; and the host never waits for the device."""
    conversation = Conversation(Heads(64, 2, 4), 16, torch.bfloat16, LENGTHS, "cuda", scaled=False)
    num_tokens, places, width = 128, 8, 64
    cache = LayerCache(*(torch.full((512, 2, 16, 64), torch.nan, dtype=torch.bfloat16).cuda() for _ in range(2)))
    q = torch.zeros(num_tokens, 8, 64, dtype=torch.bfloat16, device="cuda")
    numbers = [torch.zeros(places, dtype=torch.int64, device="cuda") for _ in range(3)]
    tables = torch.full((places, width), cases.UNHELD, device="cuda")
    queries = Queries(*numbers, tables, max_len=num_tokens, max_context_len=16 * width)

    def run() -> Tensor:
        plan = gpu.plan_attention(queries, num_heads=8, cache=cache)
        out: Tensor = gpu.attention(q, cache, plan)
        return out

    torch.use_deterministic_algorithms(False)
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    run()
    torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for pieces in STEPS:
        ends = [first + count for _, first, count in pieces]
        table, filled = cases.paged(
            tuple(conversation._keys[index][:, :end] for (index, _, _), end in zip(pieces, ends, strict=True)),
            tuple(conversation._values[index][:, :end] for (index, _, _), end in zip(pieces, ends, strict=True)),
            16,
            cases.generator(1),
        )
        lens = torch.tensor([count for _, _, count in pieces])
        for tensor, values in zip(numbers, (lens.cumsum(0) - lens, lens, torch.tensor(ends)), strict=True):
            tensor.zero_()[: len(lens)] = values.cuda()
        tables.fill_(cases.UNHELD)[: len(lens), : table.shape[1]] = table.cuda()
        for side, values in ((cache.keys, filled.keys), (cache.values, filled.values)):
            side[: len(values)] = values.cuda()
        q[: lens.sum()] = torch.cat(
            [conversation._queries[index][first : first + count] for index, first, count in pieces]
        ).cuda()
        graph.replay()
        conversation.assert_stands_alone(pieces, list(out[: lens.sum()].cpu().split(lens.tolist())))
