"""`sample` and `logprobs` of the CPU's set against their definition, on large vocabularies and awkward ones; and the
definition's log probabilities against float64. What the parameters mean is tests/engine/test_sampler.py's matter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pronk.kernels import reference
from pronk.kernels.cases import SAMPLING, language_like, sampling_batch, sampling_row, with_entries
from pronk.kernels.cpu import CpuKernels
from pronk.kernels.interface import NONE_ALLOWED, NOT_FINITE, Kernels


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


cpu = CpuKernels(1)
each_set = pytest.mark.parametrize("kernels", [cpu, reference], ids=["cpu", "reference"])


@pytest.mark.parametrize("parameters", SAMPLING, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_a_large_vocabulary(parameters: dict[str, float], dtype: torch.dtype) -> None:
    logits = language_like(4, 128256, seed=1, dtype=dtype)
    batch = sampling_batch(4, **parameters, top_n=20)  # type: ignore[arg-type]
    actual, expected = cpu.sample(logits, batch), reference.sample(logits, batch)
    assert actual.token_ids.tolist() == expected.token_ids.tolist()
    assert actual.top_ids is not None
    assert expected.top_ids is not None
    assert torch.equal(actual.top_ids, expected.top_ids)
    torch.testing.assert_close(actual.logprobs, expected.logprobs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(actual.top_logprobs, expected.top_logprobs, rtol=1e-6, atol=1e-5)


@settings(deadline=None, max_examples=150)
@given(
    # Few values, so that there are equals at every cut.
    st.lists(st.sampled_from([-40.0, -3.0, -1.5, 0.0, 0.25, 0.5, 2.0, 7.0]), min_size=1, max_size=300),
    st.sampled_from([0.0, 0.3, 1.0, 1.9]),
    st.one_of(st.just(0), st.integers(1, 310)),
    st.one_of(st.just(1.0), st.floats(0.0, 1.0, width=32)),
    st.one_of(st.just(0.0), st.floats(0.0, 1.0, width=32)),
    st.integers(0, 2**20),
)
def test_equals(values: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int) -> None:
    logits = torch.tensor([values])
    batch = sampling_batch(1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    assert cpu.sample(logits, batch).token_ids.tolist() == reference.sample(logits, batch).token_ids.tolist()


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(1, 100))
def test_entries_and_masks(data: st.DataObject, vocabulary: int) -> None:
    number = st.floats(-20, 20, width=32)
    logits = torch.tensor(data.draw(st.lists(st.lists(number, min_size=vocabulary, max_size=vocabulary), max_size=3)))
    num_rows = len(logits)
    logits = logits.view(num_rows, vocabulary)
    entry = st.tuples(st.one_of(number, st.just(-math.inf)), st.integers(0, 5), st.booleans())
    entries = [
        data.draw(st.dictionaries(st.integers(0, vocabulary - 1), entry, max_size=vocabulary)) for _ in range(num_rows)
    ]
    words = st.lists(
        st.one_of(st.just(-1), st.integers(-(2**31), 2**31 - 1)),
        min_size=-(-vocabulary // 32),
        max_size=-(-vocabulary // 32),
    )
    masks = [data.draw(words) for _ in range(num_rows)]
    batch = sampling_batch(
        num_rows, temperature=data.draw(st.sampled_from([0.0, 1.0])), top_k=data.draw(st.integers(0, 3))
    )
    batch = dataclasses.replace(
        with_entries(batch, entries),
        mask=torch.tensor(masks, dtype=torch.int32).view(num_rows, -(-vocabulary // 32))
        if data.draw(st.booleans())
        else None,
        repetition=torch.full((num_rows,), data.draw(st.floats(0.5, 2, width=32))),
        presence=torch.full((num_rows,), data.draw(st.floats(-2, 2, width=32))),
        frequency=torch.full((num_rows,), data.draw(st.floats(-2, 2, width=32))),
    )
    found = cpu.sample(logits, batch).token_ids.tolist()
    assert found == reference.sample(logits, batch).token_ids.tolist()
    for row, token in enumerate(found):
        forbidden = {token for token, (bias, _, _) in entries[row].items() if bias == -math.inf}
        if batch.mask is not None:
            forbidden |= {token for token in range(vocabulary) if not masks[row][token // 32] >> token % 32 & 1}
        assert token not in forbidden
        assert (token == NONE_ALLOWED) == (len(forbidden) == vocabulary)


@each_set
def test_no_token(kernels: Kernels) -> None:
    logits = torch.zeros(4, 40)
    logits[1, 39] = math.nan
    mask = torch.full((4, 2), -1, dtype=torch.int32)
    mask[1] = 0
    mask[2, 0] = 0
    mask[3, 0], mask[3, 1] = 0, -1 << 8  # what lies past the vocabulary allows nothing
    samples = kernels.sample(logits, sampling_batch(4, mask=mask, top_n=0))
    assert samples.logprobs is not None
    assert samples.token_ids.tolist()[1::2] == [NOT_FINITE, NONE_ALLOWED]
    assert samples.token_ids[2] >= 32
    assert samples.logprobs.isnan().tolist() == [False, True, False, True]


@each_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("vocabulary", "top_n"), [(1, 1), (63, 20), (2000, 0), (2000, 7), (128256, 20)])
def test_logprobs(kernels: Kernels, dtype: torch.dtype, vocabulary: int, top_n: int) -> None:
    logits = language_like(3, max(vocabulary, 30), seed=2, dtype=dtype)[:, :vocabulary]
    token_ids = torch.tensor([0, vocabulary - 1, -1])
    chosen, top_ids, top = kernels.logprobs(logits, token_ids, top_n)
    exact = logits.double().log_softmax(-1)
    order = torch.from_numpy(np.argsort(-logits.double().numpy(), axis=1, kind="stable"))[:, :top_n]
    assert torch.equal(top_ids, order)
    torch.testing.assert_close(top.double(), exact.gather(1, order), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(chosen[:2].double(), exact[[0, 1], token_ids[:2]], rtol=1e-6, atol=1e-5)
    assert chosen[2].isnan()


@each_set
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_logprobs_of_rows_that_are_not_numbers(kernels: Kernels, poison: float) -> None:
    logits = language_like(3, 500, seed=3)
    healthy = kernels.logprobs(logits, torch.zeros(3, dtype=torch.int64), 5)
    logits[1, 400] = poison
    chosen, top_ids, top = kernels.logprobs(logits, torch.zeros(3, dtype=torch.int64), 5)
    assert chosen[1].isnan()
    assert top[1].isnan().all()
    for found, before in zip((chosen, top_ids, top), healthy, strict=True):
        assert torch.equal(found[::2], before[::2])


@each_set
def test_minus_infinity_is_a_probability_of_zero(kernels: Kernels) -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    chosen, top_ids, top = kernels.logprobs(logits, torch.tensor([1]), 3)
    assert chosen.tolist() == [-math.inf]
    assert top_ids.tolist() == [[0, 2, 1]]
    assert top[0].tolist() == pytest.approx([math.log(0.5)] * 2 + [-math.inf])


@pytest.mark.parametrize("parameters", SAMPLING[1:5], ids=str)
def test_a_row_in_any_place_is_the_row_alone(parameters: dict[str, float]) -> None:
    """To the bit, log probabilities included."""
    logits = language_like(5, 5001, seed=4)
    batch = sampling_batch(5, **parameters, top_n=3)  # type: ignore[arg-type]
    together = cpu.sample(logits, batch)
    for row in range(5):
        alone = cpu.sample(logits[row : row + 1].clone(), sampling_row(batch, row))
        for name in ("token_ids", "logprobs", "top_ids", "top_logprobs"):
            assert torch.equal(getattr(alone, name), getattr(together, name)[row : row + 1])


@each_set
def test_linear_argmax_without_rows(kernels: Kernels) -> None:
    ids, values = kernels.linear_argmax(torch.empty(0, 8), kernels.pack(torch.ones(5, 8)))
    assert ids.shape == values.shape == (0,)
    assert ids.dtype == torch.int64
