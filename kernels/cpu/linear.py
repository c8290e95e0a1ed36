"""Linear layers on a CPU: packing weights for `products`, preparing rows for them, and sharing the work out.

Knows shapes and dtypes; not how numbers are multiplied.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pronk.kernels.cpu.code import DTYPES, Argument, Code
from pronk.kernels.cpu.instructions import LANES, TILE_ROWS, config_address
from pronk.kernels.cpu.packing import write_interleave, write_rows_of
from pronk.kernels.cpu.products import GROUP, PLANES, UNIT, Kind, on_tiles, write_product
from pronk.kernels.cpu.rows import write_quantize, write_widen
from pronk.kernels.interface import Weight, WeightFormat

WEIGHT_FORMATS: tuple[WeightFormat, ...] = ("plain", "int8")
AT_ONCE = 4 << 20
"""Numbers of a weight that are laid out at a time, or few more: what they are rounded to meanwhile is small, and lies
in large pages."""
BYTES_A_NANOSECOND, PRODUCTS_A_NANOSECOND = 10, 40
"""Of a thread, roughly: what work is shared out by."""
HUGE_PAGE = 2 << 20


@dataclass(frozen=True)
class PackedWeight(Weight):
    """`data` as `products` has it: [blocks, units, LANES, numbers in a unit], zero where there is no output or input;
    blocks are a multiple of GROUP. scales float32 [outputs, padded]."""

    kind: Kind = "float32"
    sums: Tensor | None = None
    """int32 [outputs, padded]: of an int8 weight's rows."""

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self.sums is None else self.sums.nbytes)


def take_apart(weight: PackedWeight) -> tuple[dict[str, Tensor], dict[str, str | int]]:
    """-> its tensors by their names, and what else it takes to put it together again."""
    tensors = {"data": weight.data, "scales": weight.scales, "sums": weight.sums}
    facts: dict[str, str | int] = {
        "out_features": weight.out_features,
        "in_features": weight.in_features,
        "format": weight.format,
        "kind": weight.kind,
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}, facts


