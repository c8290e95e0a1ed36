"""The GPU set: kernels in Triton, for NVIDIA GPUs from compute capability 8.0 on.

How promise 1 is kept: no kernel's order of additions depends on how many rows it is given, or on where a row stands
among them; each module says how. Without a GPU the same kernels run in `pronk.kernels.interpreter`, on CPU tensors.
"""

from __future__ import annotations

try:
    import triton as _triton
except ImportError as error:
    raise ImportError("the GPU kernels need Triton: pip install 'triton>=3.6', or choose --device cpu") from error

from pronk.kernels.gpu.activation import silu_mul_rows as silu_mul
from pronk.kernels.gpu.attention import attention, plan_attention
from pronk.kernels.gpu.device import check_device, describe
from pronk.kernels.gpu.embedding import embedding
from pronk.kernels.gpu.linear import (
    WEIGHT_FORMATS,
    linear,
    linear_argmax,
    linear_rope_and_cache,
    linear_silu_mul,
    pack,
)
from pronk.kernels.gpu.logprobs import logprobs
from pronk.kernels.gpu.norm import add_rms_norm, rms_norm
from pronk.kernels.gpu.rope import rope_and_cache
from pronk.kernels.gpu.sampling import sample

del _triton

__all__ = [
    "WEIGHT_FORMATS",
    "add_rms_norm",
    "attention",
    "check_device",
    "describe",
    "embedding",
    "linear",
    "linear_argmax",
    "linear_rope_and_cache",
    "linear_silu_mul",
    "logprobs",
    "pack",
    "plan_attention",
    "rms_norm",
    "rope_and_cache",
    "sample",
    "silu_mul",
]
