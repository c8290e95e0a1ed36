"""What this processor multiplies with, and how each of its instructions is written.

All ways to multiply int8 give the same integers. bfloat16 has two: on tile registers (AMX), whose order of additions is
the instruction's own, and by float32 products that are added in the order of the inputs. A machine uses one of them for
every number of rows.
"""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from functools import cache
from typing import Literal

from llvmlite import ir

from pronk.kernels.jit.compiler import features
from pronk.kernels.jit.emit import I8, I16, I32, Function, Value, vector

LANES = 16
"""Of every vector of 32 bits: one register of AVX-512, two of AVX2, four of NEON."""

ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18
"""Linux lets a process use tile registers that asks for them."""

Dot = Literal["vnni512", "vnni256", "avx2", "neon", "plain"]


@dataclass(frozen=True)
class Instructions:
    """The choice for one machine."""

    tiles: bool
    """AMX, for bfloat16 and int8."""
    dot: Dot
    """How four int8 products are added to an int32."""
    wide: bool
    """A vector of LANES fits into one register, of which there are 32."""

    def name_for(self, dtype: str) -> str:
        """In words: what multiplies weights of this dtype, and int8 ones."""
        dots = {"vnni512": "AVX-512 VNNI", "vnni256": "AVX-VNNI", "avx2": "AVX2", "neon": "NEON", "plain": "plain"}
        integers = "AMX" if self.tiles else dots[self.dot]
        floats = "AMX" if self.tiles and dtype == "bfloat16" else "AVX-512" if self.wide else "SIMD"
        return f"{dtype} by {floats}, int8 by {integers}"


@cache
def of_this_machine() -> Instructions:
    """What it has, and what its system lets us use."""
    has = features()
    if platform.machine() == "aarch64":
        return Instructions(tiles=False, dot="neon" if "dotprod" in has else "plain", wide=False)
    wide = "avx512bw" in has and "avx512vl" in has
    dot: Dot = "plain"
    if wide and "avx512vnni" in has:
        dot = "vnni512"
    elif "avxvnni" in has:
        dot = "vnni256"
    elif "avx2" in has:
        dot = "avx2"
    tiles = {"amx-tile", "amx-bf16", "amx-int8"} <= has and _tiles_are_allowed()
    return Instructions(tiles=tiles, dot=dot, wide=wide)


def _tiles_are_allowed() -> bool:
    if platform.system() != "Linux":
        return False
    return bool(ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0)


# Four products at a time


def is_offset(dot: Dot) -> bool:
    """Whether the instruction takes one of its factors without a sign: x + 128 then stands for x."""
    return dot in ("vnni512", "vnni256")


def dot_product(f: Function, dot: Dot, total: Value, weights: Value, x: Value) -> Value:
    """total int32 [LANES] + the sums of four products each. weights int8 [4 · LANES]; x int8 [4 · LANES], the same four
    in every lane (offset, if `is_offset`)."""
    ints, bytes = vector(I32, LANES), vector(I8, 4 * LANES)
    if dot == "vnni512":
        return f.instruction("llvm.x86.avx512.vpdpbusd.512", ints, total, x.bits(bytes), weights.bits(bytes))
    parts = {"vnni256": 2, "avx2": 2, "neon": 4, "plain": 1}[dot]
    found = [
        _part_of_dot_product(f, dot, part(total, n, parts), part(weights, n, parts), part(x, n, parts))
        for n in range(parts)
    ]
    while len(found) > 1:
        found = [joined(one, two) for one, two in zip(found[::2], found[1::2], strict=True)]
    return found[0]


