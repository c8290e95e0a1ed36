"""The kernels of attention over a paged cache (flash decoding: Dao et al. 2023, "Flash-Decoding for long-context
inference"; GQA rows share one read of keys and values).

An item is a piece of the step and a KV head: up to TILE_ROWS rows (a token's query heads of this KV head, and
neighbouring tokens of the sequence as far as there is room), against all of their keys, or against one split of them.

Numbers, promise 1. Keys lie in splits of SPLIT at multiples of that position, and splits in tiles of TILE. A row's
tile has one largest score, one sum and one weighted sum of values; these are merged in the order of positions, first
those of a split, then the splits, by the same operations whether one item goes through all splits or each has its own.
What a row does not see changes nothing: its weight is 0, and merging with nothing multiplies by 1 and adds 0. So a
row's bits depend on its position and its keys alone.

A score is summed by lanes, and its lanes by a tree. Four keys by four rows are multiplied together: their sixteen sums
are joined in four steps, instead of four steps each.
"""

from __future__ import annotations

from dataclasses import dataclass

from pronk.kernels.cpu.code import ITEM_BYTES, Write, arguments_of, load_floats, store_floats
from pronk.kernels.cpu.instructions import LANES, part
from pronk.kernels.jit.emit import F32, I64, Function, Value, Variable, vector

SPLIT = 512
TILE = 64
TILE_ROWS = 16
"""Rows of an item at most; a group of query heads has at most so many."""
ROWS = 4
"""Rows that are multiplied together."""
KEYS = 4
"""Keys that are multiplied together: neighbours in a block."""
NOTHING = -1e30
"""The largest score of no keys: finite, so that it can be subtracted."""

ATTEND = ("q", "keys", "values", "out", "items", "block_tables", "table_width", "num_heads", "num_kv_heads",
          "block_size", "partial_sums", "partial_stats")  # fmt: skip
ITEM = ("first_token", "num_tokens", "first_position", "sequence", "first_split", "end_split", "partial")
"""int64 each. first_position: of its first token. partial: the place of its partial results, or -1: it sees all keys,
and writes the result."""
MERGE = ("out", "items", "partial_sums", "partial_stats", "num_heads", "num_kv_heads")
MERGE_ITEM = ("first_token", "num_tokens", "partial", "num_splits")
"""int64 each. partial: the place of the first split's; those of the others follow."""

FLOATS = vector(F32, LANES)


@dataclass(frozen=True)
class Scratch:
    """Addresses of what an item keeps beside the registers: float32, a row of TILE_ROWS each."""

    q: Value
    """[D], scaled."""
    scores: Value
    """[TILE]"""
    sums: Value
    """[D]: the split's weighted values so far."""
    stats: Value
    """[2]: the split's largest score and sum of weights."""
    totals: Value
    """[D]: as sums, of all splits so far."""
    total_stats: Value
    """[2]"""


@dataclass(frozen=True)
class Attend:
    """One kernel while it is written."""

    f: Function
    dtype: str
    head_dim: int
    a: dict[str, Value]
    scratch: Scratch

    @property
    def vectors(self) -> int:
        """In a head."""
        return self.head_dim // LANES

    @property
    def head_bytes(self) -> int:
        return self.head_dim * ITEM_BYTES[self.dtype]

    def load_head(self, address: Value, number: int) -> Value:
        """A vector of a head in the cache or among the queries: float32."""
        return load_floats(self.f, self.dtype, address + number * LANES * ITEM_BYTES[self.dtype], LANES)


def _scratch(f: Function, head_dim: int) -> Scratch:
    heads, pairs = TILE_ROWS * head_dim * 4, TILE_ROWS * 8
    return Scratch(
        q=f.stack(heads), scores=f.stack(TILE_ROWS * TILE * 4), sums=f.stack(heads), stats=f.stack(pairs),
        totals=f.stack(heads), total_stats=f.stack(pairs),
    )  # fmt: skip


