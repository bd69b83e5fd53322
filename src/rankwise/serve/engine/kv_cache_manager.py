"""The blocks of each request: found by prefix, taken as it grows, entered in the index once they are full."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rankwise.serve.cache.prefix import PrefixIndex, salt

if TYPE_CHECKING:
    from rankwise.serve.engine.sequence import Sequence
    from rankwise.serve.types import Request


class KVCacheManager:
    """What a request has in the key-value cache.

    Args:
        index: the blocks, and which are known by prefix.
        base: fingerprint of the base, the first field of every prefix salt.
        evict: gives up one idle adapter where adapters and blocks share one budget; False where there is none.
    """

    def __init__(self, index: PrefixIndex, base: str, evict: Callable[[], bool]):
        self.index, self.page, self.base, self.evict = index, index.page, base, evict

    def first_link(self, r: Request) -> bytes:
        """The salt of a request's prefix chain."""
        return salt({"base": self.base, "adapter": r.adapter or "", "tenant": r.tenant, "salt": r.salt})

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.page)

    def lacking(self, seq: Sequence) -> int:
        """Blocks that a request takes for the tokens it has and the next one."""
        return max(self.blocks_for(len(seq.tokens) + 1) - len(seq.blocks), 0)

    def match(self, seq: Sequence) -> None:
        """Hold the blocks of its longest known prefix."""
        if len(seq.links) * self.page + self.page < len(seq.tokens):
            seq.links = self.index.chain(self.first_link(seq.request), seq.tokens)
        seq.blocks = self.index.match(seq.links)
        seq.full = len(seq.blocks)
        seq.computed = seq.reused = seq.full * self.page
        seq.chain = seq.links[seq.full - 1] if seq.full else seq.chain

    def release(self, seq: Sequence) -> None:
        """Let go of its blocks; those that are full can still be found."""
        self.index.release(seq.blocks)
        seq.blocks = []

    def reset(self, seq: Sequence) -> None:
        """Let go of its blocks, and count it as not computed: what waits holds no block."""
        self.release(seq)
        seq.computed, seq.full, seq.reused = 0, 0, 0
        seq.chain = self.first_link(seq.request)

    def room(self, blocks: int) -> bool:
        """Whether ``blocks`` can be taken; idle adapters make way for them where both live on one budget."""
        if self.index.ids() < blocks:
            return False  # ids are short, which no adapter's memory makes more
        while self.index.available() < blocks:
            if not self.evict():
                return False
        return True

    def grow(self, seq: Sequence, tokens: int) -> bool:
        """Blocks for ``tokens`` tokens of ``seq``; False (and nothing taken) where there is no room."""
        wanted = self.blocks_for(tokens) - len(seq.blocks)
        taken = self.index.take(wanted) if wanted > 0 and self.room(wanted) else None
        seq.blocks += taken or ()
        return wanted <= 0 or taken is not None

    def enter_full(self, seq: Sequence) -> None:
        """Enter the blocks that have become full in the index."""
        while (seq.full + 1) * self.page <= seq.computed:
            at = seq.full * self.page
            seq.chain = self.index.complete(seq.blocks[seq.full], seq.chain, seq.tokens[at : at + self.page])
            seq.full += 1
