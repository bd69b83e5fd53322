"""What is taken of a fixed memory: cache blocks, LoRA pages.  Bookkeeping only, no tensors.

Each tag has units of its own size and its own ids (a kv id is a block of the key and value tensors, an adapter id a page of
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

from rankwise.errors import OptionError, unknown

KV = "kv"
ADAPTER = "adapter"


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
        units: per tag; any names, usually :data:`KV` and :data:`ADAPTER`.
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
        self._taken: dict[str, set[int]] = {t: set() for t in units}
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
    def allocate(self, n: int, tag: str) -> tuple[int, ...] | None:
        """``n`` ids, or None (and nothing taken) where there is no room."""
        if n < 0:
            raise OptionError(f"{n} units of {tag!r} were asked for; ask for 0 or more.")
        if n > self.room(tag):
            return None
        free = self._free[tag]
        if self._shuffle is not None:
            self._shuffle.shuffle(free)
        ids = tuple(reversed(free[len(free) - n :]))
        self._taken[tag].update(ids)
        del free[len(free) - n :]
        self.peak = max(self.peak, self.used_bytes)
        return ids

    def free(self, ids: Sequence[int], tag: str) -> object:
        """Give ``ids`` back.

        Raises:
            OptionError: one of them is not taken, or stands there twice (nothing is given back then).
        """
        self._unit(tag)
        taken = self._taken[tag]
        for i, n in Counter(ids).items():
            if n > (i in taken):
                raise OptionError(f"'the pool' gives back {tag} {i} {n} times and holds it {int(i in taken)} times.")
        taken.difference_update(ids)
        self._free[tag] += ids
        return ids
