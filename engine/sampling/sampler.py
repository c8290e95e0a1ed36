"""Sampler: what rows ask for -> the tensors that `Kernels.sample` takes, and what it found -> tokens and logprobs.

Knows what a row asks for; not whose it is, nor how it came about; and nothing of how a token is chosen.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Set
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pronk.engine.request import SamplingParams, TokenLogprobs
from pronk.kernels.interface import NONE_ALLOWED, Samples, SamplingBatch
from pronk.kernels.noise import noise_key

SMALLEST = float(np.finfo(np.float32).tiny)
"""What a smaller temperature or penalty counts as: float32 has no room for it, and some devices take it for 0."""
LARGEST_TOP_K = 2**31 - 1
ALIGNMENT = 16
"""Bytes: what a kernel may read at a time."""

NUMBERS: Mapping[str, type[np.generic]] = {
    "noise_keys": np.int64,
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "repetition": np.float32,
    "presence": np.float32,
    "frequency": np.float32,
}
"""What a SamplingBatch has one number of for each row."""

Numbers = tuple[int, float, int, float, float, float, float, float]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class SampleRow:
    """What one row's next token depends on, beside its logits."""

    params: SamplingParams
    seed: int
    position: int
    """Of the token to be sampled, counted from the sequence's first."""
    output_counts: Mapping[int, int]
    """How often the completion holds each token."""
    prompt_ids: Set[int]
    """Tokens of the prompt; needed only with repetition_penalty."""
    forbidden_ids: Set[int]
    """Tokens that must not come next."""
    output_ids: Rows[int] = ()
    """The completion so far; needed only with bad_words."""
    mask: Array | Tensor | None = None
    """int32 [ceil(V / 32)], on the host: a grammar's. Bit t % 32 of word t // 32 set: token t may come next."""


@dataclass(frozen=True)
class Sampled:
    """One row's result. token is None when there is none: its logits were not finite, or nothing was allowed."""

    token: int | None
    logprobs: TokenLogprobs | None = None
    none_allowed: bool = False
    """Why there is no token: everything was forbidden."""


@dataclass(frozen=True)
class SamplingArrays:
    """A SamplingBatch on the host. arrays: its tensors by their names; no mask is left out."""

    arrays: Mapping[str, Array]
    top_n: int | None
    greedy: bool
    plain: bool

    def batch(self, device: torch.device) -> SamplingBatch:
        """-> on the device, copied at once, without waiting for it."""
        tensors: dict[str, Any] = {"mask": None, **_to_device(self.arrays, device)}
        return SamplingBatch(**tensors, top_n=self.top_n, greedy=self.greedy, plain=self.plain)


def build(rows: Rows[SampleRow], vocab_size: int) -> SamplingArrays:
    """What `kernels.sample` needs to know of the rows."""
    entries = [_entries(row) for row in rows]
    masks = [_mask(row, vocab_size) for row in rows]
    asked = [row.params.logprobs for row in rows if row.params.logprobs is not None]
    masked = any(mask is not None for mask in masks)
    arrays = {
        **columns([numbers(row.params, row.seed, row.position) for row in rows]),
        "entry_starts": np.cumsum([0, *(len(each.ids) for each in entries)], dtype=np.int32),
        "entry_ids": _joined([each.ids for each in entries], np.int32),
        "entry_bias": _joined([each.bias for each in entries], np.float32),
        "entry_counts": _joined([each.counts for each in entries], np.int32),
        "entry_seen": _joined([each.seen for each in entries], np.bool_),
    }
    if masked:
        everything = np.full(num_words(vocab_size), -1, np.int32)
        arrays["mask"] = np.stack([everything if mask is None else mask for mask in masks])
    return SamplingArrays(
        arrays,
        top_n=max(asked, default=None),
        greedy=all(row.params.temperature == 0 for row in rows),
        plain=not masked and not any(len(each.ids) for each in entries),
    )


def numbers(params: SamplingParams, seed: int, position: int) -> Numbers:
    """One row's NUMBERS, in their order. position: of the token that is sampled."""
    return (
        noise_key(seed, position),
        _at_least_smallest(params.temperature),
        min(params.top_k, LARGEST_TOP_K),
        params.top_p,
        params.min_p,
        _at_least_smallest(params.repetition_penalty),
        params.presence_penalty,
        params.frequency_penalty,
    )


def columns(rows: Rows[Numbers]) -> dict[str, Array]:
    """-> each of the NUMBERS of all rows."""
    return {name: np.array([row[place] for row in rows], dtype) for place, (name, dtype) in enumerate(NUMBERS.items())}


