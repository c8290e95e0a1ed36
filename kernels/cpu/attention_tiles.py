"""The kernel of attention on tile registers (AMX), for bfloat16. Items, splits, tiles and merging are those of
`attention_kernels`, whose docstring says why a row's bits depend on nothing else; here an item may have MOST_ROWS rows.

Two products, each of tiles of 16 rows and 32 bfloat16 numbers, and everything between them with a row in each lane:

    scores [keys, rows] = keys [16, D] · queries [D, rows]    keys lie in the cache as a tile wants them
    values [rows, D]    = weights [rows, 32 keys] · values [32 keys, D]

The right factor of a product holds two neighbours of its inner dimension side by side: queries are laid out so once for
an item, values once for a tile of keys. Weights are rounded to bfloat16, and what is summed up is what was rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

from pronk.kernels.cpu.attention_kernels import (
    ATTEND,
    FLOATS,
    NOTHING,
    SPLIT,
    TILE,
    Attend,
    Scratch,
    clear,
    hand_over,
    item_of,
    merge,
    position_address,
)
from pronk.kernels.cpu.code import Write, arguments_of
from pronk.kernels.cpu.instructions import (
    LANES,
    TILE_BYTES,
    configure_tiles,
    load_tile,
    multiply_tiles,
    release_tiles,
    store_tile,
    transposed,
    zero_tile,
)
from pronk.kernels.jit.emit import F32, I16, I32, Function, Value, vector

MOST_ROWS = 64
ARGUMENTS = (*ATTEND, "config")
KEYS = 16
"""Of a tile register."""
WORDS = vector(I32, LANES)
ROW_BYTES = MOST_ROWS * 4
REGISTER_BYTES = 16 * TILE_BYTES


@dataclass(frozen=True)
class Packed:
    """Addresses of what goes into tile registers or comes out of them, beside the `Scratch`."""

    queries: Value
    """[row tiles, D / 32, register]"""
    values: Value
    """[TILE / 32, D / 16, register]"""
    scores: Value
    """float32 [TILE, MOST_ROWS]"""
    pairs: Value
    """[TILE / 2, LANES]: weights of two keys, for each row"""
    weights: Value
    """[TILE / 32, register]"""
    product: Value
    """float32 [D / 16, 16, LANES]"""
    positions: Value
    """int32 [MOST_ROWS]"""
    largest: Value
    """float32 [MOST_ROWS]"""
    total: Value
    """float32 [MOST_ROWS]: of weights"""
    scale: Value
    """float32 [LANES]"""


def write_attend_on_tiles(head_dim: int) -> Write:
    """head_dim: a multiple of 32."""

    def write(f: Function) -> None:
        heads, pairs = MOST_ROWS * head_dim * 4, MOST_ROWS * 8
        sums, stats, totals, total_stats = (f.stack(size) for size in (heads, pairs, heads, pairs))
        scratch = Scratch(sums, sums, sums, stats, totals, total_stats)
        kernel = Attend(f, "bfloat16", head_dim, arguments_of(f, ARGUMENTS), scratch)
        packed = Packed(
            queries=f.stack(MOST_ROWS // 16 * (head_dim // 32) * REGISTER_BYTES),
            values=f.stack(TILE // 32 * (head_dim // 16) * REGISTER_BYTES),
            scores=f.stack(TILE * ROW_BYTES),
            pairs=f.stack(TILE // 2 * LANES * 4),
            weights=f.stack(TILE // 32 * REGISTER_BYTES),
            product=f.stack(head_dim // 16 * REGISTER_BYTES),
            positions=f.stack(ROW_BYTES),
            largest=f.stack(ROW_BYTES),
            total=f.stack(ROW_BYTES),
            scale=f.stack(4 * LANES),
        )
        configure_tiles(f, kernel.a["config"])
        with f.loop(f.argument("first"), f.argument("last")) as number:
            _attend(kernel, packed, number // kernel.a["num_kv_heads"], number % kernel.a["num_kv_heads"])
        release_tiles(f)

    return write


def _attend(kernel: Attend, packed: Packed, number: Value, kv_head: Value) -> None:
    f, a, scratch = kernel.f, kernel.a, kernel.scratch
    item = item_of(kernel, number)
    group = a["num_heads"] // a["num_kv_heads"]
    num_rows = item["num_tokens"] * group
    row_tiles = (num_rows + 15) // 16
    _pack_queries(kernel, packed, item, kv_head, group, num_rows, row_tiles)
    table = a["block_tables"] + item["sequence"] * a["table_width"] * 8
    limit = item["first_position"] + item["num_tokens"]
    clear(f, scratch.totals, scratch.total_stats, num_rows, kernel.head_dim)
    with f.loop(item["first_split"], item["end_split"]) as split:
        clear(f, scratch.sums, scratch.stats, row_tiles * 16, kernel.head_dim)
        with f.loop(0, row_tiles) as rows:
            f.store(f.value(NOTHING, FLOATS), packed.largest + rows * 64)
            f.store(f.value(0.0, FLOATS), packed.total + rows * 64)
        end = f.smaller((split + 1) * SPLIT, limit)
        with f.loop(split * SPLIT, end, TILE) as start:
            count = f.smaller(end - start, TILE)
            _score(kernel, packed, table, kv_head, start, count, row_tiles)
            _pack_values(kernel, packed, table, kv_head, start, count)
            with f.loop(0, row_tiles) as rows:
                _weigh(kernel, packed, rows, start)
                _add_values(kernel, packed, rows)
        with f.loop(0, num_rows) as row:
            f.store(f.load(packed.largest + row * 4, F32), scratch.stats + row * 8)
            f.store(f.load(packed.total + row * 4, F32), scratch.stats + row * 8 + 4)
        with f.when(item["partial"] < 0), f.loop(0, num_rows) as row:
            merge(kernel, row, scratch.sums + row * (kernel.head_dim * 4), scratch.stats + row * 8)
    hand_over(kernel, item, kv_head, num_rows)


def _pack_queries(
    kernel: Attend, packed: Packed, item: dict[str, Value], kv_head: Value, group: Value, num_rows: Value, tiles: Value
) -> None:
    """Rows past num_rows are zero, at the first row's position."""
    f, a = kernel.f, kernel.a
    registers = kernel.head_dim // 32
    with f.loop(0, tiles * (registers * 16)) as line:
        f.store(f.value(0, WORDS), packed.queries + line * TILE_BYTES)
    with f.loop(0, tiles * 16) as row:
        inside = f.select(row < num_rows, row, 0)
        f.store((item["first_position"] + inside // group).to(I32), packed.positions + row * 4)
    with f.loop(0, num_rows) as row:
        token, head = item["first_token"] + row // group, kv_head * group + row % group
        source = a["q"] + (token * a["num_heads"] + head) * kernel.head_bytes
        target = packed.queries + row // 16 * (registers * REGISTER_BYTES) + row % 16 * 4
        with f.loop(0, kernel.head_dim // 2) as pair:
            f.store(f.load(source + pair * 4, I32), target + pair * TILE_BYTES)


def _score(
    kernel: Attend, packed: Packed, table: Value, kv_head: Value, start: Value, count: Value, row_tiles: Value
) -> None:
    """Keys up to the next multiple of KEYS are read: whatever they are, their scores are not used."""
    f = kernel.f
    registers = kernel.head_dim // 32
    with f.loop(0, count, KEYS) as key:
        keys = position_address(kernel, "keys", table, kv_head, start + key)
        for number in range(registers):
            load_tile(f, 4 + number, keys + number * TILE_BYTES, f.value(kernel.head_bytes))
        with f.loop(0, row_tiles) as rows:
            queries = packed.queries + rows * (registers * REGISTER_BYTES)
            zero_tile(f, 0)
            for number in range(registers):
                load_tile(f, 1, queries + number * REGISTER_BYTES, f.value(TILE_BYTES))
                multiply_tiles(f, 0, 4 + number, 1, integers=False)
            store_tile(f, 0, packed.scores + key * ROW_BYTES + rows * 64, f.value(ROW_BYTES))


def _pack_values(kernel: Attend, packed: Packed, table: Value, kv_head: Value, start: Value, count: Value) -> None:
    """Two neighbouring keys' values side by side; zero from `count` on, whatever lies there."""
    f = kernel.f
    registers = kernel.head_dim // 16
    shorts = vector(I16, LANES)

    def place(pair: Value, number: int) -> Value:
        return packed.values + ((pair // 16 * registers + number) * 16 + pair % 16) * TILE_BYTES

    with f.when(count < TILE), f.loop(0, TILE // 2) as pair:
        for number in range(registers):
            f.store(f.value(0, WORDS), place(pair, number))
    with f.loop(0, count, 2) as key:
        values = position_address(kernel, "values", table, kv_head, start + key)
        for number in range(registers):
            first = f.load(values + number * (LANES * 2), shorts).zero_extended(WORDS)
            f.store(first, place(key // 2, number))
        with f.when(key + 1 < count):
            for number in range(registers):
                second = f.load(values + kernel.head_bytes + number * (LANES * 2), shorts).zero_extended(WORDS) << 16
                f.store(f.load(place(key // 2, number), WORDS) | second, place(key // 2, number))


def _weigh(kernel: Attend, packed: Packed, rows: Value, start: Value) -> None:
    """Scores of 16 rows become weights, and the sums so far are to be scaled to the new largest score."""
    f = kernel.f
    scores = packed.scores + rows * 64
    # A key is seen from its own position on.
    last = f.load(packed.positions + rows * 64, WORDS) - start.to(I32).broadcast(LANES)
    before = f.load(packed.largest + rows * 64, FLOATS)
    largest = f.variable(before)
    with f.loop(0, TILE) as key:
        score = f.load(scores + key * ROW_BYTES, FLOATS) * kernel.head_dim**-0.5
        score = f.select(key.to(I32).broadcast(LANES) <= last, score, float("-inf"))
        f.store(score, scores + key * ROW_BYTES)
        largest.set(f.maximum(largest.get(), score))
    total = f.variable(f.value(0.0, FLOATS))
    with f.loop(0, TILE, 2) as key:
        pair = []
        for number in range(2):
            score = f.load(scores + (key + number) * ROW_BYTES, FLOATS)
            weight = f.narrow_to_bfloat16(f.exponential(score - largest.get()))
            total.set(total.get() + f.widen_bfloat16(weight))
            pair.append(weight.zero_extended(WORDS))
        f.store(pair[0] | (pair[1] << 16), packed.pairs + key * (LANES * 2))
    scale = f.exponential(before - largest.get())
    f.store(f.load(packed.total + rows * 64, FLOATS) * scale + total.get(), packed.total + rows * 64)
    f.store(largest.get(), packed.largest + rows * 64)
    f.store(scale, packed.scale)
    for half in range(TILE // 32):
        lines = [f.load(packed.pairs + (half * 16 + pair) * 64, WORDS) for pair in range(16)]
        for row, line in enumerate(transposed(lines)):
            f.store(line, packed.weights + half * REGISTER_BYTES + row * TILE_BYTES)


def _add_values(kernel: Attend, packed: Packed, rows: Value) -> None:
    """sums of 16 rows, scaled, + weights · values."""
    f = kernel.f
    registers = kernel.head_dim // 16
    for half in range(TILE // 32):
        load_tile(f, 4 + half, packed.weights + half * REGISTER_BYTES, f.value(TILE_BYTES))
    for number in range(registers):
        zero_tile(f, 0)
        for half in range(TILE // 32):
            load_tile(f, 1, packed.values + (half * registers + number) * REGISTER_BYTES, f.value(TILE_BYTES))
            multiply_tiles(f, 0, 4 + half, 1, integers=False)
        store_tile(f, 0, packed.product + number * REGISTER_BYTES, f.value(TILE_BYTES))
    with f.loop(0, 16) as row:
        scale = f.load(packed.scale + row * 4, F32).broadcast(LANES)
        sums = kernel.scratch.sums + (rows * 16 + row) * (kernel.head_dim * 4)
        for number in range(registers):
            added = f.load(packed.product + number * REGISTER_BYTES + row * TILE_BYTES, FLOATS)
            f.store(f.load(sums + number * 64, FLOATS) * scale + added, sums + number * 64)