def pack(code: Code, weight: Tensor | Sequence[Tensor], format: WeightFormat) -> PackedWeight:
    """See `Kernels.pack`. Threads read the parts where they are, and write each number once: nothing of a part's size
    is made on the way."""
    if format not in WEIGHT_FORMATS:
        raise ValueError(f"the CPU kernels have no {format} weights: choose {', '.join(WEIGHT_FORMATS)}")
    parts = [weight] if isinstance(weight, Tensor) else list(weight)
    if any(len(part) % LANES for part in parts[:-1]):
        parts = [torch.cat(parts)]  # a block would have rows of two parts
    dtype, num_out, num_in = parts[0].dtype, sum(len(part) for part in parts), parts[0].shape[1]
    kind: Kind = "int8" if format == "int8" else DTYPES[dtype]  # type: ignore[assignment]
    unit = UNIT[kind]
    units = padded(num_in, unit * (TILE_ROWS if on_tiles(code.instructions, kind) else 1)) // unit
    outputs = padded(num_out, LANES * GROUP)
    data = memory((outputs // LANES, units, LANES, unit), torch.int8 if kind == "int8" else dtype)
    scales = torch.zeros(outputs) if kind == "int8" else None
    sums = torch.zeros(outputs, dtype=torch.int32) if kind == "int8" else None
    packed = PackedWeight(num_out, num_in, data, format, scales, kind, sums)
    rows_at_once = padded(-(-AT_ONCE // max(num_in, 1)), LANES)
    # Not from the heap, where its place would be taken by what is kept, and the next one would need a new one.
    rounded = memory((min(rows_at_once, num_out), num_in), torch.int8) if kind == "int8" else None
    start = 0
    for part in parts:
        for first in range(0, len(part), rows_at_once):
            rows = part[first : first + rows_at_once].contiguous()
            _lay_out(code, rows, packed, start + first, rounded)
        start += len(part)
    return packed


def _lay_out(code: Code, rows: Tensor, into: PackedWeight, start: int, rounded: Tensor | None) -> None:
    """rows [n, K] become those from `start` on, a multiple of LANES. rounded: int8 [n or more, K], to be written to,
    for an int8 weight."""
    if rounded is not None and into.scales is not None:
        rows = _round(code, rows, into.scales[start:], rounded[: len(rows)])
    if rows.shape[1] % UNIT[into.kind]:
        rows = F.pad(rows, (0, -rows.shape[1] % UNIT[into.kind]))
    sums, row_bytes = into.sums, rows.shape[1] * rows.element_size()
    out: list[Argument] = [(into.data, start // LANES), into.data.shape[1], None if sums is None else (sums, start)]
    code.run(
        "interleave" if sums is None else "interleave_and_sum",
        write_interleave(sums=sums is not None),
        [rows, row_bytes, len(rows), row_bytes // 4, *out],
        padded(len(rows), LANES) // LANES,
        cost=LANES * row_bytes / BYTES_A_NANOSECOND,
    )


def _round(code: Code, rows: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """-> out: int8 rows, as `reference.pack` rounds them; and into `scales` what they are to be multiplied by."""
    dtype, width = DTYPES[rows.dtype], rows.shape[1]
    code.run(f"quantize_{dtype}", write_quantize(dtype, 1), [rows, out, scales, width, width], len(rows), cost=width)
    return out


def memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros. A large weight lies in large pages, where the system has some to give: its addresses are found faster."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if size < 2 * HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    pages = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + size].view(dtype).view(shape)


def padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def linear(code: Code, x: Tensor, weight: PackedWeight) -> Tensor:
    """See `Kernels.linear`."""
    if weight.kind not in ("int8", DTYPES[x.dtype]):
        raise ValueError(f"a weight in {weight.kind} and activations in {x.dtype}: load both in one dtype")
    num_rows = len(x)
    outputs = weight.data.shape[0] * LANES
    out = code.empty((num_rows, outputs), x.dtype)
    if num_rows:
        rows, scales = _prepare(code, code.contiguous(x), weight)
        _multiply(code, rows, scales, weight, out)
    return out if outputs == weight.out_features else code.contiguous(out[:, : weight.out_features])


def rows_of(code: Code, ids: Tensor, weight: PackedWeight) -> Tensor:
    """The rows that a plain weight was packed from: ids int64 [T] -> [T, K]."""
    if weight.format != "plain":
        raise ValueError(f"rows of a weight in {weight.format} are not those that it was packed from")
    units, unit = weight.data.shape[1], UNIT[weight.kind]
    out = code.empty((len(ids), units * unit), weight.data.dtype)
    code.run("rows_of", write_rows_of, [code.contiguous(ids), weight.data, out, units], len(ids), cost=units)
    return out if units * unit == weight.in_features else code.contiguous(out[:, : weight.in_features])


def _prepare(code: Code, x: Tensor, weight: PackedWeight) -> tuple[Tensor, Tensor | None]:
    """-> x as the product takes it, and the scales of its rows if they are int8."""
    num_rows, width = x.shape
    dtype = DTYPES[x.dtype]
    padded_width = weight.data.shape[1] * UNIT[weight.kind]
    if weight.kind == "int8":
        kind, name, write = torch.int8, f"quantize_x_{dtype}", write_quantize(dtype, PLANES)
    elif on_tiles(code.instructions, weight.kind) or (dtype == "float32" and padded_width == width):
        return code.widened(x, padded_width), None
    else:
        kind, name, write = torch.float32, f"widen_{dtype}", write_widen(dtype)
    planes = _planes(weight)
    rows = (code.empty if padded_width == width else code.zeros)((num_rows * planes, padded_width), kind)
    scales = code.empty((num_rows,), torch.float32) if weight.kind == "int8" else None
    tensors = [x, rows] if scales is None else [x, rows, scales]
    code.run(name, write, [*tensors, width, padded_width], num_rows, cost=width / 4)
    return rows, scales


def _multiply(code: Code, rows: Tensor, scales: Tensor | None, weight: PackedWeight, out: Tensor) -> None:
    """rows: as `_prepare` makes them, one after the other for each row of out."""
    dtype = DTYPES[out.dtype]
    groups = weight.data.shape[0] // GROUP
    numbers = weight.data.numel() // groups
    configs = (0, 0)
    if on_tiles(code.instructions, weight.kind):
        left = len(rows) % (2 * TILE_ROWS)
        configs = config_address(TILE_ROWS, TILE_ROWS), config_address(min(left, TILE_ROWS), max(left - TILE_ROWS, 0))
    code.run(
        f"product_{weight.kind}_{dtype}",
        write_product(code.instructions, weight.kind, dtype),
        [
            weight.data,
            rows,
            out,
            len(out),
            weight.data.shape[1],
            out.stride(0) * out.element_size(),
            weight.scales,
            weight.sums,
            scales,
            *configs,
        ],
        groups,
        cost=max(numbers / PRODUCTS_A_NANOSECOND * len(rows), weight.data.nbytes / groups / BYTES_A_NANOSECOND),
    )


def _planes(weight: PackedWeight) -> int:
    """Rows that are multiplied for each row of x."""
    return PLANES if weight.kind == "int8" else 1
