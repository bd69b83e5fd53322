"""Blocks of the key-value cache: who holds them, and which finished ones others may share.

A full block is known by a chain of hashes over its tokens and those before it.  The first link is a **tagged salt**:
the base, the adapter's digest, the tenant and the caller's salt are hashed with their names and lengths, so no field
can imitate another, and a reload under an adapter's name (another digest) starts another chain.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rankwise.errors import RankwiseError

if TYPE_CHECKING:
    from rankwise.serve.cache.block_pool import BlockPool


def salt(fields: Mapping[str, str]) -> bytes:
    """The first link of a chain: every field with its name and length, in sorted order."""
    h = hashlib.sha256()
    for name in sorted(fields):
        value = fields[name].encode()
        h.update(f"{len(name)}:{name}:{len(value)}:".encode() + value)
    return h.digest()


def link(before: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of a full block of ``tokens`` behind the block hashed ``before``."""
    return hashlib.sha256(before + b"|" + ",".join(map(str, tokens)).encode()).digest()


class PrefixIndex:
    """Reference counts of blocks, the index of full ones, and the idle ones that are kept until room is wanted.

    A block is *held* (some request refers to it), *idle* (nobody does, but its hash is known; it is given up in the order of
    last use) or the pool's.

    Args:
        pool: gives and takes blocks, by the tag ``tag``.
        page: tokens of a block.
        share: whether full blocks are entered and found; False keeps every request to itself.
    """

    def __init__(self, pool: BlockPool, page: int, *, tag: str = "kv", share: bool = True):
        self.pool, self.page, self.tag, self.share = pool, page, tag, share
        self.refs: dict[int, int] = {}
        self.hash_of: dict[int, bytes] = {}
        self.block_of: dict[bytes, int] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()

    def available(self) -> int:
        """Blocks that :meth:`take` could give now."""
        return self.pool.room(self.tag) + len(self.idle)

    def ids(self) -> int:
        """Blocks that there would be for :meth:`take` if memory were no question."""
        return self.pool.ids(self.tag) + len(self.idle)

    def match(self, links: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known prefix of a chain; they are now held.  See :meth:`chain`."""
        blocks: list[int] = []
        for h in links if self.share else ():
            block = self.block_of.get(h)
            if block is None:
                break
            self._hold(block)
            blocks.append(block)
        return blocks

    def chain(self, first: bytes, tokens: Sequence[int]) -> list[bytes]:
        """The hashes of the full blocks of ``tokens`` that leave one token to compute."""
        links: list[bytes] = []
        for at in range(0, len(tokens) - self.page, self.page):
            first = link(first, tokens[at : at + self.page])
            links.append(first)
        return links

    def _hold(self, block: int) -> None:
        self.refs[block] = self.refs.get(block, 0) + 1
        self.idle.pop(block, None)

    def take(self, n: int) -> list[int] | None:
        """``n`` fresh blocks, held once each; idle ones are given up where the pool has none.  None: not enough, nothing is taken."""
        if n > self.available():
            return None
        while self.pool.room(self.tag) < n and self.idle:
            self._forget(self.idle.popitem(last=False)[0])
        try:
            blocks = self.pool.allocate(n, self.tag)
        except MemoryError:  # not even for the bookkeeping
            return None
        if blocks is None:
            return None
        for b in blocks:
            self.refs[b] = 1
        return list(blocks)

    def _forget(self, block: int) -> None:
        self.block_of.pop(self.hash_of.pop(block))
        self.pool.free([block], self.tag)

    def shrink(self, n: int) -> int:
        """Give up to ``n`` idle blocks back to the pool; how many it was."""
        n = min(n, len(self.idle))
        for _ in range(n):
            self._forget(self.idle.popitem(last=False)[0])
        return n

    def complete(self, block: int, before: bytes, tokens: Sequence[int]) -> bytes:
        """``block`` now holds ``tokens`` behind the block hashed ``before``: enter it, unless its like is known already."""
        h = link(before, tokens)
        if self.share and h not in self.block_of and block not in self.hash_of:
            self.block_of[h] = block
            self.hash_of[block] = h
        return h

    def release(self, blocks: Sequence[int]) -> None:
        """A request lets go of its blocks; the last ones of a chain become the first to be given up."""
        for b in reversed(blocks):
            held = self.refs.get(b, 0)
            if held < 1:
                raise RankwiseError(f"Block {b} is released more often than it was held; this is a fault of the engine.")
            if held > 1:
                self.refs[b] = held - 1
                continue
            del self.refs[b]
            if b in self.hash_of:
                self.idle[b] = None
            else:
                self.pool.free([b], self.tag)
