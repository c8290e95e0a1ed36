"""Sampling over vocabulary shards means what `kernels.sampling` means: the same tokens, the same log probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pronk.engine.request import SamplingParams
from pronk.engine.sampling.sampler import SampleRow, build
from pronk.engine.sampling.shards import Shard
from pronk.kernels import sampling
from pronk.kernels.interface import Samples, SamplingBatch

from .ranks import together

UNIT = 64


def shard_of(group: object, vocab_size: int, rank: int, size: int) -> tuple[Shard, slice]:
    width = -(-vocab_size // (size * UNIT)) * UNIT
    start = min(rank * width, vocab_size)
    return Shard(group, start, width), slice(start, min(start + width, vocab_size))  # type: ignore[arg-type]


def over_shards(logits: Tensor, batch: SamplingBatch, size: int) -> list[Samples]:
    """What each rank says."""

    def one(group: object) -> Samples:
        shard, ours = shard_of(group, logits.shape[1], group.rank, size)  # type: ignore[attr-defined]
        return shard.sample(logits[:, ours], batch)

    return together(size, one)


def equal(ours: Samples, theirs: Samples) -> None:
    torch.testing.assert_close(ours.token_ids, theirs.token_ids, rtol=0, atol=0)
    for name in ("logprobs", "top_logprobs"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=2e-6, equal_nan=True)
    if theirs.top_ids is not None and theirs.logprobs is not None:
        well = ~theirs.logprobs.isnan() | (theirs.token_ids < 0)
        assert ours.top_ids is not None
        torch.testing.assert_close(ours.top_ids[well], theirs.top_ids[well])


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7, 2.0]),
    top_p=st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.05]),
    top_k=st.sampled_from([0, 0, 1, 3, 50, 10**6]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.5]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.sampled_from([{}, {5: 3.0, 130: -100.0}, {129: 50.0}]),
    allowed_token_ids=st.sampled_from([(), (), (1, 100, 128, 140)]),
    logprobs=st.sampled_from([None, 0, 4]),
)
rows = st.builds(
    SampleRow,
    params=params,
    seed=st.integers(0, 2**63 - 1),
    position=st.integers(0, 1000),
    output_counts=st.dictionaries(st.integers(0, 140), st.integers(1, 5), max_size=8),
    prompt_ids=st.frozensets(st.integers(0, 140), max_size=8),
    forbidden_ids=st.frozensets(st.integers(0, 140), max_size=3),
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(rows, min_size=1, max_size=4),
    size=st.sampled_from([2, 3, 4, 8]),
    vocab_size=st.sampled_from([141, 192, 256, 1001]),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.1, 2.0, 9.0]),
    steps=st.sampled_from([None, 0.5]),
)
def test_every_parameter_means_what_it_means_on_one_device(
    rows: list[SampleRow], size: int, vocab_size: int, seed: int, spread: float, steps: float | None
) -> None:
    logits = torch.randn(len(rows), vocab_size, generator=torch.Generator().manual_seed(seed)) * spread
    if steps:
        logits = (logits / steps).round() * steps  # many equals
    batch = build(rows, vocab_size).batch(torch.device("cpu"))
    alone = sampling.sample(logits, batch)
    for found in over_shards(logits, batch, size):
        equal(found, alone)


def test_no_row_changes_another() -> None:
    """Bit for bit, beside whom it stands."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 300, generator=generator) * 3
    kinds = [
        SamplingParams(temperature=1.0, top_p=0.8, logprobs=3),
        SamplingParams(temperature=0.7, top_k=20, top_p=0.9, logprobs=3),
    ]
    many = [SampleRow(kinds[n % 2], n, n, {}, frozenset(), frozenset()) for n in range(9)]
    beside = over_shards(logits, build(many, 300).batch(torch.device("cpu")), 4)[0]
    for place, row in enumerate(many):
        own = over_shards(logits[place : place + 1], build([row], 300).batch(torch.device("cpu")), 4)[0]
        for name in ("token_ids", "logprobs", "top_ids", "top_logprobs"):
            assert torch.equal(getattr(own, name)[0], getattr(beside, name)[place])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 70, 140])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_not_finite_on_one_rank_is_so_on_all(bad: float, place: int, temperature: float) -> None:
    logits = torch.randn(2, 141, generator=torch.Generator().manual_seed(2))
    logits[1, place] = bad
    row = SampleRow(SamplingParams(temperature=temperature, logprobs=1), 3, 4, {}, frozenset(), frozenset())
    batch = build([row, row], 141).batch(torch.device("cpu"))
    alone = sampling.sample(logits, batch)
    for found in over_shards(logits, batch, 4):
        equal(found, alone)

    def largest(group: object) -> Tensor:
        shard, ours = shard_of(group, 141, group.rank, 4)  # type: ignore[attr-defined]
        return shard.largest(logits[:, ours])

    for ids in together(4, largest):
        assert ids.tolist() == [int(logits[0].argmax()), -1]


def test_where_nothing_is_allowed_nothing_is_chosen() -> None:
    everything = frozenset(range(200))
    rows = [
        SampleRow(SamplingParams(temperature=temperature), 1, 1, {}, frozenset(), everything)
        for temperature in (0.0, 1.0)
    ]
    batch = build(rows, 200).batch(torch.device("cpu"))
    alone = sampling.sample(torch.zeros(2, 200), batch)
    for found in over_shards(torch.zeros(2, 200), batch, 2):
        equal(found, alone)


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from([2, 3, 8]),
    vocab_size=st.sampled_from([141, 1001]),
    top_n=st.sampled_from([0, 1, 5, 100]),
    seed=st.integers(0, 2**31),
)
def test_log_probabilities_of_given_tokens(size: int, vocab_size: int, top_n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(5, vocab_size, generator=generator) * 4).round()
    token_ids = torch.randint(0, vocab_size, (5,), generator=generator)
    token_ids[0] = -1
    expected = sampling.logprobs(logits, token_ids, top_n)

    def one(group: object) -> tuple[Tensor, Tensor, Tensor]:
        shard, ours = shard_of(group, vocab_size, group.rank, size)  # type: ignore[attr-defined]
        return shard.logprobs(logits[:, ours], token_ids, top_n)

    for found in together(size, one):
        torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=2e-6, equal_nan=True)
        assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[2], expected[2], rtol=1e-6, atol=2e-6)
