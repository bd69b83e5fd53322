"""The numbers of adapters in host memory, within a budget: what was longest out of use for its cost goes first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from rankwise.serve.adapters.usage import Tally, Use, stalest
from rankwise.serve.types import AdapterRefused, Overloaded

if TYPE_CHECKING:
    from rankwise.serve.adapters.base import LoadedAdapter


@dataclasses.dataclass(slots=True)
class KeptAdapter:
    """An adapter in host memory, and its use."""

    served: LoadedAdapter
    use: Use


class HostTier:
    """Adapters by digest; whoever owns it holds a lock around every call.

    Attributes:
        kept: digest → what is in memory.
        budget: bytes; what is pinned stays, so :meth:`put` refuses what does not fit beside it.
    """

    def __init__(self, budget: int, clock: Callable[[], float], tally: Tally):
        self.kept: dict[str, KeptAdapter] = {}
        self.budget, self._clock, self._tally = budget, clock, tally

    @property
    def nbytes(self) -> int:
        return sum(k.served.manifest.nbytes for k in self.kept.values())

    def get(self, digest: str) -> LoadedAdapter | None:
        """The adapter, marked as used now; None where it is not in memory."""
        kept = self.kept.get(digest)
        if kept is None:
            return None
        kept.use.last = self._clock()
        return kept.served

    def put(self, served: LoadedAdapter, seconds: float, pins: int) -> None:
        """Keep an adapter that took ``seconds`` to read and that ``pins`` hold already.

        Raises:
            AdapterRefused, Overloaded: larger than the budget; what is in use leaves no room.
        """
        digest, size = served.manifest.digest, served.manifest.nbytes
        if size > self.budget:
            raise AdapterRefused(f"The adapter {served.manifest.name!r} takes {size:,} bytes; the host tier holds {self.budget:,}.")
        while self.nbytes + size > self.budget:
            gone = stalest(self.kept, self._clock(), lambda key, _: key != digest)
            if gone is None:
                raise Overloaded(f"Adapters in use leave no room for {served.manifest.name!r} ({size:,} bytes); try again.")
            self._evict(gone)
        self.kept[digest] = KeptAdapter(served, Use(self._clock(), max(seconds, 1e-3), pins))

    def relieve(self) -> None:
        """Let go of all that nobody holds."""
        for digest in [d for d, kept in self.kept.items() if not kept.use.pins]:
            self._evict(digest)

    def _evict(self, digest: str) -> None:
        del self.kept[digest]
        self._tally.evictions["host"] += 1
