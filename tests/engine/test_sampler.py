"""The sampler against a plain definition of each parameter, written here in float64 NumPy, token for token.

The plain sampler sorts whole vocabularies and takes the same noise, so the two must choose the same token at every
position; that the noise is what it should be is test_noise.py's matter. Everything is seeded: nothing fails by chance.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pronk.engine.request import SamplingParams
from pronk.engine.sampling.sampler import Sampled, SampleRow, build, read
from pronk.kernels import reference, sampling
from pronk.kernels.cpu import CpuKernels
from pronk.kernels.noise import exponential, noise_key

MANY = 1024


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Sample = Callable[[Tensor, list[SampleRow]], list[Sampled]]


@pytest.fixture(params=[CpuKernels(1), reference], ids=["cpu", "reference"])
def sample(request: pytest.FixtureRequest) -> Sample:
    """The sampler over each kernel set."""

    def sample(logits: Tensor, rows: list[SampleRow]) -> list[Sampled]:
        found = request.param.sample(logits, build(rows, logits.shape[1]).batch(logits.device))
        return read(found, [row.params.logprobs for row in rows])

    return sample


def row(
    *,
    seed: int = 0,
    position: int = 0,
    output: Mapping[int, int] | None = None,
    prompt: Set[int] = frozenset(),
    forbidden: Set[int] = frozenset(),
    **params: object,
) -> SampleRow:
    return SampleRow(
        params=SamplingParams(**params),  # type: ignore[arg-type]
        seed=seed,
        position=position,
        output_counts=output or {},
        prompt_ids=prompt,
        forbidden_ids=forbidden,
    )


def tokens(results: list[Sampled]) -> list[int | None]:
    return [result.token for result in results]


def random_logits(num_rows: int, vocabulary: int, *, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(num_rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def plain_adjusted(logits: Tensor, row: SampleRow) -> np.ndarray:
    """float64 [V]: logits after bias, penalties, and what is forbidden, one token after the other."""
    params, adjusted = row.params, logits.double().numpy().copy()
    for token in range(len(adjusted)):
        adjusted[token] += params.logit_bias.get(token, 0.0)
        if token in row.prompt_ids or token in row.output_counts:
            # CTRL: divide a score by the penalty; a negative one is multiplied, so that it falls as well.
            adjusted[token] *= params.repetition_penalty if adjusted[token] < 0 else 1 / params.repetition_penalty
        count = row.output_counts.get(token, 0)
        # OpenAI: mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence
        adjusted[token] -= count * params.frequency_penalty + float(count > 0) * params.presence_penalty
        if token in row.forbidden_ids:
            adjusted[token] = -math.inf
    return adjusted


def plain_probabilities(adjusted: np.ndarray, params: SamplingParams) -> np.ndarray:
    """float64 [V]: what a token is drawn from; zero where a filter drops it."""
    with np.errstate(over="ignore", under="ignore"):
        weights = np.exp((adjusted - adjusted.max()) / params.temperature)
    order = np.argsort(-weights, kind="stable")
    if params.top_k:
        weights[order[params.top_k :]] = 0.0
    probabilities = weights / weights.sum()
    ordered = probabilities[order]
    # Meta's sample_top_p: drop a token when the probability of those before it exceeds top_p.
    if params.top_p < 1:
        before = np.concatenate([[0.0], np.cumsum(ordered)[:-1]])
        probabilities[order[before > params.top_p]] = 0.0
    probabilities[probabilities < params.min_p * probabilities.max()] = 0.0
    return probabilities / probabilities.sum()


def plain_token(logits: Tensor, row: SampleRow) -> int:
    adjusted = plain_adjusted(logits, row)
    if row.params.temperature == 0:
        return int(adjusted.argmax())
    noise = exponential(noise_key(row.seed, row.position), torch.arange(len(adjusted))).double().numpy()
    return int((plain_probabilities(adjusted, row.params) / noise).argmax())


def assert_plain(sample: Sample, logits: Tensor, rows: list[SampleRow]) -> None:
    assert tokens(sample(logits, rows)) == [plain_token(one, row) for one, row in zip(logits, rows, strict=True)]


GRID = {
    "temperature": [{"temperature": value} for value in (1e-9, 0.01, 0.3, 0.7, 1.0, 1.5, 2.0)],
    "top_k": [{"top_k": value} for value in (1, 2, 3, 50, 99, 100, 101, 2**31 - 1)],
    "top_p": [{"top_p": value} for value in (0.0, 1e-9, 0.1, 0.5, 0.9, 0.95, 0.999, 1 - 1e-9, 1.0)],
    "min_p": [{"min_p": value} for value in (0.0, 1e-4, 0.05, 0.3, 0.999, 1.0)],
    "together": [
        {"temperature": t, "top_k": k, "top_p": p, "min_p": m}
        for t, k, p, m in itertools.product((0.6, 1.7), (0, 5, 40), (0.5, 0.9), (0.0, 0.02, 0.2))
    ],
}


@pytest.mark.parametrize("parameter", GRID)
def test_filters(sample: Sample, parameter: str) -> None:
    """60 rows of 100 tokens for every setting."""
    for number, params in enumerate(GRID[parameter]):
        rows = [row(seed=number, position=position, **params) for position in range(60)]
        assert_plain(sample, random_logits(60, 100, seed=number), rows)


def test_greedy_is_the_largest(sample: Sample) -> None:
    logits = random_logits(200, 300)
    expected = logits.numpy().argmax(axis=1).tolist()
    assert tokens(sample(logits, [row(temperature=0, seed=number) for number in range(200)])) == expected


@pytest.mark.parametrize("params", [{}, {"logit_bias": {9: 0.0}}])
def test_greedy_takes_the_first_of_equals(sample: Sample, params: dict[str, object]) -> None:
    logits = torch.zeros(1, 50)
    logits[0, [17, 30, 44]] = 2.0
    assert tokens(sample(logits, [row(temperature=0, **params)])) == [17]


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-9}])
def test_settings_that_leave_one_token_are_greedy(sample: Sample, params: dict[str, object]) -> None:
    logits = random_logits(100, 300)
    rows = [row(seed=5, position=position, **{"temperature": 2.0, **params}) for position in range(100)]
    assert tokens(sample(logits, rows)) == logits.argmax(dim=-1).tolist()


def support(sample: Sample, logits: Tensor, **params: object) -> Counter[int | None]:
    """What 400 draws of one row give."""
    rows = [row(seed=1, position=position, **params) for position in range(400)]
    return Counter(tokens(sample(logits.expand(400, -1), rows)))


def test_equal_tokens_are_kept_by_number(sample: Sample) -> None:
    """Which of the equals stay is left open; how many is not, and each that stays is drawn."""
    equal = torch.zeros(8)
    assert len(support(sample, equal)) == 8
    assert len(support(sample, equal, top_k=3)) == 3
    assert len(support(sample, equal, top_p=0.0)) == 1
    # Before the fifth of eight stands exactly 0.5, which does not exceed 0.5: Meta's rule keeps it.
    assert len(support(sample, equal, top_p=0.5)) == 5
    assert len(support(sample, equal, top_p=0.499)) == 4
    assert len(support(sample, equal, min_p=1.0)) == 8
    assert len(support(sample, equal, top_k=4, top_p=0.5)) == 3


def test_equal_tokens_at_the_cut(sample: Sample) -> None:
    logits = torch.tensor([3.0, 0.0, 0.0, 0.0, -50.0])
    kept = support(sample, logits, top_k=2)
    assert len(kept) == 2
    assert 0 in kept


def test_min_p_is_a_share_of_the_most_likely(sample: Sample) -> None:
    logits = torch.tensor([0.4, 0.3, 0.19, 0.11]).log()
    assert set(support(sample, logits, min_p=0.48)) == {0, 1}
    assert set(support(sample, logits, min_p=0.47)) == {0, 1, 2}
    assert set(support(sample, logits, min_p=0.27)) == {0, 1, 2, 3}


def test_top_p_counts_what_top_k_left(sample: Sample) -> None:
    """0.4 of 0.7 is 0.571: before the second stands more than 0.5 once top_k has cut, and less without it."""
    logits = torch.tensor([0.4, 0.3, 0.19, 0.11]).log()
    assert set(support(sample, logits, top_p=0.5)) == {0, 1}
    assert set(support(sample, logits, top_p=0.5, top_k=2)) == {0}


@pytest.mark.parametrize(
    "params",
    [
        {"top_p": 0.999},
        {"top_k": 2000},
        {"top_k": 2000, "top_p": 0.9},
        {"top_k": MANY},
        {"top_k": MANY + 1},
        {"top_p": 0.95, "min_p": 1e-3},
        {"min_p": 1e-4},
    ],
    ids=str,
)
def test_more_than_the_candidates(sample: Sample, params: dict[str, object]) -> None:
    logits = random_logits(40, 5000, seed=3, spread=1.0)
    rows = [row(seed=2, position=position, **params) for position in range(40)]
    kept = int((plain_probabilities(plain_adjusted(logits[0], rows[0]), rows[0].params) > 0).sum())
    assert kept >= MANY
    assert_plain(sample, logits, rows)


def test_tokens_beyond_the_candidates_are_drawn(sample: Sample) -> None:
    """Equal logits: of 5,000 kept, four in five draws fall outside the first 1,024."""
    rows = [row(seed=3, position=position, top_p=0.999) for position in range(300)]
    assert len(set(tokens(sample(torch.zeros(300, 5000), rows)))) > 280


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_p": 0.8},
        {"temperature": 1.3, "top_k": 8, "top_p": 0.9, "min_p": 0.03},
    ],
    ids=str,
)
def test_distribution(sample: Sample, params: dict[str, object]) -> None:
    """4,000 draws over positions, and the chi-square statistic: its mean is the degrees of freedom, its variance twice
    that."""
    logits = torch.tensor([2.0, 1.5, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, -3.0])
    draws = 4_000
    first = row(seed=11, position=0, **params)
    expected = plain_probabilities(plain_adjusted(logits, first), first.params) * draws
    rows = [SampleRow(first.params, 11, position, {}, frozenset(), frozenset()) for position in range(draws)]
    counts = Counter(tokens(sample(logits.expand(draws, -1), rows)))
    assert sum(counts.values()) == draws
    assert set(counts) <= {int(token) for token in np.flatnonzero(expected)}
    kept = expected > 0
    observed = np.array([counts[token] for token in range(len(expected))])[kept]
    freedom = int(kept.sum()) - 1
    assert freedom >= 2
    statistic = float(((observed - expected[kept]) ** 2 / expected[kept]).sum())
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_distribution_over_seeds(sample: Sample) -> None:
    """As over positions: requests that differ only in their seed draw independently."""
    logits = torch.tensor([1.0, 0.5, 0.0, -1.0])
    expected = torch.softmax(logits.double(), 0).numpy() * 3_000
    counts = Counter(tokens(sample(logits.expand(3_000, -1), [row(seed=seed, position=9) for seed in range(3_000)])))
    observed = np.array([counts[token] for token in range(4)])
    assert float(((observed - expected) ** 2 / expected).sum()) < 3 + 4 * math.sqrt(6)


def test_the_same_seed_and_position_give_the_same_token(sample: Sample) -> None:
    logits = random_logits(1, 500, spread=1.0).expand(100, -1)
    rows = [row(seed=77, position=position) for position in range(100)]
    drawn = tokens(sample(logits, rows))
    assert drawn == tokens(sample(logits, rows))
    assert len(set(drawn)) > 10
    other = tokens(sample(logits, [row(seed=78, position=position) for position in range(100)]))
    assert sum(one != two for one, two in zip(drawn, other, strict=True)) > 50


@pytest.mark.parametrize("temperature", [1e-9, 5e-324, 2.0])
@pytest.mark.parametrize("scale", [1.0, 1e4, 3e38])
def test_extreme_temperatures_do_not_overflow(sample: Sample, temperature: float, scale: float) -> None:
    logits = (torch.rand(50, 200, generator=torch.Generator().manual_seed(1)) * 2 - 1) * scale
    assert bool(torch.isfinite(logits).all())
    rows = [row(seed=4, position=position, temperature=temperature) for position in range(50)]
    drawn = tokens(sample(logits, rows))
    if temperature < 1 or scale > 1:
        assert drawn == logits.argmax(dim=-1).tolist()
    else:
        assert drawn == [plain_token(one, each) for one, each in zip(logits, rows, strict=True)]


def test_temperature_near_zero_draws_among_equals(sample: Sample) -> None:
    logits = torch.full((1, 20), -3.0)
    logits[0, [4, 9]] = 5.0
    assert set(support(sample, logits[0], temperature=1e-9)) == {4, 9}


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_gets_no_token_and_spoils_no_other(
    sample: Sample, poison: float, temperature: float
) -> None:
    logits = random_logits(5, 64)
    rows = [row(seed=6, position=position, temperature=temperature, logprobs=2) for position in range(5)]
    healthy = sample(logits, rows)
    spoiled = logits.clone()
    spoiled[1, 13] = poison
    spoiled[3] = poison
    results = sample(spoiled, rows)
    assert results[1] == results[3] == Sampled(token=None)
    assert [results[index] for index in (0, 2, 4)] == [healthy[index] for index in (0, 2, 4)]


def test_bias_of_a_hundred_forces_and_bans(sample: Sample) -> None:
    logits = random_logits(100, 64)
    likeliest = logits.argmax(dim=-1).tolist()
    for temperature in (0.0, 1.0):
        forced = [row(position=p, temperature=temperature, logit_bias={9: 100}) for p in range(100)]
        assert tokens(sample(logits, forced)) == [9] * 100
        banned = [row(position=p, temperature=temperature, logit_bias={t: -100}) for p, t in enumerate(likeliest)]
        assert all(drawn != token for drawn, token in zip(tokens(sample(logits, banned)), likeliest, strict=True))


ADJUSTMENTS: list[dict[str, object]] = [
    {"logit_bias": {0: 1.5, 7: -2.25, 63: 0.5}},
    {"presence_penalty": 1.5},
    {"presence_penalty": -2.0},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -0.7},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.5},
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2, "logit_bias": {3: 4.0, 5: -4.0}},
]


@pytest.mark.parametrize("params", ADJUSTMENTS, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_bias_and_penalties(sample: Sample, params: dict[str, object], temperature: float) -> None:
    """Small differences between likely tokens, so that an adjustment that is off picks another one."""
    rows = [
        row(
            seed=8,
            position=position,
            temperature=temperature,
            prompt={1, 2, 3, position % 64},
            output={3: 1, 4: 2, 5: 9, (position * 7) % 64: 3},
            forbidden={6} if position % 2 else set(),
            **params,
        )
        for position in range(200)
    ]
    logits = random_logits(200, 64, seed=9, spread=0.7)
    assert_plain(sample, logits, rows)
    assert tokens(sample(logits, rows)) != tokens(
        sample(logits, [row(seed=8, position=position, temperature=temperature) for position in range(200)])
    )


def test_penalties_need_a_completion_and_repetition_needs_a_prompt_or_one(sample: Sample) -> None:
    logits = random_logits(50, 64)
    plain = tokens(sample(logits, [row(position=position) for position in range(50)]))
    unused = [row(position=p, presence_penalty=2, frequency_penalty=2, prompt={1, 2}) for p in range(50)]
    assert tokens(sample(logits, unused)) == plain
    assert tokens(sample(logits, [row(position=p, repetition_penalty=5.0) for p in range(50)])) == plain


@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_a_penalty_that_overflows_still_gives_a_token(sample: Sample, params: dict[str, object]) -> None:
    """A legal repetition_penalty next to 0 makes a seen token's logit infinite: that token is taken."""
    logits = random_logits(1, 64)
    logits[0, 3] = 1.0
    assert tokens(sample(logits, [row(repetition_penalty=5e-324, output={3: 1}, **params)])) == [3]