def _part_of_dot_product(f: Function, dot: Dot, total: Value, weights: Value, x: Value) -> Value:
    lanes = total.type.count
    ints, shorts, bytes = vector(I32, lanes), vector(I16, 2 * lanes), vector(I8, 4 * lanes)
    if dot == "vnni256":
        return f.instruction("llvm.x86.avx512.vpdpbusd.256", ints, total, x, weights)
    if dot == "avx2":
        # Signs move from the weight to x, for the instruction wants a factor without. Neither is ever -128, so that
        # two products fit into 16 bits.
        magnitudes = f.instruction(f"llvm.abs.v{4 * lanes}i8", bytes, weights, ir.Constant(ir.IntType(1), 0))
        signed = f.instruction("llvm.x86.avx2.psign.b", bytes, x, weights)
        pairs = f.instruction("llvm.x86.avx2.pmadd.ub.sw", shorts, magnitudes, signed)
        return total + f.instruction("llvm.x86.avx2.pmadd.wd", ints, pairs, f.value(1, shorts))
    if dot == "neon":
        return f.instruction(f"llvm.aarch64.neon.sdot.v{lanes}i32.v{4 * lanes}i8", ints, total, weights, x)
    wide = vector(I32, 4 * lanes)
    products = weights.to(wide) * x.to(wide)
    for place in range(4):
        total = total + products.lanes(range(place, 4 * lanes, 4))
    return total


def part(value: Value, number: int, parts: int) -> Value:
    width = value.type.count // parts
    return value if parts == 1 else value.lanes(range(number * width, (number + 1) * width))


def joined(one: Value, two: Value) -> Value:
    return one.lanes(range(2 * one.type.count), two)


def transposed(lines: list[Value]) -> list[Value]:
    """As many vectors as they have lanes: what lies on the two sides of the diagonal changes places, in ever less."""
    half = len(lines) // 2
    while half:
        for number in range(len(lines)):
            if not number & half:
                one, other = lines[number], lines[number | half]
                kept = [lane if not lane & half else LANES + (lane ^ half) for lane in range(LANES)]
                taken = [lane | half if not lane & half else LANES + lane for lane in range(LANES)]
                lines[number], lines[number | half] = one.lanes(kept, other), one.lanes(taken, other)
        half //= 2
    return lines


# Tile registers


TILE_ROWS, TILE_BYTES = 16, 64
"""Of a tile: rows, and bytes in each."""
TILE_CONFIG_BYTES = 64


def tile_config(rows: list[int]) -> bytes:
    """rows: of each of up to 8 tiles; each row has 64 bytes. (Intel's "palette 1".)"""
    config = bytearray(TILE_CONFIG_BYTES)
    config[0] = 1
    for tile, count in enumerate(rows):
        config[16 + 2 * tile] = TILE_BYTES
        config[48 + tile] = count
    return bytes(config)


def config_address(first: int, second: int) -> int:
    """Of a configuration for tiles 0 and 1, 2 and 3, 4, and 5 that have as many rows as they are used for, first or
    second of them, and for whole tiles 6 and 7."""
    return ctypes.addressof(_kept_config(first, second))


@cache
def _kept_config(first: int, second: int) -> ctypes.Array[ctypes.c_char]:
    """It lives as long as the process: kernels know its address."""
    unused = max(second, 1)
    rows = [first, first, unused, unused, first, unused, TILE_ROWS, TILE_ROWS]
    return ctypes.create_string_buffer(tile_config(rows))


def configure_tiles(f: Function, config: Value) -> None:
    f.instruction("llvm.x86.ldtilecfg", ir.VoidType(), f.pointer(config))


def release_tiles(f: Function) -> None:
    f.instruction("llvm.x86.tilerelease", ir.VoidType())


def zero_tile(f: Function, tile: int) -> None:
    f.instruction("llvm.x86.tilezero", ir.VoidType(), ir.Constant(I8, tile))


def load_tile(f: Function, tile: int, address: Value, stride: Value) -> None:
    f.instruction("llvm.x86.tileloadd64", ir.VoidType(), ir.Constant(I8, tile), f.pointer(address), stride)


def store_tile(f: Function, tile: int, address: Value, stride: Value) -> None:
    f.instruction("llvm.x86.tilestored64", ir.VoidType(), ir.Constant(I8, tile), f.pointer(address), stride)


def multiply_tiles(f: Function, into: int, x: int, weights: int, *, integers: bool) -> None:
    name = "llvm.x86.tdpbssd" if integers else "llvm.x86.tdpbf16ps"
    f.instruction(name, ir.VoidType(), *(ir.Constant(I8, tile) for tile in (into, x, weights)))
