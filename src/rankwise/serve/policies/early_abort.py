"""Early abort: who will be late anyway is let go, and under overload the newest come first."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from rankwise.catalogue import register
from rankwise.serve.policies.base import Policy, RequestInfo, State, Verdict, need


@register(
    "policy", "early_abort", title="Early abort, newest first under overload", paper="S-LoRA, arXiv:2311.03285", reference="001"
)
@dataclasses.dataclass
class EarlyAbort(Policy):
    """Serving the oldest first under overload makes everybody late; so those who cannot be on time are let go.

    A request is hopeless when now + t̂(prompt) passes its deadline (its own, else arrival + ``slo``), t̂ being the
    predicted time to its first token were it let in at once; the original adds a constant 0.5 s instead, which
    ``margin`` can add.  Hopeless at arrival is REJECT (a client can go elsewhere), later it is ABORT.
    Rates, as published, over periods of ``every`` steps: ρ ← ⌊0.7·arrivals + 0.3·ρ⌋, β ← max(⌊0.7·admissions + 0.3·β⌋, 1),
    from ρ = β = 1.  Newest first where ρ ≥ β and the oldest has spent ``patience`` of its time; the second condition is
    new and keeps the order of arrival under light load, where the rates alone often say otherwise.  More patience
    meets more limits (1: oldest first always, nothing but the abort), less makes the first tokens that are in time earlier.
    Every request with a deadline is let in or let go by then; one without follows in order of arrival and is
    never let go.  Without deadlines this is first come, first served.

    Attributes:
        slo: seconds to the first token where a request has no deadline of its own; None: no limit.
        margin: seconds added to the prediction.
        patience: share of its time.
        every: steps of a period.
    """

    slo: float | None = 6.0
    margin: float = 0.0
    patience: float = 0.8
    every: int = 10
    name = "early_abort"
    _arrivals: int = dataclasses.field(default=0, init=False, repr=False)
    _admissions: int = dataclasses.field(default=0, init=False, repr=False)
    _steps: int = dataclasses.field(default=0, init=False, repr=False)
    _last: float = dataclasses.field(default=-math.inf, init=False, repr=False)
    rho: int = dataclasses.field(default=1, init=False)
    beta: int = dataclasses.field(default=1, init=False)

    def __post_init__(self) -> None:
        need(
            "early_abort",
            slo=(
                self.slo or 0.0,
                self.slo is None or self.slo > 0,
                "above 0 seconds, or None for requests without a deadline of their own",
            ),
            margin=(self.margin, self.margin >= 0, "0 seconds or more"),
            patience=(self.patience, 0 <= self.patience <= 1, "a share from 0 to 1"),
            every=(self.every, self.every >= 1, "at least 1 step"),
        )

    def deadline(self, job: RequestInfo) -> float:
        """When its first token must be out; infinity where it has no limit, or has one out already."""
        if job.generated or (job.deadline is None and self.slo is None):
            return math.inf
        return job.deadline if job.deadline is not None else job.arrival + (self.slo or 0.0)

    def hopeless(self, job: RequestInfo, state: State) -> bool:
        return state.now + state.seconds(job.prompt) + self.margin > self.deadline(job)

    def order(self, state: State) -> list[RequestInfo]:
        self._arrivals += sum(j.arrival > self._last for j in state.waiting)
        self._last = max([self._last, *(j.arrival for j in state.waiting)])
        late = [j for j in state.waiting if self.hopeless(j, state)]
        ids = {j.id for j in late}
        alive = [j for j in state.waiting if j.id not in ids]
        return late + (self._newest_first(alive) if self.overloaded(alive, state.now) else alive)

    def overloaded(self, alive: Sequence[RequestInfo], now: float) -> bool:
        """Whether oldest first would make many late."""
        return self.rho >= self.beta and any(now - j.arrival >= self.patience * (self.deadline(j) - j.arrival) for j in alive)

    def _newest_first(self, alive: Sequence[RequestInfo]) -> list[RequestInfo]:
        return sorted(alive, key=lambda j: -j.arrival if self.deadline(j) < math.inf else math.inf)

    def verdict(self, job: RequestInfo, state: State) -> Verdict:
        if not self.hopeless(job, state):
            return Verdict.ADMIT
        return Verdict.ABORT if any(j.id == job.id for j in state.waiting) else Verdict.REJECT

    def admitted(self, job: RequestInfo, now: float) -> None:
        self._admissions += 1

    def stepped(self, produced: Mapping[str, int], jobs: Sequence[RequestInfo], now: float) -> None:
        self._steps += 1
        if self._steps % self.every == 0:
            self.rho = math.floor(0.7 * self._arrivals + 0.3 * self.rho)
            self.beta = max(math.floor(0.7 * self._admissions + 0.3 * self.beta), 1)
            self._arrivals = self._admissions = 0
