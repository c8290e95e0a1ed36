"""Choosing tokens, and log probabilities: against their definitions, and each row against itself alone."""

from __future__ import annotations

import math
import random
from dataclasses import fields, replace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from pronk.kernels import noise, reference
from pronk.kernels.cases import SAMPLING, language_like, sampling_batch, sampling_row, with_entries
from pronk.kernels.gpu.logprobs import MOST_TOP_N, logprobs
from pronk.kernels.gpu.sampling import CHUNK, sample
from pronk.kernels.gpu.sampling_kernels import exponential, ordered_bits
from pronk.kernels.interface import NONE_ALLOWED, NOT_FINITE, Samples, SamplingBatch

each_parameters = pytest.mark.parametrize("parameters", SAMPLING, ids=str)


def on(device: str, batch: SamplingBatch) -> SamplingBatch:
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: each.to(device) for name, each in tensors.items() if isinstance(each, Tensor)})


def assert_alike(actual: Samples, expected: Samples) -> None:
    """The same tokens; log probabilities may differ as sums of 100,000 numbers may."""
    assert actual.token_ids.dtype == torch.int64
    assert actual.token_ids.tolist() == expected.token_ids.tolist()
    assert (actual.top_ids is None) == (expected.top_ids is None)
    if actual.top_ids is not None and expected.top_ids is not None:
        assert torch.equal(actual.top_ids.cpu(), expected.top_ids)
        for name in ("logprobs", "top_logprobs"):
            torch.testing.assert_close(getattr(actual, name).cpu(), getattr(expected, name), rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@each_parameters
def test_sample(device: str, parameters: dict[str, float], dtype: torch.dtype) -> None:
    """Two chunks and a part of a third."""
    logits = language_like(8, 2 * CHUNK + 77, seed=1, dtype=dtype)
    batch = sampling_batch(8, **parameters, top_n=5)  # type: ignore[arg-type]
    kept = logits.to(device).clone()
    moved = logits.to(device)
    assert_alike(sample(moved, on(device, batch)), reference.sample(logits, batch))
    assert torch.equal(moved, kept)


@pytest.mark.gpu
@each_parameters
def test_sample_from_a_whole_vocabulary(device: str, parameters: dict[str, float]) -> None:
    if device == "cpu":
        pytest.skip("minutes, in the interpreter")
    logits = language_like(32, 128256, seed=2)
    batch = sampling_batch(32, **parameters, top_n=20)  # type: ignore[arg-type]
    assert_alike(sample(logits.to(device), on(device, batch)), reference.sample(logits, batch))


@pytest.mark.parametrize("seed", range(12))
def test_equals_at_every_cut(device: str, seed: int) -> None:
    """Rows of few values, each with its own parameters, in one batch."""
    source = random.Random(seed)
    num_rows, vocabulary = 6, source.choice([1, 5, 40, 300])
    values = [-40.0, -3.0, -1.5, -0.0, 0.0, 0.25, 0.5, 2.0, 7.0]
    logits = torch.tensor([[source.choice(values) for _ in range(vocabulary)] for _ in range(num_rows)])
    batch = replace(
        sampling_batch(num_rows, seed=seed),
        temperature=torch.tensor([source.choice([0.0, 0.3, 1.0, 1.9]) for _ in range(num_rows)]),
        top_k=torch.tensor([source.choice([0, 1, 2, 7, 310]) for _ in range(num_rows)], dtype=torch.int32),
        top_p=torch.tensor([source.choice([1.0, source.random(), 0.0]) for _ in range(num_rows)]),
        min_p=torch.tensor([source.choice([0.0, source.random()]) for _ in range(num_rows)]),
    )
    assert_alike(sample(logits.to(device), on(device, batch)), reference.sample(logits, batch))


@pytest.mark.parametrize("seed", range(12))
def test_entries_and_masks(device: str, seed: int) -> None:
    """Every number of entries in a row, none among them, so that the rows of entries are found."""
    source = random.Random(seed)
    num_rows, vocabulary = source.choice([1, 2, 7]), source.choice([33, 100, CHUNK + 40])
    logits = language_like(num_rows, vocabulary, seed=seed, dtype=torch.float32)

    def entry() -> tuple[float, int, bool]:
        return source.choice([0.0, 3.5, -20.0, -math.inf]), source.randrange(4), source.random() < 0.5

    counts = [source.choice([0, 1, vocabulary // 2, vocabulary]) for _ in range(num_rows)]
    entries = [{token: entry() for token in source.sample(range(vocabulary), count)} for count in counts]
    words = torch.randint(-(2**31), 2**31, (num_rows, -(-vocabulary // 32)), generator=torch.Generator().manual_seed(1))
    mask = words.to(torch.int32) if seed % 2 else None
    batch = replace(
        with_entries(sampling_batch(num_rows, temperature=seed % 3 / 2, top_k=seed % 4, mask=mask, top_n=2), entries),
        repetition=torch.full((num_rows,), source.choice([1.0, 0.5, 1.7])),
        presence=torch.full((num_rows,), source.choice([0.0, -1.5, 2.0])),
        frequency=torch.full((num_rows,), source.choice([0.0, -0.5, 2.0])),
    )
    assert_alike(sample(logits.to(device), on(device, batch)), reference.sample(logits, batch))


def test_an_adjusted_logit_overflows_to_the_largest(device: str) -> None:
    logits = torch.tensor([[3e38, 0.0], [-3e38, 0.0]])
    batch = with_entries(sampling_batch(2, temperature=0), [{0: (3e38, 0, False)}, {0: (-3e38, 0, False)}])
    assert sample(logits.to(device), on(device, batch)).token_ids.tolist() == [0, 1]


def test_no_token(device: str) -> None:
    logits = torch.zeros(5, 40)
    logits[1, 39] = math.nan
    logits[4, 3] = -math.inf
    mask = torch.full((5, 2), -1, dtype=torch.int32)
    mask[1] = 0
    mask[2, 0] = 0
    mask[3, 0], mask[3, 1] = 0, -1 << 8  # what lies past the vocabulary allows nothing
    samples = sample(logits.to(device), on(device, sampling_batch(5, mask=mask, top_n=0)))
    assert samples.logprobs is not None
    tokens = samples.token_ids.tolist()
    assert tokens[1::2] == [NOT_FINITE, NONE_ALLOWED]
    assert tokens[4] == NOT_FINITE
    assert tokens[2] >= 32
    assert samples.logprobs.isnan().tolist() == [False, True, False, True, True]
    for poison in (math.nan, math.inf, -math.inf):
        logits = torch.zeros(2, CHUNK + 5)
        logits[0, CHUNK + 1] = poison
        for temperature in (0.0, 1.0):
            found = sample(logits.to(device), on(device, sampling_batch(2, temperature=temperature))).token_ids
            assert (found < 0).tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("vocabulary", "top_n"), [(1, 1), (63, 20), (9000, 0), (9000, 7), (300, MOST_TOP_N + 1)])
def test_logprobs(device: str, dtype: torch.dtype, vocabulary: int, top_n: int) -> None:
    logits = language_like(3, vocabulary, seed=2, dtype=dtype)
    token_ids = torch.tensor([0, vocabulary - 1, -1])
    chosen, top_ids, top = (each.cpu() for each in logprobs(logits.to(device), token_ids.to(device), top_n))
    exact = logits.double().log_softmax(-1)
    order = logits.double().sort(dim=-1, descending=True, stable=True).indices[:, :top_n]
    assert torch.equal(top_ids, order)
    torch.testing.assert_close(top.double(), exact.gather(1, order), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(chosen[:2].double(), exact[[0, 1], token_ids[:2]], rtol=1e-6, atol=1e-5)
    assert chosen[2].isnan()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_logprobs_of_rows_that_are_not_numbers(device: str, poison: float) -> None:
    logits, first = language_like(3, 500, seed=3).to(device), torch.zeros(3, dtype=torch.int64, device=device)
    healthy = logprobs(logits, first, 5)
    logits[1, 400] = poison
    found = logprobs(logits, first, 5)
    assert found[0][1].isnan()
    assert found[2][1].isnan().all()
    for now, before in zip(found, healthy, strict=True):
        assert torch.equal(now[::2], before[::2])


def test_minus_infinity_is_a_probability_of_zero(device: str) -> None:
    logits = torch.full((1, CHUNK + 3), -math.inf)
    logits[0, 0] = logits[0, 2] = 0.0
    chosen, top_ids, top = logprobs(logits.to(device), torch.tensor([1], device=device), 3)
    assert chosen.tolist() == [-math.inf]
    assert top_ids.tolist() == [[0, 2, 1]]
    assert top[0].tolist() == pytest.approx([math.log(0.5)] * 2 + [-math.inf])


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "adjusted"])
def test_a_row_in_any_place_is_the_row_alone(device: str, *, plain: bool) -> None:
    """To the bit, log probabilities included; rows of every kind in one batch."""
    logits = language_like(len(SAMPLING), CHUNK + 9, seed=4).to(device)
    batch = sampling_batch(len(SAMPLING), top_n=3)
    for name in ("temperature", "top_k", "top_p", "min_p"):
        standard = getattr(batch, name)
        given = [parameters.get(name, value) for parameters, value in zip(SAMPLING, standard.tolist(), strict=True)]
        batch = replace(batch, **{name: torch.tensor(given, dtype=standard.dtype)})
    if not plain:
        batch = with_entries(batch, [dict.fromkeys(range(row), (-4.0, 1, True)) for row in range(len(SAMPLING))])
    batch = on(device, batch)
    together = sample(logits, batch)
    for row in range(len(SAMPLING)):
        alone = sample(logits[row : row + 1].clone(), sampling_row(batch, row))
        for name in ("token_ids", "logprobs", "top_ids", "top_logprobs"):
            assert torch.equal(getattr(alone, name), getattr(together, name)[row : row + 1])


def test_no_rows(device: str) -> None:
    batch = on(device, sampling_batch(0, top_n=2))
    samples = sample(torch.empty(0, 50, device=device), batch)
    assert samples.top_ids is not None
    assert samples.token_ids.shape == (0,)
    assert samples.top_ids.shape == (0, 2)


def test_rows_that_are_not_contiguous_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        sample(torch.zeros(50, 2, device=device).t(), on(device, sampling_batch(2)))


@triton.jit
def _exponential_kernel(key_ptr, out_ptr, num, BLOCK: tl.constexpr):
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + tokens, exponential(tl.load(key_ptr), tokens), mask=tokens < num)


@pytest.mark.parametrize("key", [0, -1, 0x123456789ABCDEF0, -(2**63)], ids=hex)
def test_noise_is_that_of_the_definition(device: str, key: int) -> None:
    num = 50_000
    out = torch.empty(num, device=device)
    _exponential_kernel[(triton.cdiv(num, 4096),)](torch.tensor([key], device=device), out, num, BLOCK=4096)
    torch.testing.assert_close(out.cpu(), noise.exponential(key, torch.arange(num)), rtol=2e-6, atol=0)


@triton.jit
def _ordered_bits_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(out_ptr + places, ordered_bits(tl.load(x_ptr + places)))


def test_bits_are_ordered_as_numbers_are(device: str) -> None:
    numbers = [-math.inf, -3.4e38, -1.5, -1e-45, -0.0, 0.0, 1e-45, 1.0, 1.0000001, 3.4e38, math.inf]
    x = torch.tensor(numbers + [0.0] * (16 - len(numbers)))
    out = torch.empty(16, dtype=torch.int64, device=device)
    _ordered_bits_kernel[(1,)](x.to(device), out, BLOCK=16)
    bits = out.tolist()
    for a, b in zip(range(11), range(1, 11), strict=False):
        assert (bits[a] < bits[b]) == (x[a] < x[b]).item()
        assert (bits[a] == bits[b]) == (x[a] == x[b]).item()
    assert min(bits) >= 0
    assert max(bits) < 2**32
