"""Who holds what of a fixed memory: cache blocks, LoRA pages, training buffers.  Bookkeeping only, no tensors.

Each tag has units of its own size and its own ids (a kv id is a block of the key and value tensors, an adapter id a LoRA page of
:class:`~rankwise.serve.ops.base.LoraPages`), and all count against one budget of bytes.  A floor keeps bytes for a tag that
others cannot take.  *Unified* paging (S-LoRA) is no floors; a *split* pool is floors that add up to the budget; a
*budgeted* one has small floors:

    room(t) = min(free ids of t, (budget − used − Σ_{s≠t} max(0, floor_s − used_s)) / bytes_t)

Units rather than S-LoRA's rows of length h, since k and v of grouped-query attention and the projections of an MLP are not h wide.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.errors import OptionError, unknown

KV = "kv"
ADAPTER = "adapter"
TRAIN_ACTIVATION = "train-activation"
TRAIN_KV_GRAD = "train-kv-grad"


@dataclasses.dataclass(frozen=True, slots=True)
class PoolUnit:
    """What one id of a tag stands for: ``bytes`` of memory; there are ids 0 … ``count`` − 1."""

    bytes: int
    count: int

    def __post_init__(self) -> None:
        if self.bytes < 1 or self.count < 0:
            raise OptionError(
                f"A unit of {self.bytes} bytes, {self.count} of them; it has at least 1 byte, and the count is 0 or more."
            )


class BlockPool:
    """Equally sized units of several tags within one budget.

    Args:
        units: per tag; any names, usually :data:`KV`, :data:`ADAPTER`, :data:`TRAIN_ACTIVATION`, :data:`TRAIN_KV_GRAD`.
        budget: bytes that all tags hold together (default: everything there is).
        floors: bytes kept for a tag.
        shuffle: hands ids out in random order, for tests of what must not depend on it.

    Raises:
        OptionError: floors above the budget, or above what the tag's units are.
        UnknownName: a tag that the pool has not.
    """

    def __init__(
        self,
        units: Mapping[str, PoolUnit],
        budget: int | None = None,
        floors: Mapping[str, int] | None = None,
        shuffle: random.Random | None = None,
    ):
        self.units = dict(units)
        self.budget = sum(u.bytes * u.count for u in units.values()) if budget is None else budget
        self.floors = dict.fromkeys(units, 0) | dict(floors or {})
        self._check()
        self._free = {t: list(range(u.count - 1, -1, -1)) for t, u in units.items()}
        self._refs: dict[str, list[int]] = {t: [0] * u.count for t, u in units.items()}
        self._held: dict[str, dict[str, Counter[int]]] = {}
        self._shuffle = shuffle
        self.peak = 0  #: most bytes ever held

    def _check(self) -> None:
        for tag, floor in self.floors.items():
            unit = self._unit(tag)
            if not 0 <= floor <= unit.bytes * unit.count:
                raise OptionError(f"The floor of {tag!r} is {floor} bytes; its {unit.count} units are {unit.bytes * unit.count}.")
        if sum(self.floors.values()) > self.budget:
            raise OptionError(f"The floors add up to {sum(self.floors.values())} bytes, more than the budget of {self.budget}.")

    def _unit(self, tag: str) -> PoolUnit:
        if tag not in self.units:
            raise unknown("tag of the pool", tag, self.units)
        return self.units[tag]

    # --- how much ---------------------------------------------------------------------------------------------------
    def used(self, tag: str) -> int:
        """Units of ``tag`` that are held."""
        return self._unit(tag).count - len(self._free[tag])

    @property
    def used_bytes(self) -> int:
        return sum(self._bytes(t) for t in self.units)

    def _bytes(self, tag: str) -> int:
        return self.used(tag) * self.units[tag].bytes

    def room(self, tag: str) -> int:
        """How many units of ``tag`` :meth:`allocate` would give now."""
        unit = self._unit(tag)
        reserved = sum(max(self.floors[t], self._bytes(t)) for t in self.units if t != tag)
        return max(min(len(self._free[tag]), (self.budget - reserved - self._bytes(tag)) // unit.bytes), 0)

    def most(self, tag: str, beside: Mapping[str, int]) -> int:
        """How many units of ``tag`` there could be if nothing else were held but ``beside`` (units of other tags)."""
        unit = self._unit(tag)
        others = sum(max(self.floors[t], beside.get(t, 0) * u.bytes) for t, u in self.units.items() if t != tag)
        return max(min(unit.count, (self.budget - others) // unit.bytes), 0)

    def ids(self, tag: str) -> int:
        """Ids of ``tag`` that nobody holds, whatever the bytes allow."""
        self._unit(tag)
        return len(self._free[tag])

    # --- taking and giving back -------------------------------------------------------------------------------------
    def allocate(self, n: int, tag: str, owner: str = "") -> tuple[int, ...] | None:
        """``n`` ids for ``owner``, or None (and nothing taken) where there is no room."""
        if n < 0:
            raise OptionError(f"{n} units of {tag!r} were asked for; ask for 0 or more.")
        if n > self.room(tag):
            return None
        free = self._free[tag]
        if self._shuffle is not None:
            self._shuffle.shuffle(free)
        ids = tuple(reversed(free[len(free) - n :]))
        self._hold(ids, tag, owner)
        del free[len(free) - n :]
        self.peak = max(self.peak, self.used_bytes)
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
                self._free[tag].append(i)
                gone.append(i)
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


def split(units: Mapping[str, PoolUnit], shares: Mapping[str, float], budget: int) -> BlockPool:
    """A pool in which each tag has its share of ``budget`` and no more (shares add up to 1)."""
    if set(shares) != set(units) or abs(sum(shares.values()) - 1) > 1e-9 or min(shares.values()) < 0:
        raise OptionError(
            f"The shares {dict(shares)} are of the tags {', '.join(units)}; give each a share of 0 or more that add up to 1."
        )
    bounded = {t: PoolUnit(u.bytes, min(u.count, int(shares[t] * budget) // u.bytes)) for t, u in units.items()}
    return BlockPool(bounded, budget)
