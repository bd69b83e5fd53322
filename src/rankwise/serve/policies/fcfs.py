"""First come, first served."""

from __future__ import annotations

import dataclasses
import math

from rankwise.catalogue import register
from rankwise.serve.policies.base import Policy, RequestInfo, State, need, oldest_first


@register("policy", "fcfs", title="First come, first served")
@dataclasses.dataclass
class Fcfs(Policy):
    """In order of arrival.

    ``strict``: a request that does not fit holds up those behind it, always; otherwise they are tried, until it has
    waited ``max_wait`` seconds: then what becomes free is kept for it.  So none waits longer than ``max_wait``, the
    requests let in by then, and the older ones that also waited so long.
    """

    strict: bool = False
    max_wait: float = math.inf
    name = "fcfs"

    def __post_init__(self) -> None:
        need("fcfs", max_wait=(self.max_wait, self.max_wait >= 0, "0 seconds or more"))

    def order(self, state: State) -> list[RequestInfo]:
        ordered, aged = oldest_first(sorted(state.waiting, key=lambda j: j.arrival), state, self.max_wait)
        self.blocking = self.strict or aged
        return ordered
