"""A pool whose units have owners and may be shared: what the simulator's requests hold, and copy on write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.errors import OptionError
from rankwise.serve.cache.block_pool import BlockPool, PoolUnit


class SharedBlockPool(BlockPool):
    """Reference counts per owner on top of :class:`~rankwise.serve.cache.block_pool.BlockPool`, whose arguments it takes."""

    def __init__(self, units: Mapping[str, PoolUnit], *args: Any, **options: Any):
        super().__init__(units, *args, **options)
        self._refs: dict[str, list[int]] = {t: [0] * u.count for t, u in units.items()}
        self._held: dict[str, dict[str, Counter[int]]] = {}

    def allocate(self, n: int, tag: str, owner: str = "") -> tuple[int, ...] | None:
        """``n`` ids for ``owner``, or None (and nothing taken) where there is no room."""
        ids = super().allocate(n, tag)
        if ids is not None:
            self._hold(ids, tag, owner)
        return ids

    def _hold(self, ids: Sequence[int], tag: str, owner: str) -> None:
        if not ids:
            return
        mine = self._held.setdefault(owner, {}).setdefault(tag, Counter())
        for i in ids:
            self._refs[tag][i] += 1
            mine[i] += 1

    def share(self, ids: Sequence[int], tag: str, owner: str = "") -> None:
        """One reference more to each of ``ids``, which somebody holds, for ``owner``."""
        for i in ids:
            self._live(i, tag)
        self._hold(ids, tag, owner)

    def free(self, ids: Sequence[int], tag: str, owner: str = "") -> tuple[int, ...]:
        """Give one reference of ``owner``'s to each of ``ids`` back; the ids that nobody holds now.

        Raises:
            OptionError: ``owner`` does not hold one of them (nothing is given back then).
        """
        self._unit(tag)
        mine = self._held.get(owner, {}).get(tag, Counter())
        for i, n in Counter(ids).items():
            if mine[i] < n:
                raise OptionError(f"{owner or 'the pool'!r} gives back {tag} {i} {n} times and holds it {mine[i]} times.")
        gone = []
        for i in ids:
            mine[i] -= 1
            if not mine[i]:
                del mine[i]
            self._refs[tag][i] -= 1
            if not self._refs[tag][i]:
                gone.append(i)
        super().free(gone, tag)
        self._forget(owner, tag)
        return tuple(gone)

    def _forget(self, owner: str, tag: str) -> None:
        held = self._held.get(owner, {})
        if tag in held and not held[tag]:
            del held[tag]
        if owner in self._held and not held:
            del self._held[owner]

    def release(self, owner: str) -> dict[str, tuple[int, ...]]:
        """Give back all that ``owner`` holds; per tag the ids that nobody holds now."""
        return {tag: self.free(list(ids.elements()), tag, owner) for tag, ids in list(self._held.get(owner, {}).items())}

    # --- who --------------------------------------------------------------------------------------------------------
    def _live(self, i: int, tag: str) -> None:
        self._unit(tag)
        if not (0 <= i < len(self._refs[tag]) and self._refs[tag][i]):
            raise OptionError(f"{tag} {i} is held by nobody; only what has been allocated can be shared or written.")

    def references(self, i: int, tag: str) -> int:
        """How many hold ``i`` (0: it is free)."""
        self._unit(tag)
        return self._refs[tag][i]

    def writable(self, i: int, tag: str) -> bool:
        """Whether its holder may write ``i`` in place: it is the only one."""
        self._live(i, tag)
        return self._refs[tag][i] == 1

    def own(self, i: int, tag: str, owner: str = "") -> int | None:
        """Copy on write: ``i`` itself where ``owner`` is the only holder, else a new id in its place, whose contents the
        caller copies; None where there is no room for one."""
        if self.writable(i, tag):
            return i
        fresh = self.allocate(1, tag, owner)
        if fresh is None:
            return None
        self.free([i], tag, owner)
        return fresh[0]

    def held(self, owner: str) -> dict[str, tuple[int, ...]]:
        """What ``owner`` holds, per tag."""
        return {tag: tuple(ids.elements()) for tag, ids in self._held.get(owner, {}).items()}

    def count(self, owner: str, tag: str) -> int:
        """How many units of ``tag`` ``owner`` holds, a shared reference counted each time."""
        self._unit(tag)
        held = self._held.get(owner)
        return held[tag].total() if held is not None and tag in held else 0

    def owners(self, i: int, tag: str) -> tuple[str, ...]:
        """Who holds ``i``; looks through all owners."""
        self._unit(tag)
        return tuple(o for o, held in self._held.items() if held.get(tag, Counter())[i])

    def stats(self) -> dict[str, Any]:
        """Units held and units that could be taken, per tag, and the bytes of all."""
        tags = {t: {"used": self.used(t), "room": self.room(t), "count": u.count} for t, u in self.units.items()}
        return {"tags": tags, "bytes": self.used_bytes, "budget": self.budget, "peak": self.peak}


def split(units: Mapping[str, PoolUnit], shares: Mapping[str, float], budget: int) -> SharedBlockPool:
    """A pool in which each tag has its share of ``budget`` and no more (shares add up to 1)."""
    if set(shares) != set(units) or abs(sum(shares.values()) - 1) > 1e-9 or min(shares.values()) < 0:
        raise OptionError(
            f"The shares {dict(shares)} are of the tags {', '.join(units)}; give each a share of 0 or more that add up to 1."
        )
    bounded = {t: PoolUnit(u.bytes, min(u.count, int(shares[t] * budget) // u.bytes)) for t, u in units.items()}
    return SharedBlockPool(bounded, budget)
