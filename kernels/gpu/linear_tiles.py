"""How a product is cut up: what belongs to the weight, and decides an output's bits; and what belongs to a launch.

Fixed tables, no measuring at run time: a run is like any other from its first step. The reasons are arithmetic on
bytes; no number here has been tuned on a GPU. Knows no kernel.

What the tables aim at, on 132 SMs:
- Up to 64 rows the time is that of reading the weight. There should be a program for each SM, so tiles are narrow where
  N is small: 16 outputs give the 1B's 2048 x 2048 128 programs. And an SM should have 32 KiB on their way at any time
  (4.3 TB/s times 0.7 µs is 3 MB, 23 KiB for each): (num_stages - 1) · block_n · K per turn · bytes, times the programs
  that an SM holds at once.
- With more rows the tensor cores are the limit, and before them the L2 cache, from which a program reads
  (block_m + block_n) · K numbers: tiles are as large as still gives most SMs one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pronk.kernels.interface import WeightFormat


@dataclass(frozen=True)
class Order:
    """Belongs to a weight and the activations' dtype: never to the number of rows. See `linear_sums`."""

    block_k: int
    segments: int

    def is_even(self, num_inputs: int) -> bool:
        return num_inputs % (self.block_k * self.segments) == 0


@dataclass(frozen=True)
class Tile:
    """Belongs to a launch."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    most_rows: int | None
    """For this many rows at most; None: any number."""
    fewest_programs: int = 0
    """Only if there are that many programs; otherwise the next is looked at."""
    at_once: bool = False
    """All parts of K at once, where the order has parts."""


_AT_ONCE = 4
"""Parts, where there are parts."""
_FLOAT32_BLOCK_K = 32
_BLOCK_K: dict[WeightFormat, int] = {"plain": 64, "int8": 128, "fp8": 128, "int4": 128}
"""A row's block is 128 bytes, a line of the L2 cache; int4's is twice 32 bytes, next to those of other rows."""


def order_of(num_inputs: int, format: WeightFormat, dtype: torch.dtype) -> Order:
    """The order of an output's sum. dtype: the activations'."""
    block_k = _BLOCK_K[format]
    if format == "int4":
        return Order(block_k, _AT_ONCE)
    if dtype == torch.float32:
        # No tensor cores, no chains of theirs; tiles of float32 take twice the room.
        return Order(_FLOAT32_BLOCK_K, 1)
    return Order(block_k, _AT_ONCE if num_inputs >= _AT_ONCE * block_k else 1)


_PLAIN = (
    Tile(16, 32, 8, 4, most_rows=16, fewest_programs=256, at_once=True),
    Tile(16, 16, 4, 6, most_rows=16, at_once=True),
    Tile(32, 32, 4, 4, most_rows=32, fewest_programs=128, at_once=True),
    Tile(32, 16, 4, 5, most_rows=32, at_once=True),
    Tile(64, 64, 4, 6, most_rows=64, fewest_programs=128),
    Tile(64, 32, 4, 8, most_rows=64),
    Tile(128, 128, 8, 4, most_rows=None, fewest_programs=96),
    Tile(128, 64, 8, 4, most_rows=None, fewest_programs=96),
    Tile(64, 64, 4, 6, most_rows=None),
)
_BYTES = (
    Tile(16, 32, 8, 4, most_rows=16, fewest_programs=256, at_once=True),
    Tile(16, 16, 4, 5, most_rows=16, at_once=True),
    Tile(32, 16, 4, 4, most_rows=32, at_once=True),
    Tile(64, 64, 4, 4, most_rows=64, fewest_programs=128),
    Tile(64, 32, 4, 5, most_rows=64),
    Tile(128, 128, 8, 3, most_rows=None, fewest_programs=96),
    Tile(64, 64, 4, 4, most_rows=None),
)
_INT4 = (
    Tile(16, 32, 8, 4, most_rows=16, at_once=True),
    Tile(32, 32, 4, 4, most_rows=None, at_once=True),
)
_FLOAT32 = (
    Tile(16, 32, 4, 3, most_rows=16),
    Tile(64, 32, 4, 3, most_rows=None),
)
_INT4_OF_FLOAT32 = (Tile(16, 16, 4, 2, most_rows=None, at_once=True),)


def tile_of(num_rows: int, num_outputs: int, format: WeightFormat, dtype: torch.dtype) -> Tile:
    """The tile for a launch. dtype: the activations'."""
    tiles = _candidates(format, dtype)
    for tile in tiles:
        programs = -(-num_rows // tile.block_m) * -(-num_outputs // tile.block_n)
        if (tile.most_rows is None or num_rows <= tile.most_rows) and programs >= tile.fewest_programs:
            return tile
    return tiles[-1]


def _candidates(format: WeightFormat, dtype: torch.dtype) -> tuple[Tile, ...]:
    if dtype == torch.float32:
        return _INT4_OF_FLOAT32 if format == "int4" else _FLOAT32
    if format == "int4":
        return _INT4
    return _PLAIN if format == "plain" else _BYTES


def stages_within(shared_bytes: int, tile: Tile, order: Order, format: WeightFormat, dtype: torch.dtype) -> int:
    """How many stages of the tile shared memory has room for, of those it would have. dtype: the activations'."""
    inputs = order.block_k * (order.segments if tile.at_once else 1)
    bits = {"plain": 8 * dtype.itemsize, "int8": 8, "fp8": 8, "int4": 4}[format]
    stage = inputs * (tile.block_m * dtype.itemsize * 8 + tile.block_n * bits) // 8
    return max(1, min(tile.num_stages, shared_bytes // stage))
