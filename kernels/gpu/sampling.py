"""Choosing tokens on a GPU: launching the kernels of `sampling_kernels`, whose docstring is the description.

Nothing here waits for the device, and what is launched depends on shapes and on what the host knows of a batch alone: a
captured step can be fed anew.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from pronk.kernels.gpu.compilation import Compilation
from pronk.kernels.gpu.logprobs import logprobs
from pronk.kernels.gpu.sampling_kernels import (
    adjust_entries_kernel,
    adjust_kernel,
    choose_kernel,
    largest_kernel,
    race_kernel,
    row_stride,
)
from pronk.kernels.interface import Samples, SamplingBatch

CHUNK = 4096
"""Tokens of a program: 32 programs for each row of Llama 3's vocabulary."""
TILE = 4096
"""Tokens that the program of a whole row looks at at once."""
ENTRIES = 1024
NUM_WARPS = 8


def sample(logits: Tensor, batch: SamplingBatch) -> Samples:
    """See `Kernels.sample`."""
    token_ids = batch.noise_keys.new_empty(len(logits))
    if len(logits):
        x = logits if batch.plain else _adjust(logits, batch)
        _choose(x, batch, token_ids)
    if batch.top_n is None:
        return Samples(token_ids)
    return Samples(token_ids, *logprobs(logits, token_ids, batch.top_n))


def _adjust(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """-> float32 [R, V]"""
    num_rows, vocabulary = logits.shape
    adjusted = logits.new_empty(num_rows, vocabulary, dtype=torch.float32)
    has_mask = batch.mask is not None
    num_words = 0 if batch.mask is None else batch.mask.shape[1]
    adjust_kernel[(num_rows, triton.cdiv(vocabulary, CHUNK))](
        logits, row_stride(logits), batch.mask, adjusted, vocabulary, num_words,
        HAS_MASK=has_mask, CHUNK=CHUNK, num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    num_entries = len(batch.entry_ids)
    if num_entries:
        adjust_entries_kernel[(triton.cdiv(num_entries, ENTRIES),)](
            logits, row_stride(logits), batch.mask, adjusted, vocabulary, num_words,
            batch.entry_starts, batch.entry_ids, batch.entry_bias, batch.entry_counts, batch.entry_seen,
            batch.repetition, batch.presence, batch.frequency, num_rows, num_entries,
            HAS_MASK=has_mask, BLOCK=ENTRIES, num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return adjusted


def _choose(x: Tensor, batch: SamplingBatch, token_ids: Tensor) -> None:
    """x [R, V]: the logits, or what `_adjust` made of them. Writes token_ids int64 [R]."""
    num_rows, vocabulary = x.shape
    num_chunks = triton.cdiv(vocabulary, CHUNK)
    block_c = triton.next_power_of_2(num_chunks)

    def partial(dtype: torch.dtype) -> Tensor:
        return x.new_empty(num_rows, num_chunks, dtype=dtype)

    largest, ids = partial(torch.float32), partial(torch.int32)
    scores, winners, weights = partial(torch.float32), partial(torch.int32), partial(torch.float64)
    stride = row_stride(x)
    largest_kernel[(num_rows, num_chunks)](
        x, stride, largest, ids, vocabulary, num_chunks,
        ADJUSTED=not batch.plain, CHUNK=CHUNK, num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    if not batch.greedy:
        race_kernel[(num_rows, num_chunks)](
            x, stride, largest, ids, batch.temperature, batch.noise_keys, scores, winners, weights,
            vocabulary, num_chunks, CHUNK=CHUNK, BLOCK_C=block_c, num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    choose_kernel[(num_rows,)](
        x, stride, largest, ids, batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.noise_keys,
        scores, winners, weights, token_ids, vocabulary, num_chunks,
        GREEDY=batch.greedy, TILE=TILE, BLOCK_C=block_c, num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def _compilations() -> list[Compilation]:
    """Llama 3's vocabulary. On Ampere and Blackwell those alone that every batch runs."""
    types = dict.fromkeys(
        ("largest_ptr", "temperature_ptr", "top_p_ptr", "min_p_ptr", "scores_ptr", "bias_ptr", "adjusted_ptr",
         "repetition_ptr", "presence_ptr", "frequency_ptr"),
        "*fp32",
    )  # fmt: skip
    types |= dict.fromkeys(("ids_ptr", "top_k_ptr", "winners_ptr", "mask_ptr", "starts_ptr", "counts_ptr"), "*i32")
    types |= dict.fromkeys(("stride", "vocabulary", "num_chunks", "num_words", "num_rows", "num_entries"), "i32")
    types |= {"x_ptr": "*bf16", "logits_ptr": "*bf16", "weights_ptr": "*fp64", "seen_ptr": "*i1"}
    types |= {"keys_ptr": "*i64", "out_ptr": "*i64"}
    found = []
    for name, kernel, constants in (
        ("sampling-adjust", adjust_kernel, {"HAS_MASK": True, "CHUNK": CHUNK}),
        ("sampling-adjust-entries", adjust_entries_kernel, {"HAS_MASK": True, "BLOCK": ENTRIES}),
        ("sampling-largest", largest_kernel, {"ADJUSTED": False, "CHUNK": CHUNK}),
        ("sampling-race", race_kernel, {"CHUNK": CHUNK, "BLOCK_C": 32}),
        ("sampling-choose", choose_kernel, {"GREEDY": False, "TILE": TILE, "BLOCK_C": 32}),
    ):
        everywhere = kernel in (race_kernel, choose_kernel)
        found.append(
            Compilation(
                name=name,
                kernel=kernel,
                signature={key: types[key] for key in kernel.arg_names if key in types},
                constants=constants,
                num_warps=NUM_WARPS,
                options={"enable_fp_fusion": False},
                divisible=("stride", "vocabulary", "num_chunks"),
                targets=(80, 90, 100) if everywhere else (90,),
                expects_wide_loads=kernel is not adjust_entries_kernel,  # whose tokens lie anywhere
            )
        )
    return found


COMPILATIONS = _compilations()