def write_attend(dtype: str, head_dim: int) -> Write:
    """Items are those of `ITEM`, each times the KV heads."""

    def write(f: Function) -> None:
        kernel = Attend(f, dtype, head_dim, arguments_of(f, ATTEND), _scratch(f, head_dim))
        with f.loop(f.argument("first"), f.argument("last")) as number:
            _attend(kernel, number // kernel.a["num_kv_heads"], number % kernel.a["num_kv_heads"])

    return write


def _attend(kernel: Attend, number: Value, kv_head: Value) -> None:
    f, a, scratch = kernel.f, kernel.a, kernel.scratch
    item = item_of(kernel, number)
    group = a["num_heads"] // a["num_kv_heads"]
    num_rows = item["num_tokens"] * group
    row_groups = (num_rows + (ROWS - 1)) // ROWS
    _load_queries(kernel, item, kv_head, group, row_groups * ROWS, num_rows)
    table = a["block_tables"] + item["sequence"] * a["table_width"] * 8
    limit = item["first_position"] + item["num_tokens"]
    clear(f, scratch.totals, scratch.total_stats, row_groups * ROWS, kernel.head_dim)
    with f.loop(item["first_split"], item["end_split"]) as split:
        clear(f, scratch.sums, scratch.stats, row_groups * ROWS, kernel.head_dim)
        end = f.smaller((split + 1) * SPLIT, limit)
        with f.loop(split * SPLIT, end, TILE) as start:
            count = f.smaller(end - start, TILE)
            _score(kernel, table, kv_head, start, count, row_groups)
            with f.loop(0, num_rows) as row:
                _weigh(kernel, row, start, item["first_position"] + row // group)
            _add_values(kernel, table, kv_head, start, count, row_groups)
        with f.when(item["partial"] < 0), f.loop(0, num_rows) as row:
            merge(kernel, row, scratch.sums + row * (kernel.head_dim * 4), scratch.stats + row * 8)
    hand_over(kernel, item, kv_head, num_rows)


def hand_over(kernel: Attend, item: dict[str, Value], kv_head: Value, num_rows: Value) -> None:
    """An item that has seen all keys writes its results, another one what they are merged from."""
    f, a, scratch = kernel.f, kernel.a, kernel.scratch
    group, sum_bytes = a["num_heads"] // a["num_kv_heads"], kernel.head_dim * 4
    with f.when(item["partial"] < 0), f.loop(0, num_rows) as row:
        token, head = item["first_token"] + row // group, kv_head * group + row % group
        finish(kernel, row, a["out"] + (token * a["num_heads"] + head) * kernel.head_bytes)
    with f.when(item["partial"] >= 0), f.loop(0, num_rows) as row:
        to = (item["partial"] * a["num_kv_heads"] + kv_head) * TILE_ROWS + row
        copy_sums(f, scratch.sums + row * sum_bytes, a["partial_sums"] + to * sum_bytes, kernel)
        f.store(f.load(scratch.stats + row * 8, vector(F32, 2)), a["partial_stats"] + to * 8)


def item_of(kernel: Attend, number: Value) -> dict[str, Value]:
    place = kernel.a["items"] + number * (8 * len(ITEM))
    return {name: kernel.f.load(place + 8 * index, I64) for index, name in enumerate(ITEM)}


def _load_queries(
    kernel: Attend, item: dict[str, Value], kv_head: Value, group: Value, padded: Value, num_rows: Value
) -> None:
    """Rows past num_rows are zero."""
    f, a = kernel.f, kernel.a
    with f.loop(0, padded) as row:
        target = kernel.scratch.q + row * (kernel.head_dim * 4)
        for n in range(kernel.vectors):
            f.store(f.value(0.0, FLOATS), target + n * LANES * 4)
    with f.loop(0, num_rows) as row:
        token, head = item["first_token"] + row // group, kv_head * group + row % group
        source = a["q"] + (token * a["num_heads"] + head) * kernel.head_bytes
        target = kernel.scratch.q + row * (kernel.head_dim * 4)
        for n in range(kernel.vectors):
            f.store(kernel.load_head(source, n) * kernel.head_dim**-0.5, target + n * LANES * 4)


def clear(f: Function, sums: Value, stats: Value, rows: Value, head_dim: int) -> None:
    with f.loop(0, rows) as row:
        for n in range(head_dim // LANES):
            f.store(f.value(0.0, FLOATS), sums + row * (head_dim * 4) + n * LANES * 4)
        f.store(f.value(NOTHING, F32), stats + row * 8)
        f.store(f.value(0.0, F32), stats + row * 8 + 4)


def position_address(kernel: Attend, cache: str, table: Value, kv_head: Value, position: Value) -> Value:
    """Of a position's key or value."""
    a = kernel.a
    block = kernel.f.load(table + position // a["block_size"] * 8, I64)
    row = (block * a["num_kv_heads"] + kv_head) * a["block_size"] + position % a["block_size"]
    return a[cache] + row * kernel.head_bytes


def _score(kernel: Attend, table: Value, kv_head: Value, start: Value, count: Value, row_groups: Value) -> None:
    """Scores of a tile. Keys up to the next multiple of KEYS are read: whatever they are, their scores are not used."""
    f, scratch = kernel.f, kernel.scratch
    with f.loop(0, count, KEYS) as key:
        keys = position_address(kernel, "keys", table, kv_head, start + key)
        with f.loop(0, row_groups) as rows:
            q = scratch.q + rows * (ROWS * kernel.head_dim * 4)
            sums: list[Value | None] = [None] * (ROWS * KEYS)
            for n in range(kernel.vectors):
                own = [kernel.load_head(keys + k * kernel.head_bytes, n) for k in range(KEYS)]
                for r in range(ROWS):
                    asked = f.load(q + (r * kernel.head_dim + n * LANES) * 4, FLOATS)
                    for k in range(KEYS):
                        total = sums[r * KEYS + k]
                        sums[r * KEYS + k] = asked * own[k] if total is None else f.fma(asked, own[k], total)
            joined = sums_of([total for total in sums if total is not None])
            for r in range(ROWS):
                place = scratch.scores + ((rows * ROWS + r) * TILE + key) * 4
                f.store(part(joined, r, ROWS), place)


def sums_of(vectors: list[Value]) -> Value:
    """As many vectors as they have lanes -> a vector of the sum of each: halves of lanes are added, then quarters, and
    so on; two vectors become one each time."""
    width = len(vectors)
    while width > 1:
        half = width // 2
        low = [lane for lane in range(2 * LANES) if lane % width < half]
        high = [lane + half for lane in low]
        vectors = [
            one.lanes(low, other) + one.lanes(high, other)
            for one, other in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        width = half
    return vectors[0]


def _weigh(kernel: Attend, row: Value, start: Value, position: Value) -> None:
    """Scores become weights, and the row's sums so far are scaled to the new largest score. Keys that the row does not
    see, its own position's being the last that it does, have a weight of 0."""
    f, scratch = kernel.f, kernel.scratch
    place = scratch.scores + row * (TILE * 4)
    order = f.numbers(vector(I64, LANES))
    seen = (position - start + 1).broadcast(LANES)
    scores = []
    for n in range(TILE // LANES):
        score = f.load(place + n * LANES * 4, FLOATS)
        scores.append(f.select(order + n * LANES < seen, score, f.value(float("-inf"), FLOATS)))
    largest = scores[0]
    for score in scores[1:]:
        largest = f.maximum(largest, score)
    stats = scratch.stats + row * 8
    before = f.load(stats, F32)
    now = f.maximum(before, f.tree(largest, f.maximum))
    total = None
    for n, score in enumerate(scores):
        weight = f.exponential(score - now.broadcast(LANES))
        f.store(weight, place + n * LANES * 4)
        total = weight if total is None else total + weight
    scale = f.exponential(before - now)
    if total is not None:
        f.store(f.load(stats + 4, F32) * scale + f.tree(total, lambda one, two: one + two), stats + 4)
    f.store(now, stats)
    sums = scratch.sums + row * (kernel.head_dim * 4)
    for n in range(kernel.vectors):
        f.store(f.load(sums + n * LANES * 4, FLOATS) * scale.broadcast(LANES), sums + n * LANES * 4)


def _add_values(kernel: Attend, table: Value, kv_head: Value, start: Value, count: Value, row_groups: Value) -> None:
    """sums += weights · values, key after key."""
    f, scratch = kernel.f, kernel.scratch
    with f.loop(0, row_groups) as rows:
        place = scratch.sums + rows * (ROWS * kernel.head_dim * 4)
        sums = [
            [Variable(f, f.load(place + (r * kernel.head_dim + n * LANES) * 4, FLOATS)) for n in range(kernel.vectors)]
            for r in range(ROWS)
        ]
        with f.loop(0, count) as key:
            values = position_address(kernel, "values", table, kv_head, start + key)
            own = [kernel.load_head(values, n) for n in range(kernel.vectors)]
            for r in range(ROWS):
                weight = f.load(scratch.scores + ((rows * ROWS + r) * TILE + key) * 4, F32).broadcast(LANES)
                for n in range(kernel.vectors):
                    sums[r][n].set(f.fma(weight, own[n], sums[r][n].get()))
        for r in range(ROWS):
            for n in range(kernel.vectors):
                f.store(sums[r][n].get(), place + (r * kernel.head_dim + n * LANES) * 4)


def merge(kernel: Attend, row: Value, sums: Value, stats: Value) -> None:
    """totals += a split's sums, both scaled to the larger of their largest scores."""
    f, scratch = kernel.f, kernel.scratch
    place = scratch.total_stats + row * 8
    before, other = f.load(place, F32), f.load(stats, F32)
    now = f.maximum(before, other)
    old, new = f.exponential(before - now), f.exponential(other - now)
    f.store(f.load(place + 4, F32) * old + f.load(stats + 4, F32) * new, place + 4)
    f.store(now, place)
    for n in range(kernel.vectors):
        at = scratch.totals + row * (kernel.head_dim * 4) + n * LANES * 4
        scaled = f.load(at, FLOATS) * old.broadcast(LANES)
        f.store(scaled + f.load(sums + n * LANES * 4, FLOATS) * new.broadcast(LANES), at)


def finish(kernel: Attend, row: Value, out: Value) -> None:
    f, scratch = kernel.f, kernel.scratch
    total = f.load(scratch.total_stats + row * 8 + 4, F32).broadcast(LANES)
    for n in range(kernel.vectors):
        value = f.load(scratch.totals + row * (kernel.head_dim * 4) + n * LANES * 4, FLOATS) / total
        store_floats(f, kernel.dtype, value, out + n * LANES * ITEM_BYTES[kernel.dtype])


def copy_sums(f: Function, source: Value, target: Value, kernel: Attend) -> None:
    for n in range(kernel.vectors):
        f.store(f.load(source + n * LANES * 4, FLOATS), target + n * LANES * 4)


def write_merge(dtype: str, head_dim: int) -> Write:
    """Items are those of `MERGE_ITEM`, each times the KV heads: the splits of each row, in order."""

    def write(f: Function) -> None:
        kernel = Attend(f, dtype, head_dim, arguments_of(f, MERGE), _scratch(f, head_dim))
        a, scratch = kernel.a, kernel.scratch
        group = a["num_heads"] // a["num_kv_heads"]
        with f.loop(f.argument("first"), f.argument("last")) as number:
            place = a["items"] + number // a["num_kv_heads"] * (8 * len(MERGE_ITEM))
            kv_head = number % a["num_kv_heads"]
            item = {name: f.load(place + 8 * index, I64) for index, name in enumerate(MERGE_ITEM)}
            with f.loop(0, item["num_tokens"] * group) as row:
                clear(f, scratch.totals, scratch.total_stats, f.value(1), head_dim)
                with f.loop(0, item["num_splits"]) as split:
                    source = ((item["partial"] + split) * a["num_kv_heads"] + kv_head) * TILE_ROWS + row
                    sums = a["partial_sums"] + source * (head_dim * 4)
                    merge(kernel, f.value(0), sums, a["partial_stats"] + source * 8)
                token, head = item["first_token"] + row // group, kv_head * group + row % group
                finish(kernel, f.value(0), a["out"] + (token * a["num_heads"] + head) * kernel.head_bytes)

    return write
