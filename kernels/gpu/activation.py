"""SiLU · mul, the gate of Llama's MLP (SwiGLU, Shazeer 2020).

Shapes. gate_up [T, 2F], gate first -> [T, F].

Grid. (T, ceil(F / BLOCK)): a program has BLOCK neighbours of one row, 8 for each thread.

Bytes. 3 · F · itemsize a row.

Floor, at the 4.3 TB/s that an H200 copies with: the 1B (F = 8192, bfloat16) reads and writes 12.6 MB for 256 rows,
2.9 µs. Where rows are few, the product before it does this on its way (`linear`) and this kernel is not launched.

`silu_mul` below is what both call. Launches are made with enable_fp_fusion=False and quotients are rounded to the
nearest (tl.div_rn), so that it gives the same bits wherever it is compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pronk.kernels.gpu.compilation import Compilation

BLOCK = 1024
LOG2E = tl.constexpr(1.4426950216293335)
"""log2(e), rounded to float32."""
LOG2E_REST = tl.constexpr(1.925963033500011e-08)
"""What that leaves out."""
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exponential(x):
    """e^x in float32, to about 2 units in the last place; NaN for an infinite x.

    tl.exp rounds x · log2(e) before it is a power of two, which for |x| = 80 costs 6 bits. Here what the rounding left
    out is a factor of its own, 1 + rest · ln 2.
    """
    power = x * LOG2E
    rest = tl.fma(x, LOG2E, -power) + x * LOG2E_REST
    # Not a sum of two powers: where they are infinite, that has no value.
    return tl.exp2(power) * (1.0 + rest * LN2)


@triton.jit
def silu_mul(gate, up):
    """gate / (1 + e^-gate) · up, in float32."""
    return tl.div_rn(gate, 1.0 + exponential(-gate)) * up


@triton.jit
def silu_mul_kernel(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """BLOCK numbers of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate_ptr = gate_up_ptr + row * 2 * width
    gate = tl.load(gate_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + width + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + columns, silu_mul(gate, up).to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul_rows(gate_up: Tensor) -> Tensor:
    """See `Kernels.silu_mul`."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, width)
    if num_rows:
        grid = (num_rows, triton.cdiv(width, BLOCK))
        silu_mul_kernel[grid](gate_up.contiguous(), out, width, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False)
    return out


COMPILATIONS = [
    Compilation(
        name="silu-mul",
        kernel=silu_mul_kernel,
        signature={"gate_up_ptr": "*bf16", "out_ptr": "*bf16", "width": "i32"},
        constants={"BLOCK": BLOCK},
        options={"enable_fp_fusion": False},
        divisible=("width",),
    )
]
