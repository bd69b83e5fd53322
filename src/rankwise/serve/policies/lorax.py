"""One queue an adapter, a limited number of them active, each for a limited time."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

from rankwise.catalogue import register
from rankwise.serve.policies.base import Policy, RequestInfo, State, need


@register("policy", "lorax", title="Queues of adapters with an active time", reference="001")
@dataclasses.dataclass
class Lorax(Policy):
    """Queues by adapter, as LoRAX's router has them: at most ``slots`` adapters are active, the others pend in a row.

    The next request is the oldest head among the queues that have been active less than ``max_active`` seconds, else the
    oldest of all active ones.  An active adapter gives its place to the first pending one whose adapter is read once it is
    idle (no one waits and none runs), or has been active ``max_active``: then nothing of its queue is let in until its running
    requests end, and it goes to the back of the row.  The base has no place to give and is always active.
    A pending adapter at position p waits at most ⌈p/slots⌉·(max_active + the longest request).
    """

    slots: int = 8
    max_active: float = 2.0
    name = "lorax"
    active: dict[str, float] = dataclasses.field(default_factory=dict, init=False)
    _pending: dict[str, None] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        need(
            "lorax",
            slots=(self.slots, self.slots >= 1, "at least 1"),
            max_active=(self.max_active, self.max_active > 0, "above 0 seconds"),
        )

    def order(self, state: State) -> list[RequestInfo]:
        queues: dict[str | None, list[RequestInfo]] = defaultdict(list)
        for j in sorted(state.waiting, key=lambda j: j.arrival):
            queues[j.adapter].append(j)
        running = state.adapters()
        for adapter in running - self.active.keys():
            self.active[adapter] = state.now  # let in before this policy was asked, or by another
        self._pend(queues)
        closed = self._exchange(queues, running, state.now)
        opened = [*queues.get(None, [])]
        for adapter in self.active.keys() - closed:
            opened += queues.get(adapter, [])
        return sorted(opened, key=lambda j: (j.adapter is not None and self._expired(j.adapter, state.now), j.arrival))

    def _expired(self, adapter: str, now: float) -> bool:
        return now - self.active[adapter] >= self.max_active

    def _pend(self, queues: dict[str | None, list[RequestInfo]]) -> None:
        here = [a for a in queues if a is not None and a not in self.active]
        self._pending = {a: None for a in self._pending if a in queues and a not in self.active} | dict.fromkeys(here)

    def _exchange(self, queues: dict[str | None, list[RequestInfo]], running: set[str], now: float) -> set[str]:
        """Give places to pending adapters; the active ones that are being closed for the rest."""
        for adapter in [a for a in self._pending if queues[a][0].ready]:
            if len(self.active) >= self.slots:
                gone = self._leaver(queues, running, now)
                if gone is None:
                    break
                del self.active[gone]
                if gone in queues:
                    self._pending[gone] = None
            del self._pending[adapter]
            self.active[adapter] = now
        wanted = sum(queues[a][0].ready for a in self._pending)
        return set(sorted((a for a in self.active if self._expired(a, now)), key=self.active.__getitem__)[:wanted])

    def _leaver(self, queues: dict[str | None, list[RequestInfo]], running: set[str], now: float) -> str | None:
        """An active adapter with nothing running that is idle or has had its time, the idle first."""
        able = [a for a in self.active if a not in running and (a not in queues or self._expired(a, now))]
        return min(able, key=lambda a: (a in queues, self.active[a]), default=None)
