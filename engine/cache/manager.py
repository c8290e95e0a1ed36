"""CacheManager: gives sequences their blocks, from the prefix cache where it can. Knows their tokens, no tensor."""

from __future__ import annotations

from pronk.engine.cache.blocks import BlockPool
from pronk.engine.cache.prefix import PrefixCache, chain_key, root_key
from pronk.engine.sequence import Sequence


class CacheManager:
    """Block accounting for sequences over one pool.

    Invariant: every block of a sequence's table has the sequence as one of its holders; a block with several holders
    is full, and nobody writes to it.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks, self._reuse)
        self.prefix = PrefixCache()
        self.evicted_blocks = 0
        self._enabled = enable_prefix_caching

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, sequence: Sequence) -> list[int]:
        """The cached blocks that the sequence could start with, in order. At least one token is left to compute, since
        only a computed token gives logits. Takes nothing yet."""
        # Log probabilities of a prompt need all of its tokens computed.
        if not self._enabled or sequence.params.prompt_logprobs is not None:
            return []
        found: list[int] = []
        for index in range((sequence.num_tokens - 1) // self.block_size):
            parent, key = self._keys(sequence, index)
            block = self.prefix.find(parent, key, self._tokens(sequence, index))
            if block is None:
                break
            found.append(block)
        return found

    def num_cached(self, prompt: list[int], salt: str) -> int:
        """How many tokens of a prompt `match` would find now. A look only: nothing is taken, and what is reused next
        stays what it was."""
        found = 0
        parent = root_key(salt)
        # As for a sequence, one token is always left to compute.
        while self._enabled and found + self.block_size < len(prompt):
            tokens = prompt[found : found + self.block_size]
            key = chain_key(parent, tokens)
            if self.prefix.find(parent, key, tokens) is None:
                break
            found += self.block_size
            parent = key
        return found

    def missing(self, sequence: Sequence, matched: list[int], num_tokens: int) -> int:
        """Free blocks that it takes to hold num_tokens of the sequence, after `matched` blocks were shared."""
        fresh = self.blocks_for(num_tokens) - max(len(matched), len(sequence.block_table))
        return max(0, fresh) + sum(1 for block in matched if not self.pool.holders(block))

    def adopt(self, sequence: Sequence, matched: list[int]) -> None:
        """Start a sequence that holds nothing with these blocks: their tokens count as computed."""
        for block in matched:
            self.pool.share(block)
        sequence.block_table = list(matched)
        sequence.num_computed = len(matched) * self.block_size

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the sequence blocks for its first num_tokens tokens. -> False, and nothing is taken, if too few are
        free."""
        fresh = self.blocks_for(num_tokens) - len(sequence.block_table)
        if fresh > self.pool.num_free:
            return False
        if fresh > 0:
            sequence.block_table += self.pool.allocate(fresh)
        return True

    def remember(self, sequence: Sequence, start: int, end: int) -> None:
        """Tokens at positions [start, end) were computed: keep the blocks that they filled."""
        if not self._enabled:
            return
        for index in range(start // self.block_size, end // self.block_size):
            parent, key = self._keys(sequence, index)
            self.prefix.insert(sequence.block_table[index], parent, key, self._tokens(sequence, index))

    def release(self, sequence: Sequence) -> None:
        """The sequence gives back all it holds. Its last blocks are reused first: a prefix is worth most at its
        beginning."""
        self.pool.release(reversed(sequence.block_table), keep=lambda block: block in self.prefix)
        sequence.block_table = []
        sequence.num_computed = 0

    def discard(self, sequence: Sequence) -> None:
        """As release, for a sequence whose numbers went wrong: what only it holds is never found again."""
        for block in sequence.block_table:
            if self.pool.holders(block) == 1:
                self.prefix.forget(block)
        self.release(sequence)

    def _reuse(self, block: int) -> None:
        self.prefix.forget(block)
        self.evicted_blocks += 1

    def _tokens(self, sequence: Sequence, index: int) -> list[int]:
        return sequence.tokens[index * self.block_size : (index + 1) * self.block_size]

    def _keys(self, sequence: Sequence, index: int) -> tuple[bytes, bytes]:
        """-> (the digest of the prefix before block `index`, the digest with it); worked out once for each block."""
        keys = sequence.block_keys
        if not keys:
            keys.append(root_key(sequence.request.cache_salt))
        while len(keys) <= index + 1:
            keys.append(chain_key(keys[-1], self._tokens(sequence, len(keys) - 1)))
        return keys[index], keys[index + 1]
