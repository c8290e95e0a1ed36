"""Rows of a table: the embeddings of a step's tokens.

Shapes. ids int64 [T], table [V, H] -> [T, H].

Grid. (T, ceil(H / BLOCK)): a program copies BLOCK neighbours of a row, 8 for each thread.

Bytes. 2 · H · itemsize a token.

Floor, at the 4.3 TB/s that an H200 copies with: the 1B (H = 2048, bfloat16) moves 2.1 MB for 256 tokens, 0.5 µs: a call
costs its launch.

The device cannot raise an error. An id that the table lacks gives a row of NaN, which the sampler reports (a sampled
token is -1 where a logit is not finite, and the step after it may already be under way).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pronk.kernels.gpu.compilation import Compilation
from pronk.kernels.interface import Weight

BLOCK = 1024


@triton.jit
def embedding_kernel(ids_ptr, table_ptr, out_ptr, num_ids, width, BLOCK: tl.constexpr):
    """BLOCK numbers of one row. num_ids: V."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token_id = tl.load(ids_ptr + token)
    is_id = (token_id >= 0) & (token_id < num_ids)
    row = tl.load(table_ptr + token_id * width + columns, mask=(columns < width) & is_id, other=float("nan"))
    tl.store(out_ptr + token * width + columns, row, mask=columns < width)


def embedding(ids: Tensor, table: Tensor | Weight) -> Tensor:
    """See `Kernels.embedding`."""
    if isinstance(table, Weight):
        table = table.data
    num_ids, width = table.shape
    out = table.new_empty(ids.shape[0], width)
    if ids.shape[0]:
        grid = (ids.shape[0], triton.cdiv(width, BLOCK))
        embedding_kernel[grid](ids, table, out, num_ids, width, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False)
    return out


COMPILATIONS = [
    Compilation(
        name="embedding",
        kernel=embedding_kernel,
        signature={"ids_ptr": "*i64", "table_ptr": "*bf16", "out_ptr": "*bf16", "num_ids": "i32", "width": "i32"},
        constants={"BLOCK": BLOCK},
        options={"enable_fp_fusion": False},
        divisible=("width",),
    )
]
