"""Adapters as the engine's scheduler sees them: read in the background, put in slots between steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from rankwise.serve.cache.block_pool import ADAPTER, KV, BlockPool
from rankwise.serve.types import UnknownAdapter

if TYPE_CHECKING:
    from rankwise.serve.adapters.base import LoadedAdapter
    from rankwise.serve.adapters.cache import AdapterCache
    from rankwise.serve.adapters.slots import Slot, SlotTable


class PoolPages:
    """Pages handed out by the pool that the cache blocks come from too."""

    def __init__(self, pool: BlockPool):
        self.pool = pool

    def take(self, n: int) -> list[int] | None:
        try:
            ids = self.pool.allocate(n, ADAPTER)
        except MemoryError:  # not even for the bookkeeping
            return None
        return None if ids is None else list(ids)

    def give(self, ids: Sequence[int]) -> None:
        self.pool.free(ids, ADAPTER)


class AdapterResidency:
    """A cache (host) and a table of slots (device) behind the scheduler's questions.

    Args:
        make_room: gives up an idle cache block, where both live on one budget; False where there is none.
    """

    def __init__(self, cache: AdapterCache, table: SlotTable, pool: BlockPool, make_room: Callable[[], bool] = lambda: False):
        self.cache, self.table, self.pool, self.make_room = cache, table, pool, make_room

    @property
    def slots(self) -> Mapping[int, Slot]:
        return self.table.slots

    def fetch(self, digest: str) -> Future[LoadedAdapter]:
        """Hold the digest, and its numbers now or later; answered by one :meth:`release`."""
        self.cache.acquire(digest)
        try:
            return self.cache.fetch(digest)
        except BaseException:
            self.cache.release(digest)
            raise

    def release(self, digest: str) -> None:
        self.cache.release(digest)

    def enter(self, digest: str, served: LoadedAdapter) -> int | None:
        """The slot, pinned; None where no room can be made now."""
        slot = self.table.ensure(digest, served)
        # pages that are short as such come from no cache block; memory does, where both live on one budget
        while slot is None and self.pool.ids(ADAPTER) >= served.manifest.pages and self.make_room():
            slot = self.table.ensure(digest, served)
        if slot is not None:
            self.table.pin(slot)
        return slot

    def leave(self, slot: int) -> None:
        self.table.unpin(slot)

    def resident(self, digest: str) -> bool:
        return self.table.find(digest) is not None

    def lora_pages(self, digest: str) -> int:
        return self.cache.known(digest).pages

    def most_blocks(self, digest: str | None) -> int:
        """Cache blocks that a request of this adapter could have if it were alone (an unknown digest takes no pages)."""
        try:
            pages = 0 if digest is None else self.lora_pages(digest)
        except UnknownAdapter:
            pages = 0
        # more pages than there are is another refusal's to say (SlotTable.ensure)
        return self.pool.most(KV, {ADAPTER: min(pages, self.pool.units[ADAPTER].count)})

    def free_lora_pages(self) -> int:
        return self.pool.room(ADAPTER)

    def lora_pages_held(self) -> tuple[int, int]:
        """(pages that adapters hold, pages there are)."""
        return self.pool.used(ADAPTER), self.pool.units[ADAPTER].count

    def shrink(self) -> bool:
        """Empty one slot that nobody uses."""
        return self.table.shrink()

    def relieve(self) -> None:
        """Let go of every adapter that nobody uses, on the device and on the host."""
        while self.table.shrink():
            pass
        self.cache.relieve()
