"""Which blocks of the KV cache hold which tokens: tables, reference counts, shared prefixes, eviction. Torch-free.

A block holds `block_size` consecutive tokens of one sequence. A full block whose tokens are computed is published under
a hash of its tokens and of everything before them, so that another sequence that begins alike refers to it instead of
computing it again. Published blocks that nobody refers to stay until their place is needed; the one that was let go
longest ago goes first. Only full blocks are shared and they are never written again, so nothing is copied.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict

from burnish.engine.sequence import Sequence

BLOCK_SIZE = 16
FREED = -1


class BlockManager:
    """Gives blocks to sequences and takes them back.

    Args:
        num_blocks: ids are 0 .. num_blocks - 1.
        block_size: tokens per block.
        prefix_caching: False shares nothing and keeps nothing.
        window: most tokens that any layer looks back, the query's own included; None where some layer sees
            everything. Blocks behind it are given back while their sequence runs.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        block_size: int = BLOCK_SIZE,
        prefix_caching: bool = True,
        window: int | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.window = window
        self._refs = [0] * num_blocks
        # Taken from the end: low ids first and those used last again, so that untouched memory stays untouched.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that can be given out now, published ones without references included."""
        return len(self._free) + len(self._unused)

    @property
    def num_used(self) -> int:
        """Blocks that some sequence refers to."""
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """Published blocks that nobody refers to."""
        return len(self._unused)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def most_blocks(self, num_tokens: int, *, chunk: int) -> int:
        """Blocks that a sequence of `num_tokens` holds at most at a time when `chunk` tokens are computed at once."""
        whole = self.blocks_for(num_tokens)
        # The window need not begin with a block, nor the chunk end with one: one more block on either side.
        return whole if self.window is None else min(whole, self.blocks_for(self.window + chunk) + 1)

    def match(self, sequence: Sequence, *, limit: int) -> int:
        """Refer a sequence without blocks to the published blocks it begins with.

        Args:
            limit: take at most this many tokens.

        Returns:
            Tokens found, a multiple of the block size.
        """
        assert not sequence.block_table
        if not self.prefix_caching:
            return 0
        found = 0
        for digest in self.hashes(sequence, limit // self.block_size):
            block = self._block_of.get(digest)
            if block is None:
                break
            self._refer(block)
            sequence.block_table.append(block)
            found += 1
        sequence.num_published = found
        self.drop_behind_window(sequence, found * self.block_size)
        return found * self.block_size

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Lengthen the sequence's table to hold `num_tokens`; False, with nothing changed, when blocks do not do."""
        missing = self.blocks_for(num_tokens) - len(sequence.block_table)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            sequence.block_table.append(self._take())
        return True

    def publish(self, sequence: Sequence) -> None:
        """Offer the sequence's full, computed blocks to others, and give back those that no window reaches."""
        if self.prefix_caching:
            full = sequence.num_computed // self.block_size
            if full > sequence.num_published:
                digests = self.hashes(sequence, full)
                for place in range(sequence.num_published, full):
                    block = sequence.block_table[place]
                    # Two sequences may have computed the same tokens at once: the first one's block is the known one.
                    if block != FREED and digests[place] not in self._block_of and block not in self._hash_of:
                        self._hash_of[block] = digests[place]
                        self._block_of[digests[place]] = block
                sequence.num_published = full
        self.drop_behind_window(sequence, sequence.num_computed)

    def drop_behind_window(self, sequence: Sequence, num_computed: int) -> None:
        """Give back blocks that the query at position `num_computed` and later ones do not see."""
        if self.window is None:
            return
        behind = max(0, num_computed - self.window + 1) // self.block_size
        for place in range(sequence.num_dropped, behind):
            self._let_go(sequence.block_table[place])
            sequence.block_table[place] = FREED
        sequence.num_dropped = max(sequence.num_dropped, behind)

    def free(self, sequence: Sequence) -> None:
        """Give back every block of a sequence; what was published stays found until its place is needed."""
        # The end of a chain is let go first: without its beginning it could not be found.
        while sequence.block_table:
            block = sequence.block_table.pop()
            if block != FREED:
                self._let_go(block)
        sequence.num_published = sequence.num_dropped = 0

    def forget_all(self) -> None:
        """Give back everything and unpublish it: nobody knows what the cache holds. Tables are their owners' affair."""
        self._refs = [0] * self.num_blocks
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._hash_of.clear()
        self._block_of.clear()
        self._unused.clear()

    def hashes(self, sequence: Sequence, count: int) -> list[bytes]:
        """Digests of the sequence's first `count` blocks (or more); each covers all tokens up to its block's end.

        Cryptographic, as a collision would show one user's text to another.
        """
        known = sequence.block_hashes
        if len(known) < count:
            last = known[-1] if known else _digest(repr(sequence.cache_salt).encode(), b"")
            tokens = array("q", sequence.tokens(len(known) * self.block_size, count * self.block_size)).tobytes()
            width = 8 * self.block_size
            for begin in range(0, len(tokens), width):
                last = _digest(tokens[begin : begin + width], last)
                known.append(last)
        return known[:count]

    def check_integrity(self, sequences: list[Sequence]) -> None:
        """Raise AssertionError unless every block is accounted for.

        Args:
            sequences: all that may hold blocks.
        """
        counted = [0] * self.num_blocks
        for sequence in sequences:
            held = [block for block in sequence.block_table if block != FREED]
            assert len(set(held)) == len(held), "a sequence holds a block twice"
            for block in held:
                counted[block] += 1
        assert counted == self._refs, "reference counts are wrong"
        free, unused = set(self._free), set(self._unused)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & unused
        assert free | unused == {block for block, count in enumerate(counted) if count == 0}, "a block is lost"
        assert {block: digest for digest, block in self._block_of.items()} == self._hash_of
        assert not free & self._hash_of.keys(), "a free block is published"
        assert unused <= self._hash_of.keys()

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._unused.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        self._refs[block] = 1
        return block

    def _refer(self, block: int) -> None:
        if self._refs[block] == 0:
            del self._unused[block]
        self._refs[block] += 1

    def _let_go(self, block: int) -> None:
        assert self._refs[block] > 0
        self._refs[block] -= 1
        if self._refs[block] == 0:
            if block in self._hash_of:
                self._unused[block] = None
            else:
                self._free.append(block)


def _digest(content: bytes, before: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16, key=before).digest()