def adjusted(logits: list[float], one: SampleRow) -> list[float]:
    batch = build([one], len(logits)).batch(torch.device("cpu"))
    return sampling.adjust(torch.tensor(logits), next(sampling.rows_of(batch))).tolist()


def test_bias_is_added() -> None:
    assert adjusted([1.0, -2.0, 3.0, 0.0], row(logit_bias={1: 100.0, 3: -0.5})) == [1.0, 98.0, 3.0, -0.5]


def test_repetition_is_ctrls() -> None:
    one = row(repetition_penalty=1.5, prompt={0, 2}, output={1: 7})
    assert adjusted([3.0, -3.0, 0.0, 3.0], one) == [2.0, -4.5, 0.0, 3.0]


def test_counts_are_openais() -> None:
    one = row(presence_penalty=0.5, frequency_penalty=0.25, output={0: 1, 2: 4}, prompt={1})
    assert adjusted([1.0, 1.0, 1.0], one) == [0.25, 1.0, -0.5]


def test_what_is_forbidden_has_no_likelihood() -> None:
    assert adjusted([1.0, 2.0, 3.0], row(forbidden={2, 0}, logit_bias={0: 100})) == [-math.inf, 2.0, -math.inf]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_forbidden_tokens_never_come(sample: Sample, temperature: float) -> None:
    """Not even when they are as good as certain, or a bias asks for them."""
    logits = random_logits(200, 16)
    logits[:, [2, 5]] += 50
    rows = [
        row(position=p, temperature=temperature, forbidden={2, 5}, logit_bias={5: 100}, min_tokens=1, min_p=0.01)
        for p in range(200)
    ]
    assert not {2, 5} & set(tokens(sample(logits, rows)))
    assert_plain(sample, logits, rows)


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_logprobs_are_the_models_own(sample: Sample, count: int) -> None:
    """Before bias, penalties, temperature and filters, of the chosen token and of the most likely."""
    logits = random_logits(50, 300, spread=5.0)
    rows = [
        row(position=p, temperature=1.7, logprobs=count, top_k=40, logit_bias={3: 9.0}, forbidden={1}, output={3: 1})
        for p in range(50)
    ]
    expected = torch.log_softmax(logits.double(), dim=-1).numpy()
    outside = 0
    for result, exact in zip(sample(logits, rows), expected, strict=True):
        assert result.logprobs is not None
        assert result.token is not None
        assert result.logprobs.logprob == pytest.approx(exact[result.token], abs=1e-5)
        order = np.argsort(-exact, kind="stable")[:count].tolist()
        assert result.logprobs.top_ids == order
        assert result.logprobs.top_logprobs == pytest.approx(exact[order], abs=1e-5)
        outside += result.token not in order
    assert outside > 0


