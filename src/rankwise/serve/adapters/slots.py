"""Which adapters are on the device: slot → pages of the pool, what stands beside its pairs, and who uses it.

Only the engine's thread uses a table, between steps.  A slot's number is never used again, so whatever is kept by
slot (a step's composition, a packed index) can never be another adapter's.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from rankwise.errors import OptionError
from rankwise.serve.adapters.kinds import pages_for, rank_of
from rankwise.serve.adapters.usage import Use, stalest
from rankwise.serve.types import AdapterRefused

if TYPE_CHECKING:
    from rankwise.serve.adapters.base import LoadedAdapter, NonLoraChange
    from rankwise.serve.ops.base import Pairs


class PageAllocator(Protocol):
    """Hands out pages; the pool behind it may hold other things too."""

    def take(self, n: int) -> list[int] | None:
        """``n`` free pages, or None where there are not so many."""
        ...

    def give(self, ids: Sequence[int]) -> None:
        """Take back what :meth:`take` gave."""
        ...


class PageStore(Protocol):
    """Where adapters' numbers are written: this device's pages, or those of several."""

    @property
    def count(self) -> int: ...

    @property
    def page_bytes(self) -> int: ...

    def write(self, pages: Sequence[int], pairs: Mapping[str, Pairs]) -> None:
        """Fill ``pages`` with one adapter (:meth:`rankwise.serve.ops.base.LoraPages.write`)."""
        ...


@dataclasses.dataclass(slots=True)
class Slot:
    """One resident adapter.

    Attributes:
        number, digest: of the slot, and of the adapter in it.
        pages: where its pairs are; ``served``: the adapter, for what is no pair.
        use: when it was last used, and by how many.
    """

    number: int
    digest: str
    pages: tuple[int, ...]
    served: LoadedAdapter
    use: Use

    @property
    def non_lora_changes(self) -> Mapping[str, tuple[NonLoraChange, ...]]:
        return self.served.non_lora_changes

    @property
    def full_params(self) -> Mapping[str, Tensor]:
        return self.served.full_params


class SlotTable:
    """The slots of one device.

    Attributes:
        pages: slot → its pages, as the delta operators take it; ``slots``: number → slot.
        evictions: how many slots were emptied, by why (``room``, ``asked``, ``idle``).
    """

    def __init__(self, pages: PageStore, pool: PageAllocator, *, clock: Callable[[], float] = time.monotonic):
        self._pages, self._pool, self._clock = pages, pool, clock
        self._numbers = itertools.count()
        self._by_digest: dict[str, Slot] = {}
        self._by_number: dict[int, Slot] = {}
        self._owned: dict[int, tuple[int, ...]] = {}
        self.pages: Mapping[int, tuple[int, ...]] = MappingProxyType(self._owned)
        self.slots: Mapping[int, Slot] = MappingProxyType(self._by_number)
        self.evictions: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._by_number)

    def __getitem__(self, number: int) -> Slot:
        if number not in self._by_number:
            raise OptionError(f"There is no slot {number}; it was evicted, or never was.")
        return self._by_number[number]

    def find(self, digest: str) -> int | None:
        """The slot of a digest, where it is resident."""
        slot = self._by_digest.get(digest)
        return None if slot is None else slot.number

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        return sum(map(len, self._owned.values())) * self._pages.page_bytes

    def ensure(self, digest: str, served: LoadedAdapter) -> int | None:
        """The slot of ``digest``, its pages written; None where what is in use leaves no room now.

        Unpinned slots go, the longest out of use for what they cost first, until the pool has pages enough.

        Raises:
            AdapterRefused: it needs more pages than there are.
        """
        slot = self._by_digest.get(digest)
        if slot is not None:
            slot.use.last = self._clock()
            return slot.number
        need = pages_for(rank_of(served.pairs))
        if need > self._pages.count:
            raise AdapterRefused(
                f"The adapter {served.manifest.name!r} needs {need} pages (rank {served.manifest.rank}); the device has {self._pages.count}."
            )
        ids = self._take(need)
        if ids is None:
            return None
        try:
            self._pages.write(ids, served.pairs)
        except BaseException:
            self._give(ids)
            raise
        slot = Slot(next(self._numbers), digest, tuple(ids), served, Use(self._clock(), float(need or 1)))
        self._by_digest[digest] = self._by_number[slot.number] = slot
        self._owned[slot.number] = slot.pages
        return slot.number

    def pin(self, number: int) -> None:
        """A request uses this slot; it stays until :meth:`unpin`."""
        self[number].use.pins += 1

    def unpin(self, number: int) -> None:
        """
        Raises:
            OptionError: it is not pinned.
        """
        slot = self[number]
        if slot.use.pins < 1:
            raise OptionError(f"Slot {number} is unpinned more often than it was pinned.")
        slot.use.pins -= 1
        slot.use.last = self._clock()
        if not slot.pages and not slot.use.pins:
            self._evict(slot, "idle")  # it takes no page, so nothing would ever ask for its place; entering again writes nothing

    def drop(self, digest: str) -> bool:
        """Empty the slot of a digest if nobody uses it; whether it is gone."""
        slot = self._by_digest.get(digest)
        if slot is not None and slot.use.pins:
            return False
        if slot is not None:
            self._evict(slot, "asked")
        return True

    def shrink(self) -> bool:
        """Empty the unpinned slot with pages that is longest out of use for its cost; False where there is none."""
        gone = stalest(self._by_digest, self._clock(), lambda _, s: bool(s.pages))
        if gone is not None:
            self._evict(self._by_digest[gone], "room")
        return gone is not None

    def _take(self, need: int) -> list[int] | None:
        """Pages of the pool, made free where they must be."""
        if not need:
            return []
        while (ids := self._pool.take(need)) is None:
            if not self.shrink():
                return None
        return ids

    def _give(self, ids: Sequence[int]) -> None:
        if ids:
            self._pool.give(list(ids))

    def _evict(self, slot: Slot, why: str) -> None:
        del self._by_digest[slot.digest], self._by_number[slot.number], self._owned[slot.number]
        self._give(slot.pages)
        self.evictions[why] += 1
