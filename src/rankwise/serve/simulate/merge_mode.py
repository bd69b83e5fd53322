"""Merge mode: when one adapter has nearly all requests, its weights may be merged into the base for a while."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from rankwise.serve.policies.base import SIMULATED, Policy, RequestInfo, State, need


@dataclasses.dataclass
class ModeSwitch:
    """When to leave a mode for another, at a ``price``, with nothing known of the future.

    Keeps how much dearer staying has been than the other mode would have been, held within ±price, and leaves once it
    reaches the price (the work-function rule of two states): all costs and switches together are at most three times
    those of the best plan made in hindsight, plus a constant.
    """

    price: float
    excess: float = 0.0

    def step(self, here: float, there: float) -> bool:
        """After a step that cost ``here`` and would have cost ``there``: whether to switch now."""
        self.excess = max(self.excess + here - there, -self.price)
        if self.excess < self.price:
            return False
        self.excess = -self.price
        return True


@dataclasses.dataclass
class MergeMode(Policy):
    """dLoRA (OSDI 2024): says in ``mode`` which adapter to merge (None: none), and holds the others back while one is.

    Costs in steps of the plain base: unmerged 1 + ``delta``; merged(n) serves n's requests alone at cost 1, so giving all q
    requests a token costs q/q_n.  The hottest adapter is merged, or the merged one taken out, when :class:`ModeSwitch` at
    ``price`` says so.  Each step gives every request held back one credit for its adapter; an adapter with ``credit`` takes the
    merge back, so none is held back longer than ``credit`` steps plus those of the requests that run.
    An engine may merge once only that adapter's requests run (:meth:`ready`); this package's does not, and a server refuses the
    policy: the parameters are also those that training beside serving reads and every other adapter's rows are computed with,
    and keys and values made by merged weights differ in the last bits from those that the prefix index shares.  The rule is a reconstruction: the paper's own was
    not found in code.  On a CPU nothing is gained at usual ranks; on an accelerator a switch costs hundreds of steps' worth of bytes.
    """

    delta: float = 0.25
    price: float = 20.0
    credit: float = 200.0
    name = "merge_mode"
    unserved = SIMULATED["merge_mode"]
    mode: str | None = dataclasses.field(default=None, init=False)
    credits: Counter[str] = dataclasses.field(default_factory=Counter, init=False)
    _hot: str | None = dataclasses.field(default=None, init=False, repr=False)
    _waiting: Counter[str] = dataclasses.field(default_factory=Counter, init=False, repr=False)

    def __post_init__(self) -> None:
        need(
            "merge_mode",
            delta=(self.delta, self.delta >= 0, "0 or more"),
            price=(self.price, self.price > 0, "above 0"),
            credit=(self.credit, self.credit > 0, "above 0"),
        )
        self._switch = ModeSwitch(self.price)

    def order(self, state: State) -> list[RequestInfo]:
        self._waiting = Counter(j.adapter or "" for j in state.waiting)
        if self.mode is not None and not self._waiting[self.mode] and self.mode not in state.adapters():
            self._set(None)  # nothing of it is left, and no step would come to say so
        return [j for j in state.waiting if self.mode is None or j.adapter == self.mode]

    def ready(self, state: State) -> bool:
        """Whether the engine can merge ``mode`` now."""
        return self.mode is not None and all(j.adapter == self.mode for j in state.running)

    def admitted(self, job: RequestInfo, now: float) -> None:
        self._waiting[job.adapter or ""] -= 1

    def stepped(self, produced: Mapping[str, int], jobs: Sequence[RequestInfo], now: float) -> None:
        q = +self._waiting + Counter(j.adapter or "" for j in jobs)
        if self.mode is None:
            self._consider(q)
            return
        for adapter in +self._waiting:
            if adapter != self.mode:
                self.credits[adapter] += self._waiting[adapter]
        dear = q.total() / q[self.mode] if q[self.mode] else self.price * 2
        if self._switch.step(dear, 1 + self.delta) or max(self.credits.values(), default=0) >= self.credit:
            self._set(None)

    def _consider(self, q: Counter[str]) -> None:
        hot = max((a for a in q if a), key=lambda a: (q[a], a), default=None)
        if hot != self._hot:
            self._hot, self._switch = hot, ModeSwitch(self.price)
        if hot is not None and self._switch.step(1 + self.delta, q.total() / q[hot]):
            self._set(hot)

    def _set(self, mode: str | None) -> None:
        self.mode = mode
        self.credits.clear()
        self._switch = ModeSwitch(self.price, -self.price)