def test_the_same_token_has_the_same_logprob_in_both_places(sample: Sample) -> None:
    logits = random_logits(20, 300)
    for result in sample(logits, [row(temperature=0, logprobs=3) for _ in range(20)]):
        assert result.logprobs is not None
        assert result.token == result.logprobs.top_ids[0]
        assert result.logprobs.logprob == result.logprobs.top_logprobs[0]


def test_no_logprobs_unless_asked_for(sample: Sample) -> None:
    assert sample(random_logits(1, 30), [row()])[0].logprobs is None


def test_logits_are_not_changed(sample: Sample) -> None:
    logits = random_logits(8, 64)
    kept = logits.clone()
    sample(
        logits,
        [
            row(position=p, logit_bias={1: 5.0}, repetition_penalty=2.0, prompt={2}, forbidden={3}, output={4: 1})
            for p in range(8)
        ],
    )
    assert torch.equal(logits, kept)


ASKED: list[dict[str, object]] = [
    {"temperature": 0.0, "logprobs": 3},
    {"logprobs": 20},
    {"top_p": 0.9, "logprobs": 0},
    {"top_k": 50, "temperature": 1.9},
    {"min_p": 0.1},
    {"top_p": 0.9999, "temperature": 2.0},
    {"logit_bias": {5: 3.0}, "repetition_penalty": 1.2, "presence_penalty": 1.0, "logprobs": 1},
]


