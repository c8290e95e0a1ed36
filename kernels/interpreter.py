"""Triton's interpreter, made to calculate as a GPU does: what runs the Triton kernels where there is none.

As it comes, the interpreter holds bfloat16 and float8 as bare unsigned integers and calculates with those: products,
sums and roundings of bfloat16 are wrong without a word. `install` replaces those parts, and makes the rest stricter
than a GPU, so that a kernel which passes here owes nothing to luck:

- bfloat16 and float8 are converted as torch converts them, to the nearest with ties to even; float8 saturates, as the
  device's conversion does. Arithmetic on bfloat16 is done in float32 and rounded once.
- `tl.dot`, `tl.sum` and `tl.cumsum` add in float64 and round once, so that no result depends on the order in which
  numpy or a BLAS walks a tile. Orders that a kernel chooses itself (loops, splits) still show.
- What has no one meaning is refused: a reduction of bfloat16, an argmax over NaN, a float32 product in TF32,
  arithmetic on float8, a rounding mode other than to the nearest.
- A load's masked places without `other` hold NaN or a senseless integer, not zero: on a device they hold anything.
- Every address that is read or written must lie in a tensor that the kernel was given.

It cannot show races, bad alignment, or a device's own roundings in tensor cores and approximate functions. Knows
Triton from 3.6 on; nothing of the kernels.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

VARIABLE = "TRITON_INTERPRET"
OLDEST = (3, 6)
KERNELS = "pronk.kernels.gpu"

Array = np.ndarray[Any, Any]

_PATCH_POINTS = {
    "InterpreterBuilder": (
        "binary_op",
        "cast_impl",
        "create_atomic_cas",
        "create_atomic_rmw",
        "create_clampf",
        "create_dot",
        "create_fma",
        "create_fp_to_fp",
        "create_masked_load",
        "create_masked_store",
        "unary_op",
    ),
    "ReduceOps": ("apply_impl", "min_max", "sum"),
    "ScanOps": ("apply_impl", "cumsum"),
    "GridExecutor": ("__call__",),
}


def install() -> None:
    """Make every `@triton.jit` function that is defined from now on run interpreted, in this process.

    Does nothing the second time. Raises RuntimeError if it is too late, or for a Triton that it does not know.
    """
    if KERNELS in sys.modules and not installed():
        raise RuntimeError(f"{KERNELS} was imported before the interpreter: call install() first")
    if "triton" in sys.modules and not _is_interpreted():
        raise RuntimeError(f"triton was imported before the interpreter: set {VARIABLE}=1 in the environment")
    os.environ[VARIABLE] = "1"
    import triton.runtime.interpreter as interpreter

    if not hasattr(interpreter, "_pronk"):
        _check(interpreter)
        _Patches(interpreter)
        interpreter._pronk = True


def installed() -> bool:
    """Whether kernels run interpreted in this process, as this module means it."""
    return hasattr(sys.modules.get("triton.runtime.interpreter"), "_pronk")


def _is_interpreted() -> bool:
    """Triton's own functions, such as tl.sum, became what they are when triton was imported."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(tl.sum, InterpretedFunction)


