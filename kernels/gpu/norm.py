"""RMSNorm, and the sum with the residual before it (Zhang & Sennrich 2019).

Shapes. x, residual [T, H], weight [H] -> [T, H], and x + residual [T, H].

Grid. (T,): one program for each row, which holds the row in registers.

Bytes. rms_norm: 2 · H · itemsize a row; add_rms_norm: 4 · H · itemsize; the weight is read from the L2 cache.

Floor, at the 4.3 TB/s that an H200 copies with: the 1B (H = 2048, bfloat16) adds and norms 256 rows in 4.2 MB, 1.0 µs:
up to there a call costs its launch, 1 to 2 µs. 8192 rows: 134 MB, 31 µs.

The sum of squares is a tree over the width. Its shape depends on the width, and on whether rows begin at multiples of
16 bytes, but not on how many rows there are (promise 1). Launches are made with enable_fp_fusion=False: else the
compiler would fuse squares into the sum, here and not there, and add_rms_norm would not be a sum and its rms_norm, bit
for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pronk.kernels.gpu.compilation import Compilation


@triton.jit
def rms_norm_kernel(x_ptr, x_stride, weight_ptr, out_ptr, width, eps, BLOCK: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    out = normed(x, weight_ptr, width, eps, x_ptr.dtype.element_ty, columns, mask)
    tl.store(out_ptr + row * width + columns, out, mask=mask)


@triton.jit
def add_rms_norm_kernel(
    x_ptr, x_stride, residual_ptr, residual_stride, weight_ptr, out_ptr, total_ptr, width, eps, BLOCK: tl.constexpr
):
    """One row; the norm is of the sum as it was rounded."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * residual_stride + columns, mask=mask, other=0.0).to(tl.float32)
    total = (x + residual).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + row * width + columns, total, mask=mask)
    out = normed(total.to(tl.float32), weight_ptr, width, eps, x_ptr.dtype.element_ty, columns, mask)
    tl.store(out_ptr + row * width + columns, out, mask=mask)


@triton.jit
def normed(x, weight_ptr, width, eps, DTYPE: tl.constexpr, columns, mask):
    """x float32 [BLOCK], zero past the width -> normed, rounded to DTYPE, times the weight, rounded again."""
    mean_square = tl.div_rn(tl.sum(x * x, axis=0), width.to(tl.float32))
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    out = (x * tl.rsqrt(mean_square + eps)).to(DTYPE).to(tl.float32)
    return (out * weight).to(DTYPE)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `Kernels.rms_norm`."""
    num_rows, width = x.shape
    out = x.new_empty(num_rows, width)
    if num_rows:
        block, num_warps = _block_of(width)
        rms_norm_kernel[(num_rows,)](
            _rows(x), x.stride(0), weight, out, width, eps, BLOCK=block, num_warps=num_warps, enable_fp_fusion=False
        )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `Kernels.add_rms_norm`."""
    num_rows, width = x.shape
    out, total = x.new_empty(num_rows, width), x.new_empty(num_rows, width)
    if num_rows:
        block, num_warps = _block_of(width)
        add_rms_norm_kernel[(num_rows,)](
            _rows(x),
            x.stride(0),
            _rows(residual),
            residual.stride(0),
            weight,
            out,
            total,
            width,
            eps,
            BLOCK=block,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )
    return out, total


def _rows(x: Tensor) -> Tensor:
    """Raises ValueError unless a row's numbers are neighbours."""
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(f"the rows of a tensor with strides {x.stride()} are not contiguous: call .contiguous()")
    return x


def _block_of(width: int) -> tuple[int, int]:
    """-> numbers a program holds, and its warps: two times 8 numbers for each thread, until there are 16 warps."""
    block = triton.next_power_of_2(width)
    return block, min(max(block // 512, 1), 16)


def _compilations() -> list[Compilation]:
    """The 1B, and on Hopper the 3B and the 8B."""
    pointers = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "out_ptr", "total_ptr"), "*bf16")
    types = {**pointers, "x_stride": "i32", "residual_stride": "i32", "width": "i32", "eps": "fp32"}
    found = []
    for kernel, name, widths in (
        (rms_norm_kernel, "rms-norm", (2048,)),
        (add_rms_norm_kernel, "add-rms-norm", (2048, 3072, 4096)),
    ):
        for width in widths:
            block, num_warps = _block_of(width)
            found.append(
                Compilation(
                    name=f"{name}-{width}",
                    kernel=kernel,
                    signature={key: types[key] for key in kernel.arg_names if key in types},
                    constants={"BLOCK": block},
                    num_warps=num_warps,
                    options={"enable_fp_fusion": False},
                    divisible=("x_stride", "residual_stride", "width"),
                    targets=(80, 90, 100) if width == 2048 else (90,),
                )
            )
    return found


COMPILATIONS = _compilations()