@pytest.mark.parametrize("vocabulary", [257, 5001])
def test_a_row_in_any_batch_is_the_row_alone(sample: Sample, vocabulary: int) -> None:
    """Tokens, and logprobs to the bit. Odd widths, so that rows begin at every alignment."""
    pool = random_logits(24, vocabulary, seed=4)
    asked = [
        row(seed=index, position=index, prompt={1, 5}, output={7: 2}, **ASKED[index % len(ASKED)])
        for index in range(24)
    ]
    alone = [sample(pool[index : index + 1].clone(), [asked[index]])[0] for index in range(24)]

    @settings(deadline=None, max_examples=20)
    @given(st.lists(st.integers(0, 23), min_size=1, max_size=30))
    def check(chosen: list[int]) -> None:
        assert sample(pool[chosen], [asked[index] for index in chosen]) == [alone[index] for index in chosen]

    check()


def test_no_rows(sample: Sample) -> None:
    assert sample(torch.empty(0, 64), []) == []


def mask_of(vocabulary: int, allowed: Set[int]) -> np.ndarray:
    words = np.zeros(-(-vocabulary // 32), np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words.view(np.int32)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_come(sample: Sample, temperature: float) -> None:
    logits = random_logits(100, 70, spread=1.0)
    rows = [row(position=p, temperature=temperature, allowed_token_ids=(3, 64, 69)) for p in range(100)]
    assert set(tokens(sample(logits, rows))) == {3, 64, 69}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammars_mask_and_a_list_allow_what_both_allow(sample: Sample, temperature: float) -> None:
    rows = [
        dataclasses.replace(
            row(position=p, temperature=temperature, allowed_token_ids=(3, 64, 69), forbidden={64}, logprobs=2),
            mask=mask_of(70, {3, 64, 65}),
        )
        for p in range(20)
    ]
    results = sample(random_logits(20, 70), rows)
    assert set(tokens(results)) == {3}
    assert all(result.logprobs is not None and len(result.logprobs.top_ids) == 2 for result in results)


def test_a_mask_of_one_row_leaves_the_others_alone(sample: Sample) -> None:
    logits = random_logits(3, 70)
    rows = [row(position=p, seed=5) for p in range(3)]
    masked = [rows[0], dataclasses.replace(rows[1], mask=torch.from_numpy(mask_of(70, {11}))), rows[2]]
    free = tokens(sample(logits, rows))
    assert tokens(sample(logits, masked)) == [free[0], 11, free[2]]


@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_k": 3}], ids=str)
def test_where_everything_is_forbidden_there_is_no_token(sample: Sample, params: dict[str, object]) -> None:
    logits = random_logits(4, 40)
    logits[3, 2] = math.inf
    rows = [
        row(logprobs=1, **params),
        dataclasses.replace(row(logprobs=1, **params), mask=mask_of(40, set())),
        row(allowed_token_ids=(7,), forbidden={7}, **params),
        row(allowed_token_ids=(7,), forbidden={7}, **params),
    ]
    first, *others = sample(logits, rows)
    assert first.token is not None
    assert others == [Sampled(None, none_allowed=True)] * 2 + [Sampled(None)]


@pytest.mark.parametrize(
    ("words", "output", "bad"),
    [
        (((5,),), (), {5}),
        (((5,),), (1, 2), {5}),
        (((1, 5),), (), set()),
        (((1, 5),), (1,), {5}),
        (((1, 5),), (1, 2), set()),
        (((1, 2, 5), (2, 6), (7, 2, 8)), (9, 1, 2), {5, 6}),
        (((1, 2, 3, 4),), (2, 3), set()),
        (((2, 2, 2),), (2,), set()),
        (((2, 2, 2),), (2, 2, 2), {2}),
    ],
)
def test_bad_words(sample: Sample, words: tuple[tuple[int, ...], ...], output: tuple[int, ...], bad: set[int]) -> None:
    """A word's last token is forbidden where the completion ends with the others."""
    one = dataclasses.replace(row(bad_words=words, temperature=2.0), output_ids=list(output))
    rows = [dataclasses.replace(one, position=position) for position in range(300)]
    assert set(range(10)) - set(tokens(sample(torch.zeros(300, 10), rows))) == bad


def test_what_a_batch_holds() -> None:
    rows = [
        row(temperature=0.5, top_k=3, top_p=0.25, min_p=0.125, seed=9, position=4),
        row(
            temperature=0,
            top_k=50,
            repetition_penalty=1.5,
            presence_penalty=-1,
            frequency_penalty=0.5,
            logit_bias={7: 2.0, 1: -1.0},
            prompt={30, 2},
            output={2: 1, 9: 3},
            forbidden={1},
            logprobs=4,
        ),
    ]
    batch = build(rows, 40).batch(torch.device("cpu"))
    assert batch.temperature.tolist() == [0.5, 0.0]
    assert batch.top_k.tolist() == [3, 50]
    assert batch.top_p.tolist() == [0.25, 1.0]
    assert batch.min_p.tolist() == [0.125, 0.0]
    assert batch.noise_keys.tolist() == [noise_key(9, 4), noise_key(0, 0)]
    assert batch.repetition.tolist() == [1.0, 1.5]
    assert batch.presence.tolist() == [0.0, -1.0]
    assert batch.frequency.tolist() == [0.0, 0.5]
    assert batch.entry_starts.tolist() == [0, 0, 5]
    assert batch.entry_ids.tolist() == [1, 2, 7, 9, 30]
    assert batch.entry_bias.tolist() == [-math.inf, 0.0, 2.0, 0.0, 0.0]
    assert batch.entry_counts.tolist() == [0, 1, 0, 3, 0]
    assert batch.entry_seen.tolist() == [False, True, False, True, True]
    assert (batch.mask, batch.top_n, batch.greedy, batch.plain) == (None, 4, False, False)
    assert batch.noise_keys.dtype == torch.int64
    assert batch.top_k.dtype == batch.entry_starts.dtype == batch.entry_ids.dtype == batch.entry_counts.dtype
    plain = build(rows[:1], 40).batch(torch.device("cpu"))
    assert (plain.top_n, plain.greedy, plain.plain, len(plain.entry_ids)) == (None, False, True, 0)
    assert build([row(temperature=0)] * 2, 40).batch(torch.device("cpu")).greedy
