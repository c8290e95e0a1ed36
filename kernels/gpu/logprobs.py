"""Log probabilities of chosen tokens and of the most likely ones, without writing those of all.

Shapes. logits [R, V], token_ids int64 [R] -> float32 [R], and ids int64 and log probabilities float32 [R, N].

Grid. (R, C): a program for each chunk of a row finds its largest, its sum of exponentials, and its N most likely
tokens, one after the other, by numbers that hold logit and token together. (R,): a program for each row merges them.

Bytes. V · itemsize a row, once. Floor, at the 4.3 TB/s that an H200 copies with: 128 rows of 128,256 tokens in bfloat16
8 µs; each of the N takes one more reduction of what the program holds in registers.

Chunks begin at multiples of CHUNK and are merged in one tree: a row depends on nothing else (promise 1).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronk.kernels import reference
from pronk.kernels.gpu.compilation import Compilation
from pronk.kernels.gpu.sampling_kernels import ordered_bits, row_stride

CHUNK = 8192
MOST_TOP_N = 32
"""More are found by torch's sort: nobody is in a hurry who wants so many."""
NUM_WARPS = 8


@triton.jit
def chunk_logprobs_kernel(
    logits_ptr, stride, largest_ptr, sums_ptr, top_ptr, vocabulary, num_chunks, TOP_N: tl.constexpr, CHUNK: tl.constexpr
):
    """largest, sums float32 [R, C]; top int64 [R, C, TOP_N]: what `packed` makes of the most likely, or -1."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = tokens < vocabulary
    logits = tl.load(logits_ptr + row * stride + tokens, mask=inside, other=float("-inf")).to(tl.float32)
    largest = tl.max(tl.where(logits == logits, logits, float("-inf")), 0)
    place = row * num_chunks + chunk
    tl.store(largest_ptr + place, largest)
    # -inf less -inf is no number, and its weight is none either. A NaN, or +inf less itself, makes the sum NaN.
    weights = tl.where(logits == float("-inf"), 0.0, tl.exp(logits - largest))
    tl.store(sums_ptr + place, tl.sum(weights, 0))
    numbers = tl.where(inside, packed(logits, tokens), -1)
    for n in range(TOP_N):
        best = tl.max(numbers, 0)
        tl.store(top_ptr + place * TOP_N + n, best)
        numbers = tl.where(numbers == best, -1, numbers)


@triton.jit
def row_logprobs_kernel(
    logits_ptr, stride, token_ids_ptr, largest_ptr, sums_ptr, top_ptr, chosen_ptr, top_ids_ptr, top_logprobs_ptr,
    vocabulary, num_chunks, TOP_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_TOP: tl.constexpr,
):  # fmt: skip
    """One row's results from its chunks'."""
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, BLOCK_C)
    here = chunks < num_chunks
    maxima = tl.load(largest_ptr + row * num_chunks + chunks, mask=here, other=float("-inf"))
    sums = tl.load(sums_ptr + row * num_chunks + chunks, mask=here, other=0.0)
    largest = tl.max(maxima, 0)
    # A chunk of nothing but -inf has the sum 0, whatever that is scaled by, if it is a number.
    scales = tl.where(maxima == float("-inf"), 1.0, tl.exp(maxima - largest))
    log_sum = largest + tl.log(tl.sum(sums * scales, 0))
    token = tl.load(token_ids_ptr + row)
    is_token = (token >= 0) & (token < vocabulary)
    own = tl.load(logits_ptr + row * stride + token, mask=is_token, other=float("nan")).to(tl.float32)
    tl.store(chosen_ptr + row, own - log_sum)
    if TOP_N > 0:
        places = tl.arange(0, BLOCK_TOP)
        numbers = tl.load(top_ptr + row * num_chunks * TOP_N + places, mask=places < num_chunks * TOP_N, other=-1)
        for n in range(TOP_N):
            best = tl.max(numbers, 0)
            numbers = tl.where(numbers == best, -1, numbers)
            top_id = 2147483647 - (best & 2147483647)
            logit = tl.load(logits_ptr + row * stride + top_id).to(tl.float32)
            tl.store(top_ids_ptr + row * TOP_N + n, top_id)
            tl.store(top_logprobs_ptr + row * TOP_N + n, logit - log_sum)


@triton.jit
def packed(logits, tokens):
    """-> int64, not negative, one for each token: larger for the larger logit, and of equals for the lower token."""
    bits = ordered_bits(tl.where(logits == logits, logits, float("inf")))
    return bits * 2147483648 + (2147483647 - tokens)


def logprobs(logits: Tensor, token_ids: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernels.logprobs`."""
    num_rows, vocabulary = logits.shape
    if top_n > MOST_TOP_N:
        return reference.logprobs(logits, token_ids, top_n)
    num_chunks = triton.cdiv(vocabulary, CHUNK)

    def floats(*shape: int) -> Tensor:
        return logits.new_empty(*shape, dtype=torch.float32)

    chosen, top_ids, top_logprobs = floats(num_rows), token_ids.new_empty(num_rows, top_n), floats(num_rows, top_n)
    if num_rows:
        largest, sums = floats(num_rows, num_chunks), floats(num_rows, num_chunks)
        top = token_ids.new_empty(num_rows, num_chunks, top_n)
        stride = row_stride(logits)
        chunk_logprobs_kernel[(num_rows, num_chunks)](
            logits, stride, largest, sums, top, vocabulary, num_chunks,
            TOP_N=top_n, CHUNK=CHUNK, num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
        row_logprobs_kernel[(num_rows,)](
            logits, stride, token_ids, largest, sums, top, chosen, top_ids, top_logprobs, vocabulary, num_chunks,
            TOP_N=top_n, BLOCK_C=triton.next_power_of_2(num_chunks),
            BLOCK_TOP=triton.next_power_of_2(max(num_chunks * top_n, 1)), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return chosen, top_ids, top_logprobs


def _compilations() -> list[Compilation]:
    types = dict.fromkeys(("largest_ptr", "sums_ptr", "chosen_ptr", "top_logprobs_ptr"), "*fp32")
    types |= dict.fromkeys(("token_ids_ptr", "top_ptr", "top_ids_ptr"), "*i64")
    types |= {"logits_ptr": "*bf16", "stride": "i32", "vocabulary": "i32", "num_chunks": "i32"}
    found = []
    for kernel, name, constants, num_warps in (
        (chunk_logprobs_kernel, "chunk-logprobs", {"TOP_N": 20, "CHUNK": CHUNK}, NUM_WARPS),
        (row_logprobs_kernel, "row-logprobs", {"TOP_N": 20, "BLOCK_C": 16, "BLOCK_TOP": 512}, 4),
    ):
        found.append(
            Compilation(
                name=name,
                kernel=kernel,
                signature={key: types[key] for key in kernel.arg_names if key in types},
                constants=constants,
                num_warps=num_warps,
                options={"enable_fp_fusion": False},
                divisible=("stride", "vocabulary"),
                expects_wide_loads=kernel is chunk_logprobs_kernel,
            )
        )
    return found


COMPILATIONS = _compilations()