def read(samples: Samples, asked: Rows[int | None]) -> list[Sampled]:
    """samples: on the host; asked: for each row, how many of the most likely tokens' log probabilities, or None."""
    tokens = samples.token_ids.tolist()
    if samples.logprobs is None or samples.top_ids is None or samples.top_logprobs is None:
        return [_sampled(token) for token in tokens]
    found = zip(tokens, samples.logprobs.tolist(), samples.top_ids.tolist(), samples.top_logprobs.tolist(), strict=True)
    return [
        _sampled(token, None if count is None else TokenLogprobs(logprob, top_ids[:count], top[:count]))
        for count, (token, logprob, top_ids, top) in zip(asked, found, strict=True)
    ]


def _sampled(token: int, logprobs: TokenLogprobs | None = None) -> Sampled:
    if token < 0:
        return Sampled(None, none_allowed=token == NONE_ALLOWED)
    return Sampled(token, logprobs)


def num_words(vocab_size: int) -> int:
    """Of a mask."""
    return -(-vocab_size // 32)


@dataclass(frozen=True)
class Entries:
    """The tokens whose logits change, in the order of their ids, and how: see `SamplingBatch`."""

    ids: Array
    bias: Array
    counts: Array
    seen: Array


NO_ENTRIES = Entries(np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int32), np.empty(0, np.bool_))


def _entries(row: SampleRow) -> Entries:
    params = row.params
    counts = row.output_counts if params.presence_penalty or params.frequency_penalty else {}
    seen = row.prompt_ids | row.output_counts.keys() if params.repetition_penalty != 1 else frozenset()
    forbidden = row.forbidden_ids | _bad_ends(params.bad_words, row.output_ids)
    if not (params.logit_bias or counts or seen or forbidden):
        return NO_ENTRIES
    named = {*params.logit_bias, *counts, *seen, *forbidden}
    ids = np.sort(np.fromiter(named, np.int32, len(named)))
    bias = np.zeros(len(ids), np.float32)
    bias[_places(ids, params.logit_bias)] = np.fromiter(params.logit_bias.values(), np.float32)
    bias[_places(ids, forbidden)] = -np.inf
    counted = np.zeros(len(ids), np.int32)
    counted[_places(ids, counts)] = np.fromiter(counts.values(), np.int32)
    was_seen = np.zeros(len(ids), np.bool_)
    was_seen[_places(ids, seen)] = True
    return Entries(ids, bias, counted, was_seen)


def _places(ids: Array, named: Set[int] | Mapping[int, Any]) -> Array:
    """-> where in `ids`, which rise, those named are: in the order of `named`."""
    places: Array = np.searchsorted(ids, np.fromiter(named, np.int32, len(named)))
    return places


def _bad_ends(words: Rows[tuple[int, ...]], output_ids: Rows[int]) -> Set[int]:
    """-> the last token of each word whose other tokens the completion ends with."""
    return {
        last
        for *others, last in words
        if len(others) <= len(output_ids) and list(output_ids[len(output_ids) - len(others) :]) == others
    }


def _mask(row: SampleRow, vocab_size: int) -> Array | None:
    """-> int32 [num_words]: what both the grammar and the list of allowed tokens let pass; None for all."""
    allowed = row.params.allowed_token_ids
    if row.mask is None:
        return _mask_of(allowed, vocab_size) if allowed else None
    mask: Array = np.asarray(row.mask)[: num_words(vocab_size)]
    return mask & _mask_of(allowed, vocab_size) if allowed else mask


@functools.lru_cache(maxsize=64)
def _mask_of(allowed: tuple[int, ...], vocab_size: int) -> Array:
    """The same in all of a request's steps."""
    bits = np.zeros(num_words(vocab_size) * 32, np.bool_)
    bits[list(allowed)] = True
    return np.packbits(bits, bitorder="little").view("<i4")


def _at_least_smallest(value: float) -> float:
    """0 stays 0."""
    return max(value, SMALLEST) if value else 0.0


def _joined(arrays: list[Array], dtype: Any) -> Array:
    joined: Array = np.concatenate([np.empty(0, dtype), *arrays])
    return joined


def _to_device(arrays: Mapping[str, Array], device: torch.device) -> dict[str, Tensor]:
    """One copy for all of them: a tensor each into one buffer."""
    starts, size = {}, 0
    for name, array in arrays.items():
        starts[name] = size
        size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    staged = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    view = staged.numpy()
    for name, array in arrays.items():
        view[starts[name] : starts[name] + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    buffer = staged.to(device, non_blocking=True)
    return {
        name: buffer[starts[name] : starts[name] + array.nbytes]
        .view(torch.from_numpy(np.empty(0, array.dtype)).dtype)
        .view(array.shape)
        for name, array in arrays.items()
    }
