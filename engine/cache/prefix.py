"""PrefixCache: which block holds the keys and values of which prefix. Knows token ids and block numbers.

A full block is found by a digest that chains its tokens to all tokens before it (and to the request's salt), since
keys and values depend on the whole prefix. A hit is confirmed by comparing the stored tokens.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence as Tokens
from dataclasses import dataclass


def root_key(salt: str) -> bytes:
    """Where a chain begins: prefixes under different salts never meet."""
    return hashlib.sha256(salt.encode()).digest()


def chain_key(parent: bytes, tokens: Tokens[int]) -> bytes:
    """SHA-256 of the parent's digest and the block's token ids as 32-bit little-endian integers."""
    return hashlib.sha256(parent + array("I", tokens).tobytes()).digest()


@dataclass(frozen=True)
class Entry:
    """What a cached block holds."""

    key: bytes
    parent: bytes
    tokens: tuple[int, ...]


class PrefixCache:
    """Full blocks by the digest of their prefix. Says nothing of who holds them; `forget` is told of their reuse."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._entries: dict[int, Entry] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: int) -> bool:
        return block in self._entries

    def find(self, parent: bytes, key: bytes, tokens: Tokens[int]) -> int | None:
        """The block with these tokens after the prefix `parent`, or None."""
        block = self._blocks.get(key)
        if block is None:
            return None
        entry = self._entries[block]
        # A digest that two prefixes share must not give one the other's keys.
        return block if entry.parent == parent and entry.tokens == tuple(tokens) else None

    def insert(self, block: int, parent: bytes, key: bytes, tokens: Tokens[int]) -> None:
        """Remember a block that is full and computed. The first block with a content stays; another is not kept."""
        if key not in self._blocks and block not in self._entries:
            self._blocks[key] = block
            self._entries[block] = Entry(key, parent, tuple(tokens))

    def forget(self, block: int) -> None:
        """The block's content is lost, or not to be trusted."""
        entry = self._entries.pop(block, None)
        if entry is not None:
            del self._blocks[entry.key]
