"""The queue of those that wait, made so that a step's share of the work does not grow with it.

Policies are shown a *window*: the oldest whose adapters are read, half of the places going to the heads of the tenants' own
queues in turn, so that no tenant's flood hides the others.  Everybody else is looked at a few a step (:meth:`Waiting.sweep`),
for what needs no place: a deadline that has passed, an adapter that could not be read.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankwise.serve.engine.sequence import Sequence

Place = tuple[int, str]  # (position, id)


class Waiting:
    """Requests by id, each with a position: the order of arrival, or before all others where it was preempted."""

    def __init__(self) -> None:
        self._all: OrderedDict[str, Sequence] = OrderedDict()  # in the order of the last look
        self._place: dict[str, Place] = {}
        self._ready: list[Place] = []
        self._of: OrderedDict[str, list[Place]] = OrderedDict()  # tenant → its part of _ready, in the order of their turns
        self._read: SimpleQueue[str] = SimpleQueue()  # ids whose adapters have been read since the last window
        self._next, self._first = 0, 0

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, id: object) -> bool:
        return id in self._all

    def __getitem__(self, id: str) -> Sequence:
        return self._all[id]

    def get(self, id: str) -> Sequence | None:
        return self._all.get(id)

    def values(self) -> Iterable[Sequence]:
        return self._all.values()

    def push(self, seq: Sequence, *, front: bool = False) -> None:
        """Take one in, behind all others or before them."""
        id = seq.request.id
        self._next, self._first = self._next + (not front), self._first - front
        self._all[id] = seq
        self._place[id] = (self._first if front else self._next, id)
        if seq.fetched is None or seq.fetched.done():
            self._enter(id)
        else:
            seq.fetched.add_done_callback(lambda _: self._read.put(id))  # on whatever thread read it

    def pop(self, id: str) -> Sequence | None:
        """Take one out; None where it is not here."""
        seq = self._all.pop(id, None)
        if seq is not None:
            place, tenant = self._place.pop(id), seq.request.tenant
            if _without(self._ready, place):
                _without(self._of[tenant], place)
                if not self._of[tenant]:
                    del self._of[tenant]
        return seq

    def _enter(self, id: str) -> None:
        place = self._place[id]
        insort(self._ready, place)
        insort(self._of.setdefault(self._all[id].request.tenant, []), place)

    def window(self, n: int) -> list[Sequence]:
        """Up to ``n`` of those whose adapters are read (or could not be), in order; work of O(n)."""
        with suppress(Empty):
            while True:
                id = self._read.get_nowait()
                seq = self._all.get(id)
                # it may have gone, and another of that id have come, whose own adapter is still being read
                if seq is not None and not _holds(self._ready, self._place[id]) and (seq.fetched is None or seq.fetched.done()):
                    self._enter(id)
        if len(self._ready) <= n or len(self._of) == 1:
            return [self._all[id] for _, id in self._ready[:n]]
        chosen = set(self._ready[: n - n // 2])
        tenants = list(islice(self._of, n // 2))
        for tenant in tenants:
            chosen.update(self._of[tenant][: max(n // 2 // len(tenants), 1)])
            self._of.move_to_end(tenant)
        return [self._all[id] for _, id in sorted(chosen)]

    def sweep(self, n: int) -> list[Sequence]:
        """The next ``n`` in turn; everybody's turn comes every len/n calls."""
        some = list(islice(self._all, n))
        for id in some:
            self._all.move_to_end(id)
        return [self._all[id] for id in some]


def _holds(places: list[Place], place: Place) -> bool:
    at = bisect_left(places, place)
    return at < len(places) and places[at] == place


def _without(places: list[Place], place: Place) -> bool:
    """Take ``place`` out of a sorted list; whether it was there."""
    at = bisect_left(places, place)
    if at < len(places) and places[at] == place:
        del places[at]
        return True
    return False
