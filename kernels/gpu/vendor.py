"""The GPU set with the vendor's products (cuBLAS, by torch) for more than FEW_ROWS rows: an option, off by default.

What it gives: the speed of hand-made products where the tensor cores are the limit, in prompts and large batches.
What it breaks: promise 1. The vendor chooses the order of additions by the shape of the product, so what a token gets
then depends on how many tokens share its step. The same request may be answered otherwise beside others, after a hit in
the prefix cache, or cut into other chunks; a seed does not bring an answer back.

Scaled weights, the head of greedy requests (`linear_argmax`) and everything else stay as they are in
`pronk.kernels.gpu`. Satisfies `Kernels` as that module does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pronk.kernels import gpu
from pronk.kernels.gpu import *  # noqa: F403  whatever the set has, and below what this one has otherwise
from pronk.kernels.interface import LayerCache, Weight

FEW_ROWS = 64
"""Up to here the time is that of reading the weight, and there is nothing to gain."""


def describe(dtype: torch.dtype) -> str:  # type: ignore[no-redef]
    """See `Kernels.describe`."""
    return f"{gpu.describe(dtype)}; the vendor's products for more than {FEW_ROWS} rows: answers depend on the batch"


def linear(x: Tensor, weight: Weight) -> Tensor:  # type: ignore[no-redef]
    """See `Kernels.linear`."""
    return F.linear(x, weight.data) if _is_the_vendors(x, weight) else gpu.linear(x, weight)


def linear_silu_mul(x: Tensor, weight: Weight) -> Tensor:  # type: ignore[no-redef]
    """See `Kernels.linear_silu_mul`."""
    return gpu.silu_mul(linear(x, weight)) if _is_the_vendors(x, weight) else gpu.linear_silu_mul(x, weight)


def linear_rope_and_cache(  # type: ignore[no-redef]
    x: Tensor, weight: Weight, positions: Tensor, cos_sin: Tensor, slots: Tensor, cache: LayerCache
) -> Tensor:
    """See `Kernels.linear_rope_and_cache`."""
    if _is_the_vendors(x, weight):
        return gpu.rope_and_cache(linear(x, weight), positions, cos_sin, slots, cache)
    return gpu.linear_rope_and_cache(x, weight, positions, cos_sin, slots, cache)


def _is_the_vendors(x: Tensor, weight: Weight) -> bool:
    return x.shape[0] > FEW_ROWS and weight.format == "plain"
