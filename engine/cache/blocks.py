"""BlockPool: who holds which block of the KV cache, by reference counts. Knows numbers only: no tokens, no tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from pronk.engine.errors import PronkError


class BlockError(PronkError):
    """A block was released or shared that nobody holds: a fault in the accounting, never a client's."""


class BlockPool:
    """Blocks 0..num_blocks-1, each held by one or more, or free: empty, or kept because its content may be wanted.

    Invariant: a block is in exactly one of `_empty` and `_kept` when its count is 0, and in neither otherwise.
    """

    def __init__(self, num_blocks: int, on_reuse: Callable[[int], None]) -> None:
        """on_reuse(block) is called when a kept block is handed out and its content is lost."""
        self.num_blocks = num_blocks
        self._counts = [0] * num_blocks
        self._empty = list(reversed(range(num_blocks)))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._on_reuse = on_reuse

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, kept ones included."""
        return len(self._empty) + len(self._kept)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.num_free

    @property
    def num_kept(self) -> int:
        """Free blocks with content that may be wanted."""
        return len(self._kept)

    def holders(self, block: int) -> int:
        """How many hold it; 0 when it is free."""
        return self._counts[block]

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each with one holder: empty ones first, then the least recently kept.

        Raises BlockError if there are fewer.
        """
        if count > self.num_free:
            raise BlockError(f"{count} blocks wanted, {self.num_free} free")
        return [self._take() for _ in range(count)]

    def share(self, block: int) -> None:
        """One more holder of a block whose content is wanted: a held one, or a kept one."""
        if self._counts[block] == 0:
            if block not in self._kept:
                raise BlockError(f"block {block} is empty: there is nothing to share")
            del self._kept[block]
        self._counts[block] += 1

    def release(self, blocks: Iterable[int], *, keep: Callable[[int], bool]) -> None:
        """One holder less of each. A block that nobody holds becomes free; keep(block) says whether for its content."""
        for block in blocks:
            if self._counts[block] <= 0:
                raise BlockError(f"block {block} was released more often than it was taken")
            self._counts[block] -= 1
            if self._counts[block] == 0:
                if keep(block):
                    self._kept[block] = None
                else:
                    self._empty.append(block)

    def _take(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._kept.popitem(last=False)
            self._on_reuse(block)
        self._counts[block] = 1
        return block
