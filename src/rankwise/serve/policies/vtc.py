"""Virtual token counter: the tenant that has had least is next."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence

from rankwise.catalogue import register
from rankwise.errors import OptionError
from rankwise.serve.policies.base import Policy, RequestInfo, State, need


@register("policy", "vtc", title="Virtual token counter (fairness of tenants)", paper="VTC, arXiv:2401.00588", reference="001")
@dataclasses.dataclass
class VirtualTokenCounter(Policy):
    """Each tenant u has a counter c_u of service over weight w_u; the waiting tenant with the least goes next.

    Letting in adds ``prompt_price``·prompt/w_u (once, also where a request is preempted), each new token ``token_price``/w_u.
    A tenant whose queue fills again starts at no less than the least counter of the tenants that wait, or than the one
    that left last: idle time earns no credit.  Two tenants that always wait, of equal weight, differ in service by at most
    2·max(prompt price, what the batch makes), at all times.  Within a tenant the order given is kept.
    Keyed by tenant, where the published code has one key an adapter; and a request that does not fit does not stop the others.
    """

    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    prompt_price: float = 1.0
    token_price: float = 2.0
    name = "vtc"
    counters: dict[str, float] = dataclasses.field(default_factory=dict, init=False)
    _waiting: set[str] = dataclasses.field(default_factory=set, init=False, repr=False)
    _charged: set[str] = dataclasses.field(default_factory=set, init=False, repr=False)
    _left: float = dataclasses.field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        for tenant, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise OptionError(f"vtc got a weight of {weight} for the tenant {tenant!r}; it is above 0 and finite.")
        need(
            "vtc",
            prompt_price=(self.prompt_price, self.prompt_price >= 0, "0 or more"),
            token_price=(self.token_price, self.token_price >= 0, "0 or more"),
        )

    def order(self, state: State) -> list[RequestInfo]:
        queues: dict[str, deque[RequestInfo]] = defaultdict(deque)
        for j in state.waiting:
            queues[j.tenant].append(j)
        self._lift(set(queues))
        heap = [(self.counters[t], i, t) for i, t in enumerate(queues)]
        heapq.heapify(heap)
        out: list[RequestInfo] = []
        while heap:
            counter, i, tenant = heap[0]
            job = queues[tenant].popleft()
            out.append(job)
            if queues[tenant]:
                heapq.heapreplace(heap, (counter + self._price(job), i, tenant))
            else:
                heapq.heappop(heap)
        return out

    def _lift(self, waiting: set[str]) -> None:
        gone = [self.counters[t] for t in self._waiting - waiting]
        self._left = max(gone, default=self._left)
        stayed = [self.counters[t] for t in self._waiting & waiting]
        floor = min(stayed, default=self._left)
        for tenant in waiting - self._waiting:
            self.counters[tenant] = max(self.counters.get(tenant, 0.0), floor)
        self._waiting = waiting

    def _price(self, job: RequestInfo) -> float:
        return 0.0 if job.id in self._charged else self.prompt_price * job.prompt / self.weights.get(job.tenant, 1.0)

    def admitted(self, job: RequestInfo, now: float) -> None:
        self.counters[job.tenant] = self.counters.get(job.tenant, 0.0) + self._price(job)
        self._charged.add(job.id)

    def stepped(self, produced: Mapping[str, int], jobs: Sequence[RequestInfo], now: float) -> None:
        for j in jobs:
            price = self.token_price * produced.get(j.id, 0) / self.weights.get(j.tenant, 1.0)
            self.counters[j.tenant] = self.counters.get(j.tenant, 0.0) + price

    def finished(self, job: RequestInfo, now: float) -> None:
        self._charged.discard(job.id)