def _check(interpreter: Any) -> None:
    """interpreter: Triton's module."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    missing = [
        f"{owner}.{name}"
        for owner, names in _PATCH_POINTS.items()
        for name in names
        if not hasattr(getattr(interpreter, owner, None), name)
    ]
    if version < OLDEST or missing or not hasattr(interpreter, "_patch_lang"):
        raise RuntimeError(
            f"triton {triton.__version__} has another interpreter than this was made for "
            f"(missing: {', '.join(missing) or 'nothing'}): install triton 3.6 to 3.9, or mend {__name__}"
        )


class _Patches:
    """Puts the methods below in the place of the interpreter's. tl, handle, builder: as Triton calls them."""

    def __init__(self, interpreter: Any) -> None:
        import triton.language as tl

        self.interpreter, self.tl = interpreter, tl
        self.handle = interpreter.TensorHandle
        self.torch_dtypes = {
            tl.bfloat16: torch.bfloat16,
            tl.float8e4nv: torch.float8_e4m3fn,
            tl.float8e5: torch.float8_e5m2,
        }
        """Formats that numpy lacks: kept as unsigned integers of their size."""
        self.memory: list[tuple[int, int]] = []
        """First address and the one past the end, of each tensor of the running kernel."""
        builder = interpreter.InterpreterBuilder
        self._patch_casts(builder)
        self._patch_arithmetic(builder)
        self._patch_memory(builder)
        self._patch_reductions(interpreter.ReduceOps, interpreter.ScanOps)
        self._patch_language()
        self._patch_grid(interpreter.GridExecutor)
        # The check for overflow costs more than the operation, and reports to an assertion that is switched off.
        interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

    # Formats

    def widen(self, operand: Any) -> Array:
        """-> its numbers, in a format that numpy calculates with; bfloat16 and float8 as float32."""
        dtype = self.torch_dtypes.get(operand.dtype.scalar)
        if dtype is None or operand.data.dtype == np.bool_:
            data: Array = operand.data
            return data
        signed = np.int16 if dtype.itemsize == 2 else np.uint8
        raw = torch.from_numpy(np.ascontiguousarray(operand.data).view(signed))
        return raw.view(dtype).float().numpy().reshape(operand.data.shape)

    def round_to(self, data: Array, dtype: Any) -> Array:
        """data: numbers in any format of numpy's -> as `dtype`, a scalar type of Triton's, is kept."""
        target = self.torch_dtypes.get(dtype)
        if target is None:
            kept: Array = data.astype(self.interpreter._get_np_dtype(dtype))
            return kept
        wide = torch.from_numpy(np.array(data, dtype=np.float32))
        if target.itemsize == 1:
            largest = torch.finfo(target).max
            wide = wide.clamp(-largest, largest)
        raw = wide.to(target).view(torch.int16 if target.itemsize == 2 else torch.uint8).numpy()
        return raw.view(np.uint16) if target.itemsize == 2 else raw

    def cast(self, source: Any, target_type: Any) -> Any:
        """A conversion of one handle."""
        target = target_type.scalar
        for dtype in (source.dtype.scalar, target):
            if dtype.is_fp8() and dtype not in self.torch_dtypes:
                raise TypeError(f"the interpreter has no {dtype}")
        data = self.widen(source)
        if data.dtype.kind == "f" and target.is_int() and target != self.tl.int1:
            data = _truncated(data, self.interpreter._get_np_dtype(target))
        return self.handle(self.round_to(data, target), target)

    def _patch_casts(self, builder: Any) -> None:
        nearest = self.interpreter._ir.ROUNDING_MODE.RTNE

        def create_fp_to_fp(_: Any, source: Any, target_type: Any, rounding_mode: Any) -> Any:
            if rounding_mode not in (None, nearest):
                raise TypeError(f"the interpreter rounds to the nearest only, not {rounding_mode}")
            return self.cast(source, target_type)

        builder.cast_impl = lambda _, source, target_type: self.cast(source, target_type)
        builder.create_fp_to_fp = create_fp_to_fp

    # Arithmetic

    def narrow(self, *operands: Any) -> bool:
        """Whether any of them is kept in a format that numpy lacks."""
        types = [operand.dtype.scalar for operand in operands]
        if any(dtype.is_fp8() for dtype in types):
            raise TypeError("arithmetic on float8: convert it to a wider format first")
        return any(dtype in self.torch_dtypes for dtype in types)

    def _patch_arithmetic(self, builder: Any) -> None:
        binary_op, unary_op, create_clampf = builder.binary_op, builder.unary_op, builder.create_clampf
        tl, handle = self.tl, self.handle

        def wide(operand: Any) -> Any:
            return handle(self.widen(operand), tl.float32)

        def rounded(result: Any, dtype: Any) -> Any:
            return handle(self.round_to(result.data, dtype), dtype)

        def new_binary_op(builder: Any, lhs: Any, rhs: Any, op: Any) -> Any:
            dtype = lhs.dtype.scalar
            if self.narrow(lhs, rhs):
                result = binary_op(builder, wide(lhs), wide(rhs), op)
            else:
                result = binary_op(builder, lhs, rhs, op)
            if result.data.dtype == np.bool_:
                return handle(result.data, tl.int1)
            return rounded(result, dtype) if dtype in self.torch_dtypes else result

        def new_unary_op(builder: Any, operand: Any, op: Any) -> Any:
            if not self.narrow(operand):
                return unary_op(builder, operand, op)
            return rounded(unary_op(builder, wide(operand), op), operand.dtype.scalar)

        def new_create_clampf(builder: Any, operand: Any, low: Any, high: Any, propagate_nans: Any) -> Any:
            if not self.narrow(operand, low, high):
                return create_clampf(builder, operand, low, high, propagate_nans)
            result = create_clampf(builder, wide(operand), wide(low), wide(high), propagate_nans)
            return rounded(result, operand.dtype.scalar)

        def new_create_fma(_: Any, x: Any, y: Any, z: Any) -> Any:
            if z.data.dtype not in (np.float16, np.float32):
                raise TypeError(f"tl.fma of {z.dtype}: the interpreter has it for float32 and float16")
            return handle(_fused(x.data, y.data, z.data), z.dtype.scalar)

        def new_create_dot(_: Any, a: Any, b: Any, accumulator: Any, input_precision: Any, *_imprecise: Any) -> Any:
            if a.dtype.scalar == tl.float32 and input_precision != self.interpreter._ir.INPUT_PRECISION.IEEE:
                raise TypeError('tl.dot of float32 would be in TF32: give input_precision="ieee"')
            total = accumulator.data.dtype
            sums = np.float64 if total.kind == "f" else total
            product = np.matmul(self.widen(a), self.widen(b), dtype=sums)
            return handle((product + accumulator.data).astype(total), accumulator.dtype.scalar)

        builder.binary_op = new_binary_op
        builder.unary_op = new_unary_op
        builder.create_clampf = new_create_clampf
        builder.create_fma = new_create_fma
        builder.create_dot = new_create_dot

    # Memory

    def check_addresses(self, addresses: Array, mask: Array, itemsize: int) -> None:
        """Raises IndexError unless all places in use lie in one of the kernel's tensors."""
        used = addresses if mask.all() else addresses[np.broadcast_to(mask, addresses.shape)]
        if used.size == 0:
            return
        first, last = int(used.min()), int(used.max()) + itemsize
        if not any(start <= first and last <= end for start, end in self.memory):
            raise IndexError(f"the kernel reaches for {last - first} bytes at {first:#x}, outside every tensor it has")

    def _patch_memory(self, builder: Any) -> None:
        create_masked_load, create_masked_store = builder.create_masked_load, builder.create_masked_store
        create_atomic_rmw, create_atomic_cas = builder.create_atomic_rmw, builder.create_atomic_cas

        def senseless(pointers: Any) -> Any:
            dtype = pointers.get_element_ty()
            kept = self.interpreter._get_np_dtype(dtype)
            if dtype.scalar in self.torch_dtypes or kept.kind == "u":
                value: Any = np.iinfo(kept).max  # the bits of a NaN too
            elif kept.kind == "f":
                value = np.nan
            else:
                value = True if kept == np.bool_ else np.iinfo(kept).min
            return self.handle(np.full(pointers.data.shape, value, dtype=kept), dtype)

        def size_of(pointers: Any) -> int:
            size: int = self.interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
            return size

        def new_create_masked_load(builder: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
            self.check_addresses(pointers.data, mask.data, size_of(pointers))
            if other is None and not mask.data.all():
                other = senseless(pointers)
            return create_masked_load(builder, pointers, mask, other, *rest)

        def new_create_masked_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.check_addresses(pointers.data, mask.data, size_of(pointers))
            return create_masked_store(builder, pointers, value, mask, *rest)

        def new_create_atomic_rmw(
            builder: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any
        ) -> Any:
            self.check_addresses(pointers.data, mask.data, size_of(pointers))
            return create_atomic_rmw(builder, operation, pointers, value, mask, *rest)

        def new_create_atomic_cas(builder: Any, pointers: Any, *rest: Any) -> Any:
            self.check_addresses(pointers.data, np.ones(1, dtype=np.bool_), size_of(pointers))
            return create_atomic_cas(builder, pointers, *rest)

        builder.create_masked_load = new_create_masked_load
        builder.create_masked_store = new_create_masked_store
        builder.create_atomic_rmw = new_create_atomic_rmw
        builder.create_atomic_cas = new_create_atomic_cas

    # Reductions

    def _patch_reductions(self, reduce_ops: Any, scan_ops: Any) -> None:
        def refuse_narrow(apply_impl: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
            def checked(ops: Any, operands: Any) -> Any:
                for operand in operands:
                    if operand.dtype.scalar in self.torch_dtypes:
                        raise TypeError(f"a reduction of {operand.dtype}: convert it to float32 first")
                return apply_impl(ops, operands)

            return checked

        def total(ops: Any, operand: Any) -> Any:
            data = operand.handle.data
            if data.dtype == np.float16:
                raise TypeError("a sum of float16: convert it to float32 first")
            summed = np.sum(data, axis=ops.axis, keepdims=ops.keep_dims, dtype=_wider(data.dtype))
            return ops.to_tensor(summed, operand.dtype)

        def running_total(ops: Any, operand: Any) -> Any:
            data = operand.handle.data
            return [ops.to_tensor(np.cumsum(data, axis=ops.axis, dtype=_wider(data.dtype)), operand.dtype)]

        extremes = {np.min: np.fmin, np.nanmin: np.fmin, np.max: np.fmax, np.nanmax: np.fmax}

        def min_max(ops: Any, operand: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
            operand = operand[0] if isinstance(operand, tuple) else operand
            data = operand.handle.data
            if idx_reduce_op is not None and data.dtype.kind == "f" and np.isnan(data).any():
                raise ValueError("where the extreme of numbers with a NaN among them is depends on the order: mask it")
            extreme = extremes[val_reduce_op].reduce(data, axis=ops.axis, keepdims=ops.keep_dims)
            value = ops.to_tensor(extreme, operand.dtype)
            if idx_reduce_op is None:
                return value
            return value, ops.to_tensor(idx_reduce_op(data, axis=ops.axis, keepdims=ops.keep_dims), self.tl.int32)

        reduce_ops.apply_impl = refuse_narrow(reduce_ops.apply_impl)
        scan_ops.apply_impl = refuse_narrow(scan_ops.apply_impl)
        reduce_ops.sum, reduce_ops.min_max = total, min_max
        scan_ops.cumsum = running_total

    # The language and the grid

    def _patch_language(self) -> None:
        """Once and for good: Triton would look through its whole language for each call of each function."""
        tl = self.tl
        self.interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        tl.tensor.__index__ = lambda tensor: int(tensor.handle.data.item())
        scope = SimpleNamespace(restore=lambda: None)
        self.interpreter._patch_lang = lambda _function: scope

    @contextmanager
    def memory_of(self, arguments: Any) -> Iterator[None]:
        """What a kernel may touch while it runs."""
        before = self.memory
        self.memory = [_extent(tensor) for tensor in _tensors(arguments)]
        try:
            yield
        finally:
            self.memory = before

    def _patch_grid(self, executor: Any) -> None:
        call = executor.__call__

        def new_call(grid: Any, *arguments: Any, **keywords: Any) -> Any:
            # A device raises no warnings.
            with self.memory_of((*arguments, *keywords.values())), np.errstate(all="ignore"):
                return call(grid, *arguments, **keywords)

        executor.__call__ = new_call


def _wider(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """The format to add numbers of this one in; None: as numpy does."""
    return np.dtype(np.float64) if dtype.kind == "f" else None


def _truncated(data: Array, dtype: np.dtype[Any]) -> Array:
    """Floats -> integers, towards zero; what is too large becomes the largest and NaN zero, as on the device."""
    limits = np.iinfo(dtype)
    wide = np.nan_to_num(np.trunc(data.astype(np.float64)), nan=0.0)
    inside = np.array(np.clip(wide, float(limits.min), float(limits.max)), dtype=dtype)
    # The largest of 64 bits is no float64: what was clipped to it has turned round.
    inside[wide >= float(limits.max)] = limits.max
    return inside


def _fused(x: Array, y: Array, z: Array) -> Array:
    """x · y + z, rounded once: float64 holds the product, the sum's last bit is set if it is not exact (rounding to
    odd, Boldo & Melquiond 2008), and what is rounded from that is what would be from the exact sum."""
    product, addend = np.broadcast_arrays(np.multiply(x, y, dtype=np.float64), z.astype(np.float64))
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    even = (total.view(np.int64) & 1) == 0
    nudged = np.where(even & (error != 0) & np.isfinite(error), np.nextafter(total, np.copysign(np.inf, error)), total)
    rounded: Array = nudged.astype(z.dtype)
    return rounded


def _tensors(arguments: Any) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, tuple | list):
            yield from _tensors(argument)
        elif isinstance(argument, Tensor):
            yield argument
        elif isinstance(base := getattr(argument, "base", None), Tensor):
            yield base  # a tensor descriptor, or a tensor in another dtype


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the one past the last that the tensor's shape and strides reach."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
